"""The rows of a run: pairs, rows with a chosen side only, or liked and disliked rows. Those that do not fit its objective
are refused before a model is loaded.

A one-sided row has one image or response. It is liked if it is the chosen side, and disliked if it is the rejected one.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from dpo_mm.config import TrainConfig
from dpo_mm.data.schema import drop_ties, load_pairs, load_responses
from dpo_mm.policies.protocol import Modality
from dpo_mm.sources.local_pairs import LocalPairs, local_pairs
from dpo_mm.training.auto_beta import AUTO
from dpo_mm.training.evaluation_split import split_pairs
from dpo_mm.training.objective_settings import UNPAIRED, is_fine_tuning, objective_names

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

PAIRS_ONLY = ("ld_alpha", "edited_token_weight")
"""Settings of two responses to one prompt."""
NOT_FOR_LIKED = (*PAIRS_ONLY, "buckets")
"""Settings that liked and disliked rows do not support."""
REJECTED_COLUMNS = ("rejected", "rejected_truncated", "rejected_model")


@dataclass(frozen=True)
class TrainingRows:
    """Rows of a run, before they are encoded.

    Args:
        every: all rows that the run uses.
        train: rows to train on.
        evaluation: rows to evaluate on, None if there are none.
        kind: pairs, chosen (one side per row, all chosen), or liked (one side per row, with a column `liked`).
        unused: what the run does not use of the dataset, for its summary. "" for nothing.
        about: what a dataset in another format was taken for. "" for the row schema.
    """

    every: Dataset
    train: Dataset
    evaluation: Dataset | None
    kind: Literal["pairs", "chosen", "liked"] = "pairs"
    unused: str = ""
    about: str = ""

    @property
    def one_sided(self) -> bool:
        """True if rows are encoded one side each."""
        return self.kind != "pairs"

    @property
    def items(self) -> int:
        """Number of training rows, or of couples of a liked and a disliked row."""
        return max(map(len, liked_and_disliked(self.train))) if self.kind == "liked" else len(self.train)

    def describe(self, count: int) -> str:
        """Describe the training rows, of which `count` rows or couples are left after encoding."""
        if self.kind == "liked":
            liked, disliked = (len(part) for part in liked_and_disliked(self.train))
            return f"{count} couples of {liked} liked and {disliked} disliked rows to train on"
        rows = f"{count} rows with a chosen side" if self.kind == "chosen" else f"{count}"
        return f"{rows} to train on{f' ({self.unused})' if self.unused else ''}"


def liked_and_disliked(rows: Dataset) -> tuple[Dataset, Dataset]:
    """Split rows by their column `liked`."""
    liked = np.array(rows["liked"], dtype=bool)
    return rows.select(np.flatnonzero(liked)), rows.select(np.flatnonzero(~liked))


def load_training_rows(config: TrainConfig, *, modality: Modality) -> TrainingRows:
    """Load the rows of a run without its ties, and split off the evaluation rows.

    `sft` uses every row with a chosen side, and of it only that side.

    Raises:
        ValueError: if the dataset is not valid, or does not have the sides that the objective needs.
    """
    local = local_pairs(config.pairs, columns=config.columns, media_dir=config.media_dir)
    loaded = rows_with_sides(open_local(local, config.pairs, modality), config, modality)
    return dataclasses.replace(loaded, about=local.about)


def open_local(local: LocalPairs, name: str, modality: Modality) -> Dataset:
    """Load the rows of a dataset that `local_pairs` returned, with its name for errors."""
    if modality == "text":
        return load_responses(local.require("responses", name), dataset_name=name)
    return load_pairs(local.require("images", name), dataset_name=name)


def rows_with_sides(rows: Dataset, config: TrainConfig, modality: Modality) -> TrainingRows:
    """Return rows with the sides that the objective needs, without ties, and split off the evaluation rows.

    Raises:
        ValueError: if they do not have these sides.
    """
    has_chosen, has_rejected = _sides(rows, modality)
    if modality == "image":
        decided = np.isin(rows["preference"], ("a", "b"))
        rows, has_chosen, has_rejected = drop_ties(rows), has_chosen[decided], has_rejected[decided]
    if is_fine_tuning(config):
        return _chosen_rows(rows, has_chosen, has_rejected, config, modality)
    if (has_chosen & has_rejected).all():
        return TrainingRows(rows, *split_pairs(rows, config))
    _check_one_sided(rows, has_chosen, has_rejected, config)
    rows = rows.add_column("liked", list(has_chosen))  # type: ignore[arg-type]
    return TrainingRows(rows, *_split_liked(rows, config), kind="liked")


def _sides(rows: Dataset, modality: Modality) -> tuple[np.ndarray, np.ndarray]:
    """Return which rows have a chosen and which a rejected side, (rows,) each. No cell is read."""
    names = ("chosen", "rejected") if modality == "text" else ("image_a", "image_b")
    first, second = (rows.data.column(name).is_valid().to_numpy() for name in names)
    if modality == "text":
        return first, second
    b_wins = np.array(rows["preference"]) == "b"
    return np.where(b_wins, second, first), np.where(b_wins, first, second)


def _chosen_rows(
    rows: Dataset, has_chosen: np.ndarray, has_rejected: np.ndarray, config: TrainConfig, modality: Modality
) -> TrainingRows:
    """Rows with a chosen side, for `sft`."""
    if not has_chosen.any():
        raise ValueError(f"{config.pairs}: every row is disliked, and objective sft trains on liked or chosen ones")
    unused = []
    if (has_chosen & has_rejected).any():
        unused.append("the rejected side is not used")
    if not has_chosen.all():
        unused.append(f"{(~has_chosen).sum():,} disliked rows are left out")
        rows = rows.select(np.flatnonzero(has_chosen))
    if modality == "text":
        rows = rows.remove_columns([name for name in REJECTED_COLUMNS if name in rows.column_names])
    return TrainingRows(rows, *split_pairs(rows, config), kind="chosen", unused=", ".join(unused))


def _check_one_sided(rows: Dataset, has_chosen: np.ndarray, has_rejected: np.ndarray, config: TrainConfig) -> None:
    """Raise ValueError unless every row has one side, both kinds exist, and the settings of the run support that."""
    neither, both = ~(has_chosen | has_rejected), has_chosen & has_rejected
    if neither.any() or both.any():
        number = int(np.flatnonzero(neither if neither.any() else ~both)[0])
        missing = [side for side, has in (("chosen", has_chosen), ("rejected", has_rejected)) if not has[number]]
        other = "" if neither.any() else ", which other rows have"
        raise ValueError(
            f"{config.pairs}: row {rows['id'][number]} has no {' and no '.join(missing)} side{other}. Complete the row, or remove it"
        )
    needs_pairs = [name for name in objective_names(config) if name not in (*UNPAIRED, "sft")]
    if needs_pairs:
        images = has_chosen.all() and "image_a" in rows.column_names
        own = ". dpo-mm mine --chosen own makes pairs of captioned images and the model's own" if images else ""
        raise ValueError(
            f"{config.pairs}: its rows have one side each, and objective {needs_pairs[0]} needs pairs. Take sft, or for liked and "
            f"disliked rows {', '.join(UNPAIRED[:-1])} or {UNPAIRED[-1]}{own}"
        )
    if has_chosen.all() or has_rejected.all():
        have, lack = ("liked", "disliked") if has_chosen.all() else ("disliked", "liked")
        fix = "Add some, or take objective sft" if have == "liked" else "Add some"
        raise ValueError(
            f"{config.pairs}: every row is {have}, and objective {objective_names(config)[0]} needs {lack} rows too. {fix}"
        )
    for name in NOT_FOR_LIKED:
        if getattr(config, name) != getattr(TrainConfig, name):
            raise ValueError(f"{config.pairs}: {name} needs pairs, and its rows are liked or disliked. Remove {name}")
    if config.pair_layout == "shared_prefix":
        raise ValueError(
            f"{config.pairs}: pair_layout shared_prefix needs pairs, and its rows are liked or disliked. Remove it"
        )
    if config.beta == AUTO or config.reference == "precomputed":
        name = f"beta {AUTO}" if config.beta == AUTO else "reference precomputed"
        raise ValueError(f"{config.pairs}: {name} needs pairs, and its rows are liked or disliked. Take another value")


def _split_liked(rows: Dataset, config: TrainConfig) -> tuple[Dataset, Dataset | None]:
    """Split liked and disliked rows. Both parts need both kinds."""
    train, evaluation = split_pairs(rows, config)
    if len(set(train["liked"])) < 2:
        raise ValueError(
            f"{config.pairs}: its training rows are all liked or all disliked without the evaluation split. Lower eval_fraction"
        )
    if evaluation is not None and len(set(evaluation["liked"])) < 2:
        message = "its evaluation split has only liked or only disliked rows"
        if config.eval_every:
            raise ValueError(f"{config.pairs}: {message}. Raise eval_fraction, or set eval_every to 0")
        logger.warning("%s: %s, so nothing is evaluated. Raise eval_fraction", config.pairs, message)
        evaluation = None
    return train, evaluation
