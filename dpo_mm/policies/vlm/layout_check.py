"""Check that a model computes the same log-probs with a shared prefix as with separate sequences."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpo_mm.policies.vlm.prefix_layout import Layout
from dpo_mm.policies.vlm.shared_prefix import unwrap
from dpo_mm.policies.vlm.varlen import HALF

TOLERANCE = {"float32": 1e-4, "TF32": 1e-4, "half": 1e-3}
"""Difference between both layouts that always counts as rounding, relative to a completion's log-prob."""
ROUNDING_FACTOR = 4
"""How many times the rounding of separate sequences both layouts may differ, if the arithmetic is not float32."""
LEAK = 1e-5
"""Largest change of rejected in float32 when chosen is replaced, relative to its log-prob."""


def is_sharded(base_model: Any) -> bool:
    """Return True if FSDP shards the weights. It then controls the arithmetic, which is often half precision."""
    return any(type(parameter).__name__ == "DTensor" for parameter in base_model.parameters())


def precision(base_model: Any) -> str:
    """Return the arithmetic of the check, without autocast: float32, TF32 or half."""
    device = base_model.device.type
    if base_model.dtype in HALF or is_sharded(base_model):
        return "half"
    return "TF32" if device == "cuda" and has_tf32_products() else "float32"


def has_tf32_products() -> bool:
    """Return True if float32 matrix products on CUDA are rounded to TF32.

    From torch 2.9 there is a new setting. If it was used, reading the old one is an error.
    """
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(torch.backends.cudnn, "conv") else matmul.allow_tf32


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Context manager without dropout. It restores each module's mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def unwrapped_eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Context manager that yields the model without dropout, gradient, autocast and wrappers.

    Sharded weights need their wrapper, so it stays.
    """
    base_model = unwrap(model)
    evaluated, mixed_forward = model if is_sharded(base_model) else base_model, vars(base_model).get("forward")
    if "_original_forward" in vars(base_model):  # accelerate's, under its own autocast
        base_model.forward = base_model._original_forward
    try:
        with eval_mode(evaluated), torch.no_grad(), torch.autocast(base_model.device.type, enabled=False):
            yield evaluated
    finally:
        if mixed_forward is not None:
            base_model.forward = mixed_forward


LogProbFunction = Callable[[dict[str, Any]], Tensor]
"""Function from a batch to the log-probs of its completions' tokens."""


@dataclass(frozen=True)
class Separate:
    """Separate sequences on a batch, which a shared prefix is compared with.

    Attributes:
        log_probs: token log-probs, nats, (pairs, columns of chosen and rejected).
        limit: difference that counts as rounding, relative to a completion's log-prob.
        leak: change of rejected that counts as noise when chosen is replaced, relative to its log-prob.
        is_float32: True if nothing is measured, because rounding is known.
    """

    log_probs: Tensor
    limit: float
    leak: float
    is_float32: bool


def measure_separate(
    compute: LogProbFunction, variants: Sequence[LogProbFunction], batch: dict[str, Any], base_model: Any
) -> Separate:
    """Compute the log-probs of separate sequences, and measure their rounding unless the arithmetic is float32.

    Rounding is how far they move if the same is computed in another order. Noise is how far rejected moves with another
    text as chosen, which is in another sequence: not at all, except through experts or scales that a batch shares.

    Args:
        compute: computes the log-probs.
        variants: compute the same in another order, such as padding on the left.
        batch: from `pair_batches.collate`.
        base_model: a transformers model without wrappers.
    """
    arithmetic = precision(base_model)
    log_probs = compute(batch)
    if arithmetic == "float32":
        return Separate(log_probs, TOLERANCE[arithmetic], LEAK, is_float32=True)
    rounding = [0.0]
    for other in variants:
        with contextlib.suppress(RuntimeError, ValueError):  # such as one that takes too much memory
            rounding.append(_relative_difference_of_sides(other(batch), log_probs, batch["layout"]))
    limit = max(TOLERANCE[arithmetic], ROUNDING_FACTOR * max(rounding))
    noise = 2 * _change_of_rejected(compute, batch, log_probs, base_model.config)
    return Separate(log_probs, limit, noise, is_float32=False)


def why_not_shared(shared: LogProbFunction, batch: dict[str, Any], separate: Separate, config: Any) -> str | None:
    """Reason against a shared prefix, or None if it computes the log-probs of separate sequences.

    Args:
        shared: computes the log-probs with a shared prefix.
        batch: from `pair_batches.collate`.
        separate: the log-probs of separate sequences.
        config: the model's config.
    """
    # All passes always run, because each process of a sharded model has to take part in them.
    log_probs = shared(batch)
    leak, noise = _change_of_rejected(shared, batch, log_probs, config), separate.leak
    if not separate.is_float32:
        noise = max(noise, 2 * _relative_difference_of_sides(shared(batch), log_probs, batch["layout"]))
    difference = _relative_difference_of_sides(log_probs, separate.log_probs, batch["layout"])
    if not difference <= separate.limit:
        return f"differs from separate sequences by {difference:.1e} (allowed {separate.limit:.1e})"
    if not leak <= noise:
        return f"lets rejected see chosen: it moves by {leak:.1e} with another chosen (allowed {noise:.1e})"
    return None


def _relative_difference_of_sides(log_probs: Tensor, expected: Tensor, layout: Layout) -> float:
    sides = (slice(layout.chosen), slice(layout.chosen, None))[: 2 if layout.rejected else 1]
    return max(relative_difference(log_probs[:, side], expected[:, side]) for side in sides)


def _change_of_rejected(compute: LogProbFunction, batch: dict[str, Any], log_probs: Tensor, config: Any) -> float:
    """Distance that rejected moves if chosen is replaced by another text, relative to its log-prob."""
    layout: Layout = batch["layout"]
    if not layout.rejected:
        return 0.0
    swapped = compute({**batch, "ids": _replace_chosen(batch["ids"], layout, config)})
    return relative_difference(swapped[:, layout.chosen :], log_probs[:, layout.chosen :])


def _replace_chosen(ids: Tensor, layout: Layout, config: Any) -> Tensor:
    """Ids of the same rows with another text as chosen, without image tokens."""
    special = {
        value for name, value in config.to_dict().items() if name.endswith("_token_id") and isinstance(value, int)
    }
    text_tokens = [token for token in range(config.get_text_config().vocab_size) if token not in special][:2]
    ids = ids.clone()
    chosen = ids[:, layout.prompt : layout.rejected_start]
    chosen.copy_(torch.where(chosen == text_tokens[0], text_tokens[1], text_tokens[0]))
    return ids


def relative_difference(log_probs: Tensor, expected: Tensor) -> float:
    """Largest difference of the completions' log-probs, relative to the expected ones."""
    log_probs, expected = log_probs.sum(1), expected.sum(1)
    if not bool(torch.isfinite(log_probs).all()):
        return float("inf")
    return float(((log_probs - expected).abs() / expected.abs().clamp(min=1)).max())
