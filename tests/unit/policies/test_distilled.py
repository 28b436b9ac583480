"""A distilled model is named in the plan of a run, with the model to train instead."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dpo_mm.policies.diffusion.distilled import BASES, describe_distillation

PIPE = SimpleNamespace(config={})


@pytest.mark.parametrize(
    "model", ["black-forest-labs/FLUX.2-klein-4B", "models/FLUX.2-klein-4B/", "FLUX.2-klein-4B-nf4"]
)
def test_a_distilled_model_is_named_with_its_base(model: str) -> None:
    text = describe_distillation(PIPE, model)
    assert text.startswith("FLUX.2-klein-4B") and "Train black-forest-labs/FLUX.2-klein-base-4B," in text


def test_a_distilled_model_is_recognised_by_a_word_in_its_name_or_by_its_config() -> None:
    assert "Train the model that it was distilled from," in describe_distillation(PIPE, "me/Mine-Lightning")
    assert describe_distillation(SimpleNamespace(config={"is_distilled": True}), "mine").startswith(
        "mine was distilled"
    )


@pytest.mark.parametrize("model", [*BASES.values(), "Qwen/Qwen-Image", "runs/turbocharged"])
def test_other_models_are_not_called_distilled(model: str) -> None:
    assert describe_distillation(PIPE, model) == ""
