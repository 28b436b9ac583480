"""The log-prob of each completion token of a pair, by the shared prefix where that is exact, else by plain sequences.

The output head runs on the completions alone, in chunks that are recomputed in the backward pass, so that the logits of
a whole sequence are never in memory. Before the first answer of a run both ways are asked about the first batch: a
model for which they differ is asked the plain way from then on, and a warning says so once.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpo_mm.objectives import sdpo_lambda_text
from dpo_mm.policies.vlm.shared_prefix import (
    Layout,
    install,
    plain_inputs,
    repeat_for_both,
    shared_inputs,
    unwrap,
    use_layout,
)

logger = logging.getLogger(__name__)

HEAD_ELEMENTS = 2**24
"""Logits in memory at once, 64 MiB in float32."""
TOLERANCE = {"float32": 1e-4, "TF32": 5e-3, "half": 2e-2}
"""Largest difference of shared and plain that is rounding, relative to a completion's log-prob."""


class TokenLogProbs:
    """Asks a model for the log-prob of each completion token.

    name: the model's, for messages. layout: "shared_prefix", "separate", or "auto" to find out at the first batch.
    Raises ValueError for another layout.
    """

    def __init__(self, name: str, *, layout: str = "auto") -> None:
        if layout not in ("auto", "shared_prefix", "separate"):
            raise ValueError(f"pair_layout {layout!r} is unknown; expected auto, shared_prefix or separate")
        self.name, self.layout, self.head = name, layout, "raw"
        self.checked = False

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """log p, nats, 0 at padding, (pairs, columns of chosen and rejected), float32. Raises ValueError as `check`."""
        if not self.checked:
            self.check(model, batch)
        scores = shared_prefix_log_probs if self.layout == "shared_prefix" else separate_log_probs
        return scores(model, batch, head=self.head)

    def check(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """Decide how to ask, on this batch. Raises ValueError where the model can't be asked even the plain way."""
        with plainly_evaluating(model) as model:
            truth = self._reference_log_probs_unshared(model, batch)
            reason = None if self.layout == "separate" else self._why_not_shared(model, batch, truth)
        if self.layout == "shared_prefix" and reason:
            raise ValueError(f"layout 'shared' is not exact for {self.name}: {reason}; take 'auto'")
        if reason:
            logger.warning(
                "%s: %s; chosen and rejected are asked as two plain sequences, slower and exact", self.name, reason
            )
        self.layout, self.checked = "separate" if reason or self.layout == "separate" else "shared_prefix", True

    def _reference_log_probs_unshared(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        if "pixel_values" in batch["images"]:
            batch = {name: value for name, value in batch.items() if name != "features"}
        try:
            self.head = head_of(model, batch)
            if self.head == "own":
                logger.warning("%s changes what its head gives in its own way; its logits are kept whole", self.name)
            return separate_log_probs(model, batch, head=self.head)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{self.name} can't be asked for log-probs: {error}") from error

    def _why_not_shared(self, model: nn.Module, batch: dict[str, Any], truth: Tensor) -> str | None:
        """Why the shared prefix can't be used, or None."""
        core = unwrap(model)
        before = core.config.get_text_config()._attn_implementation
        try:
            install(core)
            far = disagreement(lambda b: shared_prefix_log_probs(model, b, head=self.head), batch, truth, core.config)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model does, the plain way is there
            reason: str | None = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        else:
            limit = TOLERANCE[precision(core)]
            reason = (
                None
                if far <= limit
                else f"a shared prefix differs from plain sequences by {far:.1e} (allowed {limit:g})"
            )
        if reason and core.config.get_text_config()._attn_implementation != before:
            core.set_attn_implementation(before)
        return reason


def sharded(core: Any) -> bool:
    """Whether FSDP holds the weights in pieces; the arithmetic is then its own, and often half."""
    return any(type(parameter).__name__ == "DTensor" for parameter in core.parameters())


def precision(core: Any) -> str:
    """What arithmetic the check is done in, where autocast is off: float32, TF32 or half."""
    device = core.device.type
    if core.dtype in (torch.bfloat16, torch.float16) or sharded(core):
        return "half"
    return "TF32" if device == "cuda" and torch.get_float32_matmul_precision() != "highest" else "float32"


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it no dropout; each module's mode comes back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def plainly_evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model without dropout, gradient, autocast and wrappers, but for sharded weights, which need theirs."""
    core = unwrap(model)
    asked, mixed = model if sharded(core) else core, vars(core).get("forward")
    if "_original_forward" in vars(core):  # accelerate's, under its own autocast
        core.forward = core._original_forward
    try:
        with evaluating(asked), torch.no_grad(), torch.autocast(core.device.type, enabled=False):
            yield asked
    finally:
        if mixed is not None:
            core.forward = mixed


def disagreement(
    shared: Callable[[dict[str, Any]], Tensor], batch: dict[str, Any], truth: Tensor, config: Any
) -> float:
    """How far shared(batch) is from the plain answer, relative to a completion's log-prob; infinite where it isn't one.

    Or, where that is more, ten times how far rejected moves when chosen is another text, which it never should.
    """
    layout: Layout = batch["layout"]
    found, rejected = shared(batch), slice(layout.chosen, None)
    moved = shared({**batch, "ids": _other_chosen(batch["ids"], layout, config)})
    leak = _apart_by(moved[:, rejected], found[:, rejected])
    return max(10 * leak, *(_apart_by(found[:, side], truth[:, side]) for side in (slice(layout.chosen), rejected)))


def _other_chosen(ids: Tensor, layout: Layout, config: Any) -> Tensor:
    """The same rows with another text as chosen, free of image tokens."""
    special = {
        value for name, value in config.to_dict().items() if name.endswith("_token_id") and isinstance(value, int)
    }
    plain = [token for token in range(config.get_text_config().vocab_size) if token not in special][:2]
    ids = ids.clone()
    chosen = ids[:, layout.prompt : layout.rejected_start]
    chosen.copy_(torch.where(chosen == plain[0], plain[1], plain[0]))
    return ids


def _apart_by(found: Tensor, truth: Tensor) -> float:
    found, truth = found.sum(1), truth.sum(1)
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    return float(((found - truth).abs() / truth.abs().clamp(min=1)).max())


def sdpo_gradient_scale(batch: dict[str, Any], scores: Tensor, *, slack: float) -> Tensor:
    """`sdpo`'s scale of each pair, (pairs,), from its token log-probs (pairs, columns of chosen and rejected)."""
    layout: Layout = batch["layout"]
    widths = [layout.chosen, layout.rejected]
    sides = [part[:, layout.prompt :].to(scores.device).split(widths, 1) for part in (batch["mask"], batch["ids"])]
    return sdpo_lambda_text(scores.split(widths, 1), *sides, slack=slack)


# Images


def image_inputs(core: Any, batch: dict[str, Any], *, repeated: bool = False) -> dict[str, Any]:
    """What the model is given of the images: their pixels, or features computed before."""
    images = {k: v.to(core.dtype) if v.is_floating_point() else v for k, v in batch["images"].items()}
    images = repeat_for_both(images) if repeated else images
    features = batch.get("features")
    if features is None:
        return images
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    output = BaseModelOutputWithPooling()
    for name, value in (join_features([features, features]) if repeated else features).items():
        output[name] = value
    return {**{k: v for k, v in images.items() if k != "pixel_values"}, "mm_encoder_outputs": {"image": output}}


def features_agree(scorer: TokenLogProbs, model: nn.Module, batch: dict[str, Any]) -> bool:
    """Whether the model answers the same from features as from this batch's pixels. Sharded weights are left alone."""
    core = unwrap(model)
    if sharded(core):
        return False
    with plainly_evaluating(model) as model:
        try:
            found = scorer(model, {**batch, "features": vision_features(core, batch)})
            far = _apart_by(found, scorer(model, batch))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model does, its pixels are there
            logger.info("%s: its vision features can't be taken apart (%s)", scorer.name, error)
            return False
    return far <= TOLERANCE[precision(core)]


@torch.no_grad()
def vision_features(core: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """What the vision tower and projector make of a batch's images, without gradient."""
    output = core.get_image_features(**image_inputs(core, {"images": batch["images"]}), return_dict=True)
    return {name: output[name] for name in ("pooler_output", "deepstack_features") if output.get(name) is not None}


def features_to(features: Any, device: str) -> Any:
    """The same features on another device."""
    if isinstance(features, Tensor):
        return features.to(device)
    if isinstance(features, dict):
        return {name: features_to(value, device) for name, value in features.items()}
    return [features_to(value, device) for value in features]


def join_features(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Features of rows as those of a batch: images one after the other, in each layer of a deep stack."""
    return {name: _joined([row[name] for row in rows], deep=name == "deepstack_features") for name in rows[0]}


def _joined(values: Sequence[Any], *, deep: bool) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(list(values))
    if deep:
        return [_joined(layers, deep=False) for layers in zip(*values, strict=True)]
    return [image for value in values for image in value]


# Two ways to ask


def shared_prefix_log_probs(model: nn.Module, batch: dict[str, Any], *, head: str = "raw") -> Tensor:
    """log p of each completion token, 0 at padding, (pairs, chosen + rejected columns), by one sequence a pair."""
    core, layout = unwrap(model), batch["layout"]
    install(core)
    columns = layout.predicting_columns(batch["ids"].device)
    kept, targets = batch["mask"][:, layout.prompt :].bool(), batch["ids"][:, layout.prompt :]
    inputs = shared_inputs(core, batch) | image_inputs(core, batch)
    with use_layout(layout):
        found = scored(model, inputs, lambda hidden: hidden[:, columns][kept], targets[kept], head=head)
    return found.new_zeros(kept.shape).masked_scatter(kept, found)


def separate_log_probs(
    model: nn.Module, batch: dict[str, Any], *, head: str = "raw", padding_side: str = "right"
) -> Tensor:
    """The same by two plain sequences a pair."""
    core, layout = unwrap(model), batch["layout"]
    inputs, counted = plain_inputs(core, batch, padding_side=padding_side)
    targets, before = inputs["input_ids"][:, 1:][counted[:, 1:]], counted[:, 1:]
    inputs |= image_inputs(core, batch, repeated=True)
    found = scored(model, inputs, lambda hidden: hidden[:, :-1][before], targets, head=head)
    kept = batch["mask"][:, layout.prompt :].bool()
    sides = kept[:, : layout.chosen], kept[:, layout.chosen :]
    parts = zip(sides, found.split([int(side.sum()) for side in sides]), strict=True)
    return torch.cat([part.new_zeros(side.shape).masked_scatter(side, part) for side, part in parts], dim=1)


# The head


HEADS = ("raw", "finished", "own")
"""What log-probs are made of: the head's output, that as `_finish` changes it, or the model's whole logits."""


def head_of(model: nn.Module, batch: dict[str, Any]) -> str:
    """Which of HEADS gives the logits that the model itself gives, found on this batch."""
    core = unwrap(model)
    inputs, _ = plain_inputs(core, batch, padding_side="right")
    raw: list[Tensor] = []

    def last(plain: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        raw.append(plain(hidden[:, -1:]))
        return raw[0]

    if core.get_output_embeddings() is None:
        return "own"
    with _head_as(core, last):
        answer = model(**inputs, **image_inputs(core, batch, repeated=True), use_cache=False).logits.float()
    if not raw:
        return "own"
    far = {"raw": (raw[0].float() - answer).abs().max(), "finished": (_finish(core, raw[0]) - answer).abs().max()}
    nearest = min(far, key=lambda name: float(far[name]))
    return nearest if far[nearest] <= 1e-3 * answer.abs().max() else "own"


def _finish(core: Any, logits: Tensor) -> Tensor:
    """What models do to their head's output, in float32: soft cap (Gemma), scale (Cohere, Granite)."""
    text = core.config.get_text_config()
    logits = logits.float()
    if getattr(text, "logit_scale", None):
        logits = logits * text.logit_scale
    if getattr(text, "logits_scaling", None):
        logits = logits / text.logits_scaling
    cap = getattr(text, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def _token_log_probs(core: Any, logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    """log p of each target, nats, (tokens,), from states (tokens, width); logits are there a chunk at a time."""

    def chunk(states: Tensor, tokens: Tensor) -> Tensor:
        return -F.cross_entropy(logits(states), tokens, reduction="none")

    size = max(16, HEAD_ELEMENTS // core.config.get_text_config().vocab_size)
    if len(targets) <= size:
        return chunk(hidden, targets)
    again = torch.is_grad_enabled() and hidden.requires_grad
    pairs = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.cat([checkpoint(chunk, *pair, use_reentrant=False) if again else chunk(*pair) for pair in pairs])  # type: ignore[misc]


@contextlib.contextmanager
def _head_as(core: Any, answer: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> Iterator[None]:
    """Within it the output head gives answer(its plain forward, hidden states)."""
    head = core.get_output_embeddings()
    plain, wrapped = head.forward, "forward" in vars(head)
    head.forward = lambda hidden: answer(plain, hidden)
    try:
        yield
    finally:
        if wrapped:
            head.forward = plain
        else:
            del head.forward


def scored(model: nn.Module, inputs: dict[str, Any], select: Any, targets: Tensor, *, head: str) -> Tensor:
    """log p of the targets, (tokens,), by one forward of the model as it is wrapped; head: one of HEADS.

    The head scores inside the model's own forward, as DDP and FSDP need it, and gives a number a token, not logits.
    """
    core = unwrap(model)
    if head == "own":
        logits = model(**inputs, use_cache=False).logits
        return -F.cross_entropy(select(logits).float(), targets, reduction="none")
    found: list[Tensor] = []

    def score(plain: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        def logits(states: Tensor) -> Tensor:
            return _finish(core, plain(states)) if head == "finished" else plain(states).float()

        found.append(_token_log_probs(core, logits, select(hidden), targets))
        return found[0][None, :, None]

    with _head_as(core, score):
        model(**inputs, use_cache=False)
    return found[0]
