"""What stands between a run and harm: steps that aren't numbers, and a request to stop."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

IN_A_ROW = 20
"""Steps without a finite gradient after which a run gives up; the first few are normal in fp16."""
NAMED = 8
"""Rows and tensors that a diagnosis names at most."""


class FiniteSteps(TrainerCallback):
    """A gradient that isn't finite makes no optimizer step; it is counted, and twenty in a row end the run.

    Gradients are the same on every process by then, and so is the decision. The diagnosis names this process's rows.
    """

    def __init__(self) -> None:
        self.skipped, self.in_a_row = 0, 0
        self.batches: list[tuple[Sequence[str], Tensor | None, Tensor]] = []
        self.norms: tuple[list[str], Tensor] | None = None

    def saw(self, ids: Sequence[str], timesteps: Tensor | None, losses: Tensor) -> None:
        """A batch of the step that is being made: row ids, timesteps (pairs,) or None, losses (pairs,)."""
        self.batches.append((ids, timesteps, losses.detach()))

    def measure(self, model: nn.Module) -> None:
        """Take the norm of each gradient, before clipping spreads what isn't finite over all of them."""
        named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        norms = torch.stack([_norm(g) for _, g in named]) if named else torch.zeros(0)
        self.norms = [name for name, _ in named], norms

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.norms is None:
            self.measure(model)
        assert self.norms is not None
        finite = bool(torch.isfinite(self.norms[1]).all())
        diagnosis = "" if finite else self.diagnosis()
        self.batches, self.norms = [], None
        if finite:
            self.in_a_row = 0
            return
        for parameter in model.parameters():
            parameter.grad = None
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        logger.warning("step %d is left out: %s", state.global_step + 1, diagnosis)
        if self.in_a_row == IN_A_ROW:
            raise FloatingPointError(
                f"{IN_A_ROW} steps in a row up to step {state.global_step + 1} had no finite gradient; the run is ended. "
                "Lower learning_rate or beta, take precision bf16 or fp32, and look for broken rows. "
                f"The last one: {diagnosis}"
            )

    def diagnosis(self) -> str:
        """Which gradients aren't finite, and which rows have a loss that isn't, or all rows where each has one."""
        assert self.norms is not None
        names, norms = self.norms
        bad = [name for name, ok in zip(names, torch.isfinite(norms).tolist(), strict=True) if not ok]
        good = norms[torch.isfinite(norms)]
        largest = f"largest finite norm {good.max():.3g}" if len(good) else "none is finite"
        rows = [
            (f"{row}{'' if times is None else f' at timestep {times[n]:g}'} (loss {float(losses[n]):.4g})", losses[n])
            for ids, times, losses in self.batches
            for n, row in enumerate(ids)
        ]
        broken = [text for text, loss in rows if not torch.isfinite(loss)]
        shown = broken or [text for text, _ in rows]
        return (
            f"the gradient is not finite in {len(bad)} of {len(names)} tensors, first {bad[0]} ({largest}); "
            f"{'rows' if broken else 'every loss is finite, rows'} {', '.join(shown[:NAMED])}"
            f"{f' and {len(shown) - NAMED} more' if len(shown) > NAMED else ''}"
        )


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient's norm; of all shards where it is one of several (FSDP2)."""
    norm: Any = gradient.float().norm()
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


class Stop(TrainerCallback):
    """Asked to stop (SIGTERM), a run finishes its step, saves and ends; the second time it ends at once.

    Of several processes all stop after the same step, whichever was asked, since a save waits for all.
    """

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            asked = torch.tensor(float(self.asked), device=args.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self.asked = bool(asked)
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
