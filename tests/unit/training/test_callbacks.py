"""Warnings of drift: said once, at their limit, on the right side of it."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from dpo_mm.training.callbacks import DISPLACED, DRIFTED, WINDOW, ChosenErrorWarning, ChosenLikelihoodWarning


def fed(watch: ChosenLikelihoodWarning | ChosenErrorWarning, values: list[float]) -> None:
    for step, value in enumerate(values):
        watch.on_log(None, SimpleNamespace(global_step=step), None, logs={watch.name: value})
        watch.on_log(None, SimpleNamespace(global_step=step), None, logs={"eval_loss": 0.0})


@pytest.mark.parametrize(
    ("watch", "limit", "worse", "advice"),
    [(ChosenLikelihoodWarning, DISPLACED, -0.01, "sft_weight"), (ChosenErrorWarning, DRIFTED, 0.01, "objective sdpo")],
)
def test_chosen_drift_is_warned_of_once_with_a_fix(
    watch: type[ChosenLikelihoodWarning | ChosenErrorWarning],
    limit: float,
    worse: float,
    advice: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Mutations that it catches: the sign of the limit, one value for a mean, a warning at every log."""
    with caplog.at_level(logging.WARNING, logger="dpo_mm.training.callbacks"):
        fed(watch(), [limit - worse] * 3 * WINDOW)
        fed(watch(), [limit - worse] * (WINDOW - 1) + [limit + worse])
        fed(watch(), [limit + 100 * worse] * (WINDOW - 1))
        assert not caplog.records
        fed(watch(), [limit + worse] * 3 * WINDOW)
    assert len(caplog.records) == 1
    said = caplog.records[0].getMessage()
    assert said.startswith(f"step {WINDOW - 1}: ") and advice in said
