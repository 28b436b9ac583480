"""Rows of a run that are given as a `datasets.Dataset`, in the row schema or in a format that `detect_source` knows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_mm.config import TrainConfig
from dpo_mm.data.row_digest import digest
from dpo_mm.data.schema import check_pairs, check_responses
from dpo_mm.files.cache_folder import cache_folder, create_cache
from dpo_mm.files.content_key import content_hash
from dpo_mm.files.resumable import atomic_write
from dpo_mm.policies.protocol import Modality
from dpo_mm.sources.detect import has_own_columns
from dpo_mm.sources.local_pairs import local_pairs
from dpo_mm.training.training_rows import TrainingRows, open_local, rows_with_sides

if TYPE_CHECKING:
    from datasets import Dataset

TRAIN, EVALUATION = "train_dataset", "eval_dataset"
"""Names of the two datasets, as errors name them."""


def check_dataset(rows: object, name: str) -> None:
    """Check the type of a dataset before any work. Raises ValueError."""
    from datasets import Dataset, DatasetDict

    if isinstance(rows, DatasetDict):
        splits = ", ".join(map(str, rows))
        raise ValueError(f"{name} has the splits {splits}. Give one of them: dataset[{next(iter(rows), 'train')!r}]")
    if not isinstance(rows, Dataset):
        given = "missing" if rows is None else f"a {type(rows).__name__}"
        raise ValueError(
            f"{name} is {given}. Expected a Dataset of the package datasets, for example Dataset.from_list(rows)"
        )


def given_training_rows(
    train: Dataset, evaluation: Dataset | None, config: TrainConfig, *, modality: Modality
) -> TrainingRows:
    """Load the rows of a run as `load_training_rows` does, from datasets in memory.

    Args:
        train: rows to train on. Without `evaluation`, `eval_fraction` splits off rows to evaluate on.
        evaluation: rows to evaluate on.
        config: settings of the run.
        modality: of the model.

    Raises:
        ValueError: if a dataset is not valid, or does not have the sides that the objective needs.
    """
    if evaluation is None:
        return _with_sides(train, TRAIN, config, modality)
    whole = dataclasses.replace(config, eval_fraction=0.0, eval_every=0)
    loaded = _with_sides(train, TRAIN, whole, modality)
    apart = _with_sides(evaluation, EVALUATION, whole, modality)
    if apart.kind != loaded.kind:
        raise ValueError(
            f"{EVALUATION} has rows of another kind than {TRAIN} ({apart.kind} and {loaded.kind}). Give the same kind"
        )
    names = [f"eval-{name}" for name in apart.train["id"]]
    rows = apart.train.remove_columns("id").add_column("id", names)  # type: ignore[arg-type]
    return dataclasses.replace(loaded, every=_joined(loaded.train, rows), evaluation=rows)


def _with_sides(rows: Dataset, name: str, config: TrainConfig, modality: Modality) -> TrainingRows:
    config = dataclasses.replace(config, pairs=name)
    if rows._indices is not None:  # shuffle and filter only list numbers of rows, and whole columns are read below
        rows = rows.flatten_indices()
    if has_own_columns(rows.column_names):
        checked = check_responses(rows, name) if modality == "text" else check_pairs(rows, name)
        return rows_with_sides(checked, config, modality)
    local = local_pairs(str(_stored(rows)))
    loaded = rows_with_sides(open_local(local, name, modality), config, modality)
    return dataclasses.replace(loaded, about=local.about)


def _stored(rows: Dataset) -> Path:
    """Write a dataset of another format into the cache, with the bytes of its images, so that it can be imported."""
    from datasets.table import embed_table_storage

    path = cache_folder() / "given" / f"{content_hash([str(rows.features), digest(rows)])}.parquet"
    if not path.exists():
        create_cache(path.parent)
        embedded = rows.with_format("arrow").map(embed_table_storage, batched=True)
        with atomic_write(path) as temporary:
            embedded.with_format(None).to_parquet(str(temporary))
    return path


def _joined(train: Dataset, evaluation: Dataset) -> Dataset:
    from datasets import concatenate_datasets

    try:
        ordered = evaluation.select_columns(train.column_names)
        same = ordered if ordered.features == train.features else ordered.cast(train.features)
        return concatenate_datasets([train, same])
    except Exception as error:  # Arrow raises a different class for each pair of types
        raise ValueError(
            f"{EVALUATION} has other columns than {TRAIN}: {' '.join(str(error).split())[:200]}"
        ) from error
