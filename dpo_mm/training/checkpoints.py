"""Checkpoints: write them completely or not at all, find the latest complete one, and check that the recipe is the same."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpo_mm.checksums import COMPLETE, remove_unchanged_files, what_is_wrong
from dpo_mm.config import TrainConfig, as_dict

logger = logging.getLogger(__name__)

CONFIG_FILE = "dpo_mm.json"
STATE = ("rewards", "measured_beta", "content", "pairs_per_step")
"""Entries of a checkpoint's CONFIG_FILE in addition to the config."""
FREE_TO_CHANGE = {
    "output_dir",
    "resume",
    "steps",
    "save_every",
    "eval_every",
    "log_every",
    "save_total_limit",
    "workers",
    "batch_size",
    "accumulate",
}
"""Settings that may change in a resumed run. The product of the last two and the number of processes must stay the same."""


@contextmanager
def explain_disk_full(place: Path) -> Iterator[None]:
    """Context manager that turns every error of a full disk into one OSError with the path and the fix.

    torch and safetensors report a full disk by errors of their own.
    """
    try:
        yield
    except OSError as error:
        raise _unwritten(place, error.strerror or str(error), error.errno or errno.EIO) from error
    except Exception as error:
        if "inline_container" in str(error):
            raise _unwritten(place, "torch could not write all of it, the disk is full or broken") from error
        if type(error).__name__ == "SafetensorError":
            raise _unwritten(place, str(error)) from error
        raise


def _unwritten(place: Path, reason: str, number: int = errno.EIO) -> OSError:
    return OSError(
        number, f"could not write {place}: {reason}. Earlier checkpoints are unchanged: free space, then --resume"
    )


def move_into_place(aside: Path, folder: Path) -> None:
    """Move each part of a temporary folder into the final folder, in place of the part with that name.

    The checksums go first and come last, so that an interruption leaves none that do not fit.
    """
    parts = sorted(aside.iterdir(), key=lambda part: part.name == COMPLETE)
    remove_unchanged_files(folder, replaced={part.name for part in parts})  # of an earlier run
    for part in parts:
        if (folder / part.name).is_dir():
            shutil.rmtree(folder / part.name)
        os.replace(part, folder / part.name)


def latest_complete_checkpoint(folder: Path) -> Path | None:
    """Return the latest checkpoint of a run that has all its parts. Incomplete ones are logged and skipped.

    Returns:
        The checkpoint's folder, or None if there are no checkpoints.

    Raises:
        ValueError: if there are checkpoints and none is complete.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    reasons = []
    for checkpoint in found:
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
    before, settings = json.loads((checkpoint / CONFIG_FILE).read_text()), json.loads(json.dumps(as_dict(config)))
    changed = [
        f"{k}: {before.get(k)!r} -> {v!r}"
        for k, v in {**settings, "pairs_per_step": pairs_per_step}.items()
        if k not in FREE_TO_CHANGE and before.get(k) != v
    ]
    step = int(checkpoint.name.rpartition("-")[2])
    if step > config.steps:
        raise ValueError(f"steps is {config.steps}, but {checkpoint} is after step {step}. Increase steps")
    if before.get("steps") != config.steps and not config.schedule.startswith("constant"):
        logger.warning(
            "schedule %s depends on steps, which were %s. From step %d on, the learning rate is that of %d steps",
            config.schedule, before.get("steps"), step + 1, config.steps,
        )  # fmt: skip
    if changed:
        raise ValueError(
            f"{checkpoint} was made by another recipe ({'; '.join(changed)}); undo that, or choose another output_dir"
        )
    return {name: before.get(name) for name in STATE}


def check_same_content(
    checkpoint: Path, before: Mapping[str, str] | None, content: Mapping[str, str], config: TrainConfig
) -> None:
    """Check that what a run is made of is what it was made of before.

    Args:
        checkpoint: folder, for the error.
        before: ingredients of a training run (`dpo_mm.content_key`) by name, from the checkpoint.
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
                "libraries": f"the version of a library ({old} -> {value})",
                "pairs": config.pairs,
                "encoded rows": f"what the chat template or the tokenizer makes of {config.pairs} (a template may print today's date)",
            }
            raise ValueError(
                f"{what[name]} has changed since {checkpoint} was made. Restore it, or choose another output_dir"
            )
