"""`compile: true`: torch.compile for the repeated blocks of a model, in place, as long as a run lasts.

Compiling a block once serves all its copies, which takes seconds where a whole model takes minutes. A language model is compiled by
layer, a denoiser by the blocks that diffusers names, or as a whole if it names none. Around the blocks nothing is compiled: packing
of a shared prefix, noise, heads and losses. Weights have the same names, so files and checkpoints do not change.

Before the first step, one batch runs forward and backward. If that fails, for example without a C++ compiler, the run continues
without compiling.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dpo_mm.config import TrainConfig
from dpo_mm.data.load_pairs import UndecodableImageError
from dpo_mm.policies.protocol import Batch, Policy
from dpo_mm.policies.vlm.shared_prefix import unwrap
from dpo_mm.training.half_precision import autocast
from dpo_mm.training.pair_stream import PairStream

logger = logging.getLogger(__name__)

BACKEND = "inductor"
RECOMPILE_LIMIT = 64
"""Largest number of versions of a block: by shape, with and without adapter or gradient. Above it, a block runs uncompiled."""


@contextlib.contextmanager
def compiled(policy: Policy, config: TrainConfig, stream: PairStream) -> Iterator[dict[str, str]]:
    """Context manager in which a policy's blocks are compiled, if the config says so.

    Args:
        policy: the prepared policy, on its device.
        config: settings of the run.
        stream: rows, of which the first batch is tried.

    Yields:
        The plan's line, by its name. It says why if nothing is compiled.
    """
    if not config.compile:
        yield {}
        return
    import torch._dynamo

    blocks = blocks_of(policy, policy.model)
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        try:
            yield {"compile": _try(policy, config, _first_batch(policy, config, stream))}
        finally:
            _remove(blocks)


def blocks_of(policy: Policy, model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a policy's model, or of a copy of it, that are compiled: the model itself if no block is known."""
    if policy.modality == "text":
        layers = getattr(unwrap(model).get_decoder(), "layers", None)
        return list(layers) if layers is not None else [unwrap(model).get_decoder()]
    names: Any = getattr(model, "_repeated_blocks", None) or ()
    return [block for block in model.modules() if type(block).__name__ in names] or [model]


def compile_blocks(policy: Policy, model: nn.Module, config: TrainConfig) -> int:
    """Compile the blocks of a model in place, when they are called next. Returns their number."""
    # Square images have one shape. Lengths of text and buckets vary, so their dimensions become symbols at the second shape.
    varies = policy.modality == "text" or config.buckets
    blocks = blocks_of(policy, model)
    for block in blocks:
        block.compile(backend=BACKEND, dynamic=None if varies else False)
    return len(blocks)


def is_compiled(policy: Policy) -> bool:
    """True if the policy's blocks are compiled."""
    return any(block._compiled_call_impl is not None for block in blocks_of(policy, policy.model))


def _remove(blocks: list[nn.Module]) -> None:
    for block in blocks:
        block._compiled_call_impl = None


def _first_batch(policy: Policy, config: TrainConfig, stream: PairStream) -> Batch:
    """Make a batch of the first rows whose images decode."""
    from accelerate.utils import send_to_device

    rows: list[dict[str, Any]] = []
    for number in range(len(stream)):
        with contextlib.suppress(UndecodableImageError):
            rows.append(stream[number])
        if len(rows) == config.batch_size:
            break
    batch: Batch = send_to_device(policy.collate(rows), next(policy.model.parameters()).device)
    return batch


def _try(policy: Policy, config: TrainConfig, batch: Batch) -> str:
    """Compile the policy's blocks and run a batch through them, or leave them uncompiled. Returns the plan's line."""
    model, was_training = policy.model, policy.model.training
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        policy.log_probs(model, batch)  # checks that a policy makes on its first batch
    try:
        number = compile_blocks(policy, model, config)
        model.train()
        with autocast(config, next(model.parameters()).device.type):
            if config.tuning == "lora":
                with torch.no_grad(), policy.adapter_off():
                    policy.log_probs(model, batch)
            log_probs = policy.log_probs(model, batch)
            (log_probs.chosen.sum() - log_probs.rejected.sum()).backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # any error of a compiler is a reason, because the model runs without it
        reason = " ".join(str(error).split("\n\n")[0].split())[:200]
        logger.warning("compile: torch.compile failed, and the run continues without it (%s)", reason)
        _remove(blocks_of(policy, model))
        return "off, because torch.compile failed"
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
    names = sorted({type(block).__name__ for block in blocks_of(policy, model)})
    return f"{number} {' and '.join(names)}"
