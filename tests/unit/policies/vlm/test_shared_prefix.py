"""The packed sequence [prompt][chosen][rejected] by hand: who attends to whom, positions, and who predicts which token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.masking_utils import causal_mask_function

from dpo_mm.policies.vlm.prefix_layout import Layout, token_places
from dpo_mm.policies.vlm.shared_prefix import mask_chosen_from_rejected, separate_inputs

LAYOUT = Layout(prompt=2, chosen=3, rejected=2, has_padding=False)


def test_mask_is_causal_within_prompt_and_own_completion() -> None:
    """It catches rejected that attends to chosen, chosen that attends to rejected, and a rule on columns.

    The second mask function sees one position back only. The first token of rejected then sees the prompt's last one.
    """
    query, key = torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij")
    mask = mask_chosen_from_rejected(causal_mask_function, LAYOUT)(0, 0, query, key)
    assert mask.long().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1, 1],
    ]
    window = lambda batch, head, query, key: (query - key >= 0) & (query - key <= 1)
    near = mask_chosen_from_rejected(window, LAYOUT)(0, 0, query, key)
    assert near.long().tolist()[5:] == [[0, 1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1, 1]]


def test_prompt_never_attends_to_completions_in_both_directions() -> None:
    """Prefix models attend in both directions. It catches a prompt that sees a completion."""
    query, key = torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij")
    everything = lambda batch, head, query, key: torch.ones_like(query, dtype=torch.bool)
    mask = mask_chosen_from_rejected(everything, LAYOUT)(0, 0, query, key)
    assert mask[:2].long().tolist() == [[1, 1, 0, 0, 0, 0, 0]] * 2


def test_columns_and_positions() -> None:
    device = torch.device("cpu")
    assert LAYOUT.logical_positions(device).tolist() == [0, 1, 2, 3, 4, 2, 3]
    assert LAYOUT.predicting_columns(device).tolist() == [1, 2, 3, 1, 5]
    assert (LAYOUT.rejected_start, LAYOUT.total) == (5, 7)


@pytest.mark.parametrize(
    ("side", "chosen", "rejected"),
    [("left", [0, 0, 11, 12, 13], [0, 0, 11, 15, 16]), ("right", [11, 12, 13, 0, 0], [11, 15, 16, 0, 0])],
)
def test_separate_sequences_have_all_padding_on_one_side(side: str, chosen: list[int], rejected: list[int]) -> None:
    """It catches the other side. Models with linear attention need the padding on the left."""
    base: Any = SimpleNamespace(
        config=SimpleNamespace(model_type="m"),
        base_model=SimpleNamespace(),
        _prepare_position_ids_for_generation=lambda ids, inputs: inputs["attention_mask"].cumsum(1) - 1,
    )
    ids, mask = torch.tensor([[0, 11, 12, 13, 0, 15, 16]]), torch.tensor([[0, 1, 1, 1, 0, 1, 1]])
    batch = {"layout": LAYOUT, "ids": ids, "mask": mask, "types": {}, "images": {}}
    inputs, padding = separate_inputs(base, batch, padding_side=side)
    assert inputs["input_ids"].tolist() == [chosen, rejected]
    assert inputs["attention_mask"].tolist() == [[int(token > 0) for token in row] for row in (chosen, rejected)]
    predicting, tokens = token_places(LAYOUT, [[1], [2], [2]])["separate"]
    predicting = predicting + padding[predicting // 5]
    assert inputs["input_ids"].flatten()[predicting + 1].tolist() == [12, 13, 15, 16]
    assert ids[:, LAYOUT.prompt :].flatten()[tokens].tolist() == [12, 13, 15, 16]
