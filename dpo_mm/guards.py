"""What stands between a run and harm: steps that aren't numbers, a request to stop, checkpoints that aren't whole."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

IN_A_ROW = 20
"""Steps without a finite gradient after which a run gives up; the first few are normal in fp16."""
COMPLETE = "complete.json"


class FiniteSteps(TrainerCallback):
    """A gradient that isn't finite makes no optimizer step; it is counted, and twenty in a row end the run.

    Gradients are the same on every process by then, and so is the decision.
    """

    def __init__(self) -> None:
        self.skipped, self.in_a_row = 0, 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not gradients or bool(torch.isfinite(torch.stack([_norm(g) for g in gradients])).all()):
            self.in_a_row = 0
            return
        for parameter in model.parameters():
            parameter.grad = None
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        logger.warning("step %d: the gradient is not finite; it is left out", state.global_step + 1)
        if self.in_a_row == IN_A_ROW:
            raise FloatingPointError(
                f"{IN_A_ROW} steps in a row up to step {state.global_step + 1} had no finite gradient; the run is ended. "
                "Lower learning_rate or beta, take precision bf16 or fp32, and look for broken rows"
            )


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient's norm; of all shards where it is one of several (FSDP2)."""
    norm: Any = gradient.float().norm()
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


class Stop(TrainerCallback):
    """Asked to stop (SIGTERM), a run finishes its step, saves and ends; the second time it ends at once."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it SIGTERM asks for a stop. Outside the main thread, where signals can't be had, nothing changes."""

        def ask(number: int, frame: Any) -> None:
            self.asked = True
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

        try:
            before = signal.signal(signal.SIGTERM, ask)
        except ValueError:
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def mark_complete(checkpoint: Path) -> None:
    """Note every file of a checkpoint with its size, so that a part that is missing or cut later shows."""
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()}
    (checkpoint / COMPLETE).write_text(json.dumps(sizes, indent=1))


def what_is_wrong(checkpoint: Path) -> str | None:
    """Why a checkpoint can't be gone on from, or None."""
    try:
        sizes = json.loads((checkpoint / COMPLETE).read_text())
    except (OSError, ValueError):
        return f"{COMPLETE} is missing or broken"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
    return None


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint of a run with all its parts; broken ones are named and passed over.

    Raises ValueError where there are some and none is whole. None where there are none.
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
