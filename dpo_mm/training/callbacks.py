"""Trainer callbacks: skip non-finite steps, stop on request, warn of drift, update the reference, show progress."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from dpo_mm.printing.progress import Advance
from dpo_mm.process.interruption import StopRequest
from dpo_mm.training.reference import TrackingReference

logger = logging.getLogger(__name__)

MAX_CONSECUTIVE_SKIPS = 20
"""Consecutive steps without a finite gradient that end a run. The first few are normal in fp16."""
NAMED = 8
"""Largest number of rows and tensors that a diagnosis names."""


class SkipNonFiniteStepsCallback(TrainerCallback):
    """Skip an optimizer step whose gradient is not finite, count it, and end the run after twenty in a row.

    Gradients are equal on all processes at this point, and so is the decision. The diagnosis names the rows of this process.
    """

    def __init__(self) -> None:
        self.skipped, self.consecutive_skips = 0, 0
        self.attempted, self.skipped_last = 0, False
        self.batches: list[tuple[Sequence[str], Tensor | None, Tensor]] = []
        self.norms: tuple[list[str], Tensor] | None = None

    def record_batch(self, ids: Sequence[str], timesteps: Tensor | None, losses: Tensor) -> None:
        """Record a batch of the current step: row ids, timesteps (pairs,) or None, losses (pairs,)."""
        self.batches.append((ids, timesteps, losses.detach()))

    def measure(self, model: nn.Module) -> None:
        """Take the norm of each gradient before clipping, which spreads non-finite values over all of them."""
        named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        norms = torch.stack([_norm(g) for _, g in named]) if named else torch.zeros(0)
        self.norms = [name for name, _ in named], norms

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.norms is None:
            self.measure(model)
        assert self.norms is not None
        finite = bool(torch.isfinite(self.norms[1]).all())
        self.attempted, self.skipped_last = self.attempted + 1, not finite
        diagnosis = "" if finite else self.diagnosis()
        self.batches, self.norms = [], None
        if finite:
            self.consecutive_skips = 0
            return
        for parameter in model.parameters():
            parameter.grad = None
        self.skipped, self.consecutive_skips = self.skipped + 1, self.consecutive_skips + 1
        logger.warning("step %d is left out: %s", state.global_step + 1, diagnosis)
        if self.consecutive_skips == MAX_CONSECUTIVE_SKIPS:
            raise FloatingPointError(
                f"{MAX_CONSECUTIVE_SKIPS} steps in a row up to step {state.global_step + 1} had no finite gradient; the run is ended. "
                "Lower learning_rate or beta, take precision bf16 or fp32, and look for broken rows. "
                f"The last one: {diagnosis}"
            )

    def diagnosis(self) -> str:
        """Name the gradients that are not finite and the rows whose loss is not, or all rows if every loss is finite."""
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
    """Norm of a gradient, over all shards if it is one of several (FSDP2)."""
    norm: Any = gradient.float().norm()
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


class GracefulStopCallback(TrainerCallback):
    """End a run after the current step, with a checkpoint, if a stop is requested.

    All processes stop after the same step, whichever received the request, because saving needs all of them.
    """

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            number = torch.tensor(float(self.stop.number), device=args.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self.stop.number = int(number)
        if self.stop.requested:
            control.should_save = control.should_training_stop = True


class ProgressBarCallback(TrainerCallback):
    """Advance a progress bar by one per step, and show the last loss, accuracy, learning rate and, on a GPU, peak memory."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.advance(0, bar_title(logs))


def bar_title(logs: Mapping[str, float]) -> str:
    """Write an entry of the log as the title of the progress bar."""
    parts = [f"loss {logs['loss']:.3f}"]
    if "rewards/accuracies" in logs:
        parts.append(f"acc {logs['rewards/accuracies']:.2f}")
    if "learning_rate" in logs:
        parts.append(f"lr {logs['learning_rate']:.1e}")
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    return ", ".join(parts)


class UpdateReferenceCallback(TrainerCallback):
    """Update a tracking reference after each step that was taken."""

    def __init__(self, reference: TrackingReference, skips: SkipNonFiniteStepsCallback) -> None:
        self.reference, self.skips = reference, skips

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.skips.skipped_last or self.reference.decay == 0:  # a copy of the policy adds nothing up
            self.reference.update(state.global_step)


class RestoreRewardsCallback(TrainerCallback):
    """Undo what a skipped step added to BCO's running mean of the rewards, which one bad batch would make NaN for good."""

    def __init__(self, run_state: dict[str, Any], skips: SkipNonFiniteStepsCallback) -> None:
        self.run_state, self.skips = run_state, skips
        self.before: dict[str, float] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = dict(self.run_state["rewards"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.skips.skipped_last:
            self.run_state["rewards"] = self.before


WINDOW = 10
"""Number of logs that are averaged."""


DISPLACED = -1.0
"""Implicit reward of the chosen side, beta * log-ratio, below which a text run is warned."""


DRIFTED = 1.1
"""Denoising error of the chosen side relative to the reference's, above which an image run is warned."""


class _ThresholdWarning(TrainerCallback):
    """Log `advice` once, if the mean of a metric over the last WINDOW logs passes `limit`."""

    name: str
    limit: float
    above: bool
    advice: str

    def __init__(self) -> None:
        self.seen: deque[float] = deque(maxlen=WINDOW)
        self.warned = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.warned or not logs or self.name not in logs:
            return
        self.seen.append(logs[self.name])
        mean = sum(self.seen) / len(self.seen)
        if len(self.seen) == WINDOW and (mean > self.limit if self.above else mean < self.limit):
            self.warned = True
            logger.warning("step %d: %s", state.global_step, self.advice.format(mean=mean, window=WINDOW))


class ChosenLikelihoodWarning(_ThresholdWarning):
    """Warning for text: the chosen response itself becomes unlikely. Source: Razin et al. 2024 (2410.08847); Pal et al. 2402.13228."""

    name, limit, above = "rewards/chosen", DISPLACED, False
    advice = (
        "chosen responses are less likely than under the reference (implicit reward {mean:.2f} over the last {window} logs). "
        "Set sft_weight: 1, or take objective dpop, a higher beta or fewer steps"
    )


class ChosenErrorWarning(_ThresholdWarning):
    """Warning for images: the denoising error of the chosen image rises. Source: Diffusion-SDPO (2511.03317), section 3."""

    name, limit, above = "errors/chosen", DRIFTED, True
    advice = (
        "the denoising error of chosen images is {mean:.2f} times the reference's over the last {window} logs. Look at "
        "images, not at the loss. If they get worse: objective sdpo, a higher beta, a lower learning_rate or fewer steps"
    )
