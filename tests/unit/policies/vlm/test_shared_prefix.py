"""The packed sequence [prompt][chosen][rejected] by hand: who attends to whom, positions, and who predicts which token."""

from __future__ import annotations

import torch
from transformers.masking_utils import causal_mask_function

from dpo_mm.policies.vlm.shared_prefix import Layout, mask_chosen_from_rejected

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
