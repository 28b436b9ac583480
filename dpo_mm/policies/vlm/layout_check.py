"""Check that a model computes the same log-probs with a shared prefix as with separate sequences."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dpo_mm.policies.vlm.prefix_layout import Layout
from dpo_mm.policies.vlm.shared_prefix import unwrap

TOLERANCE = {"float32": 1e-4, "TF32": 5e-3, "half": 2e-2}
"""Largest difference between both layouts that counts as rounding, relative to a completion's log-prob."""


def is_sharded(base_model: Any) -> bool:
    """Return True if FSDP shards the weights. It then controls the arithmetic, which is often half precision."""
    return any(type(parameter).__name__ == "DTensor" for parameter in base_model.parameters())


def precision(base_model: Any) -> str:
    """Return the arithmetic of the check, without autocast: float32, TF32 or half."""
    device = base_model.device.type
    if base_model.dtype in (torch.bfloat16, torch.float16) or is_sharded(base_model):
        return "half"
    return "TF32" if device == "cuda" and torch.get_float32_matmul_precision() != "highest" else "float32"


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


def disagreement(
    shared: Callable[[dict[str, Any]], Tensor], batch: dict[str, Any], separate: Tensor, config: Any
) -> float:
    """Measure how far a shared prefix is from separate sequences, relative to a completion's log-prob.

    Args:
        shared: function from a batch to token log-probs with a shared prefix.
        batch: from `pair_batches.collate`.
        separate: token log-probs of the batch from separate sequences.
        config: the model's config.

    Returns:
        The largest relative difference, infinite if a log-prob is not finite. If it is larger: ten times the change of
        rejected when chosen is replaced by another text, which must be 0.
    """
    layout: Layout = batch["layout"]
    chosen, rejected = slice(layout.chosen), slice(layout.chosen, None)
    log_probs = shared(batch)
    after_swap = shared({**batch, "ids": _replace_chosen(batch["ids"], layout, config)})
    leak = relative_difference(after_swap[:, rejected], log_probs[:, rejected])
    return max(10 * leak, *(relative_difference(log_probs[:, side], separate[:, side]) for side in (chosen, rejected)))


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
