"""Checkpoints: write them completely or not at all, find the latest complete one, and check that the recipe is the same."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from dpo_mm.config import TrainConfig, as_dict, default_settings
from dpo_mm.files.checksums import COMPLETE, complete_files, remove_unchanged_files, what_is_wrong
from dpo_mm.files.resumable import explain_unwritten, set_aside
from dpo_mm.training.samples import free_sample_settings
from dpo_mm.training.tracking import TRACKING_SETTINGS

logger = logging.getLogger(__name__)

CONFIG_FILE, LOG_FILE = "dpo_mm.json", "training_log.json"
"""Settings of a run, and its summary and log."""
STATE = ("rewards", "measured_beta", "content", "pairs_per_step", "dropped_rows")
"""Entries of a checkpoint's CONFIG_FILE in addition to the config."""
FREE_TO_CHANGE = {
    "output_dir",
    "resume",
    "overwrite",
    "steps",
    "num_train_epochs",
    "save_every",
    "eval_every",
    "log_every",
    "save_total_limit",
    "workers",
    *TRACKING_SETTINGS,
    "batch_size",
    "accumulate",
}
"""Settings that may change in a resumed run. The product of the last two and the number of processes must stay the same."""


def explain_disk_full(place: Path) -> AbstractContextManager[None]:
    """Context manager that turns every error of a full disk into one OSError with the path and the fix."""
    return explain_unwritten(
        place, fix="Earlier checkpoints are unchanged: free space, then run the same command again"
    )


def move_into_place(aside: Path, folder: Path) -> None:
    """Move each part of a temporary folder into the final folder, in place of an earlier result.

    The checksums go first and come last, so that an interruption leaves none that do not fit. A model card with changes stays.
    Another file in the way, which is not of the earlier result, is renamed.
    """
    remove_unchanged_files(folder)
    for part in sorted(aside.iterdir(), key=lambda part: part.name == COMPLETE):
        target = folder / part.name
        if part.suffix == ".md" and target.is_file():
            logger.warning("%s has changes and is not replaced", target)
            part.unlink()
            continue
        if part.name != CONFIG_FILE:  # of this run, since its start
            set_aside(target)
        os.replace(part, target)


def remove_old_checkpoints(folder: Path, *, limit: int) -> None:
    """Remove the oldest complete checkpoints of a run, down to a limit.

    Files that a checkpoint does not list, or that changed after it was complete, stay. Their times tell, because hashing a
    checkpoint takes as long as reading it.
    """
    for checkpoint in newest_first(folder)[limit:]:
        remove_checkpoint(checkpoint)


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove the files of a checkpoint that it lists and that have not changed since it was complete, then its folder."""
    files = complete_files(checkpoint)
    if not files:
        return
    written = (checkpoint / COMPLETE).stat().st_mtime_ns
    for name in files:
        path = checkpoint / name
        if path.is_file() and path.stat().st_mtime_ns <= written:
            path.unlink()
    (checkpoint / COMPLETE).unlink()
    for part in sorted((path for path in checkpoint.rglob("*") if path.is_dir()), reverse=True):
        _remove_if_empty(part)
    _remove_if_empty(checkpoint)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def newest_first(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, complete or not, the latest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def latest_complete_checkpoint(folder: Path) -> Path | None:
    """Return the latest checkpoint of a run that has all its parts. Incomplete ones are logged and skipped.

    Returns:
        The checkpoint's folder, or None if there are no checkpoints.

    Raises:
        ValueError: if there are checkpoints and none is complete.
    """
    reasons = []
    for checkpoint in newest_first(folder):
        reason = what_is_wrong(checkpoint)
        if reason is None:
            return checkpoint
        reasons.append(f"{checkpoint}: {reason}")
        logger.warning("%s: %s; taking the one before", checkpoint, reason)
    if reasons:
        raise ValueError(f"no checkpoint is whole ({'; '.join(reasons)}); remove them and train again from the start")
    return None


def check_same_recipe(checkpoint: Path, config: TrainConfig, *, pairs_per_step: int) -> dict[str, Any]:
    """Return the run state (STATE) of a checkpoint, if the config resumes the same recipe.

    Raises:
        ValueError: if a setting outside FREE_TO_CHANGE, or the number of pairs per step, has changed. It names the change.
    """
    saved = json.loads((checkpoint / CONFIG_FILE).read_text(encoding="utf-8"))
    before = {**default_settings(TrainConfig), **saved}
    settings = json.loads(json.dumps(as_dict(config)))
    changed = [
        f"{k}: {before.get(k)!r} -> {v!r}"
        for k, v in {**settings, "pairs_per_step": pairs_per_step}.items()
        if k not in FREE_TO_CHANGE | set(free_sample_settings(config)) and before.get(k) != v
    ]
    if changed:
        raise ValueError(
            f"{checkpoint} was made by another recipe ({'; '.join(changed)}); undo that, or choose another output_dir"
        )
    return {name: before.get(name) for name in STATE}


def check_steps(checkpoint: Path, config: TrainConfig) -> None:
    """Check that a checkpoint is not after the last step, and warn if the learning rate follows another number of steps.

    Args:
        checkpoint: folder.
        config: settings of the run, with the steps of its epochs.

    Raises:
        ValueError: if the checkpoint is after the last step.
    """
    before = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["max_steps"]
    step = int(checkpoint.name.rpartition("-")[2])
    if step > config.steps:
        epochs = f"num_train_epochs is {config.num_train_epochs} and " if config.num_train_epochs is not None else ""
        raise ValueError(
            f"{epochs}steps is {config.steps}, but {checkpoint} is after step {step}. "
            f"Increase {'num_train_epochs' if epochs else 'steps'}"
        )
    if before != config.steps and not config.schedule.startswith("constant"):
        logger.warning(
            "schedule %s depends on steps, which were %s. From step %d on, the learning rate is that of %d steps",
            config.schedule, before, step + 1, config.steps,
        )  # fmt: skip


def check_same_content(
    checkpoint: Path, before: Mapping[str, str] | None, content: Mapping[str, str], config: TrainConfig
) -> None:
    """Check that what a run is made of is what it was made of before.

    Args:
        checkpoint: folder, for the error.
        before: ingredients of a training run (`dpo_mm.files.content_key`) by name, from the checkpoint.
        content: those of this run, possibly not all of them.
        config: settings of this run, for the error.

    Raises:
        ValueError: if one has changed. It names it.
    """
    for name, value in content.items():
        old = (before or {}).get(name)
        if old != value:
            what = {
                "model": f"a file of model {config.model}",
                "adapter": f"a file of adapter {config.adapter}",
                "libraries": f"the version of a library ({old} -> {value})",
                "pairs": config.pairs,
                "encoded rows": f"what the chat template or the tokenizer makes of {config.pairs} (a template may print today's date)",
            }
            raise ValueError(
                f"{what[name]} has changed since {checkpoint} was made. Restore it, or choose another output_dir"
            )
