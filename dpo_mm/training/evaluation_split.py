"""Split the pairs of a run into training rows and evaluation rows, or refuse an evaluation without rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpo_mm.config import TrainConfig
from dpo_mm.data.row_digest import digest
from dpo_mm.data.schema import split_by_prompt

if TYPE_CHECKING:
    from datasets import Dataset


def split_pairs(pairs: Dataset, config: TrainConfig) -> tuple[Dataset, Dataset | None]:
    """Split pairs as `split_by_prompt` with the settings of a run.

    Raises:
        ValueError: if `eval_every` is set and the fraction is less than one prompt.
    """
    train, evaluation = split_by_prompt(pairs, config.eval_fraction, seed=config.seed)
    if evaluation is None and config.eval_every:
        raise ValueError(
            f"{config.pairs}: eval_fraction {config.eval_fraction:g} of its {len(pairs)} pairs is less than one prompt, so there is "
            "nothing to evaluate. Raise eval_fraction, or set eval_every to 0"
        )
    return train, evaluation


def split_digests(parts: Sequence[Dataset | None]) -> list[str]:
    """Hash the training rows and, if there are any, the evaluation rows. Each image is read once."""
    return [digest(part) for part in parts if part is not None]
