"""Log-prob of each completion token, with a shared prefix if that is exact, otherwise with separate sequences.

The output head runs only on the completions, in chunks that are recomputed in the backward pass, so that the logits of a
whole sequence are never in memory. On the first batch of a run both layouts are computed. If they differ, the model uses
separate sequences from then on, and a warning is logged once.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dpo_mm.objectives import sdpo_lambda_text
from dpo_mm.policies.vlm.float32_head import float32_logits
from dpo_mm.policies.vlm.layout_check import (
    TOLERANCE,
    Separate,
    is_sharded,
    measure_separate,
    relative_difference,
    unwrapped_eval_mode,
    why_not_shared,
)
from dpo_mm.policies.vlm.prefix_attention import backends, kernels
from dpo_mm.policies.vlm.prefix_layout import Layout, RightPadded, use_layout
from dpo_mm.policies.vlm.shared_prefix import (
    find_placeholders_once,
    install,
    layout_with_kernel,
    separate_inputs,
    shared_prefix_inputs,
    unwrap,
)
from dpo_mm.policies.vlm.vision_features import image_inputs

logger = logging.getLogger(__name__)

HEAD_ELEMENTS = 2**24
"""Number of logits in memory at once, 64 MiB in float32."""


class TokenLogProbs:
    """Computes the log-prob of each completion token with a model.

    Args:
        name: name of the model, for messages.
        layout: "shared_prefix", "separate", or "auto" to decide on the first batch.

    Raises:
        ValueError: if the layout is unknown.
    """

    def __init__(self, name: str, *, layout: str = "auto") -> None:
        if layout not in ("auto", "shared_prefix", "separate"):
            raise ValueError(f"pair_layout {layout!r} is unknown. Expected auto, shared_prefix or separate")
        self.name, self.layout, self.head = name, layout, "raw"
        self.checked, self.without_waiting, self.kernel = False, False, "default"
        self.limit = TOLERANCE["half"]
        """Difference of log-probs that counts as rounding, measured on the first batch."""

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Compute the log-probs of the completions' tokens.

        Args:
            model: the model, possibly wrapped.
            batch: from `pair_batches.collate`, on the model's device.

        Returns:
            Log-probs in nats, 0 at padding, (pairs, columns of chosen and rejected), float32.

        Raises:
            ValueError: as `check`.
        """
        if not self.checked:
            self.check(model, batch)
        if self.layout == "shared_prefix":
            return shared_prefix_log_probs(model, batch, head=self.head, kernel=self.kernel)
        return separate_log_probs(model, batch, head=self.head, without_waiting=self.without_waiting)

    def check(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """Choose the layout and the head on this batch.

        Raises:
            ValueError: if the model does not compute log-probs even with separate sequences, or the layout
                "shared_prefix" is required and not exact.
        """
        with unwrapped_eval_mode(model) as model:
            separate = self._measure_separate(model, batch)
            if not batch["layout"].rejected:  # one response per prompt
                self.layout = "separate"
            reason = None if self.layout == "separate" else self._why_not_shared(model, batch, separate)
            if (reason or self.layout == "separate") and not is_sharded(unwrap(model)):
                self.without_waiting = self._agrees_without_waiting(model, batch, separate)
        if self.layout == "shared_prefix" and reason:
            raise ValueError(f"pair_layout 'shared_prefix' is not exact for {self.name}: {reason}. Use 'auto'")
        if reason:
            logger.warning(
                "%s: %s. Chosen and rejected run as two separate sequences, which is slower and exact",
                self.name,
                reason,
            )
        self.layout, self.checked = "separate" if reason or self.layout == "separate" else "shared_prefix", True
        self.limit = separate.limit

    def _measure_separate(self, model: nn.Module, batch: dict[str, Any]) -> Separate:
        """Choose the head, and compute the log-probs of separate sequences with their rounding."""
        if "pixel_values" in batch["images"]:
            batch = {name: value for name, value in batch.items() if name != "features"}
        try:
            self.head = detect_head(model, batch)
            if self.head == "own":
                logger.warning(
                    "%s changes the output of its head in an unknown way. Logits are computed for whole sequences, "
                    "which takes more memory",
                    self.name,
                )
            compute = functools.partial(separate_log_probs, model, head=self.head)

            def with_math_backend(batch: dict[str, Any]) -> Tensor:
                with sdpa_kernel(SDPBackend.MATH):
                    return compute(batch)

            variants = functools.partial(compute, padding_side="left"), with_math_backend
            with backends("flash", unwrap(model).device):  # without cuDNN's, also outside a run
                return measure_separate(compute, variants, batch, unwrap(model))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{self.name} cannot compute log-probs: {error}") from error

    def _why_not_shared(self, model: nn.Module, batch: dict[str, Any], separate: Separate) -> str | None:
        """Reason against the shared prefix, or None if a kernel of attention is exact on this batch."""
        base_model = unwrap(model)
        text = base_model.config.get_text_config()
        attention = text._attn_implementation
        names = kernels(base_model, has_padding=batch["layout"].has_padding)
        names = names[:1] if is_sharded(base_model) else names  # every process must run the same passes
        reasons: list[str] = []
        for name in names:
            shared = functools.partial(shared_prefix_log_probs, model, head=self.head, kernel=name)
            try:
                install(base_model)
                reason = why_not_shared(shared, batch, separate, base_model.config)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # any error of a model is a reason, because separate sequences always work
                reason = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            if reason is None:
                if reasons:
                    logger.warning("%s: attention is computed by %r. Not used: %s", self.name, name, "; ".join(reasons))
                self.kernel = name
                return None
            reasons.append(f"{name!r} {reason}" if len(names) > 1 else f"a shared prefix {reason}")
        if attention != "sdpa" and text._attn_implementation != attention:
            text._attn_implementation = attention  # of the text alone: vision towers keep theirs
        return "; ".join(dict.fromkeys(reasons))

    def _agrees_without_waiting(self, model: nn.Module, batch: dict[str, Any], separate: Separate) -> bool:
        """True if separate sequences give the same log-probs without what makes the host wait for the device."""
        base_model = unwrap(model)
        try:
            if base_model.config.get_text_config()._attn_implementation == "sdpa":
                install(base_model)
            log_probs = separate_log_probs(model, batch, head=self.head, without_waiting=True)
            return relative_difference(log_probs, separate.log_probs) <= separate.limit
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # any error of a model is a reason, because the model can choose masks and positions
            logger.debug("%s: the host waits for the masks and positions of separate sequences (%s)", self.name, error)
            return False


def sdpo_gradient_scale(batch: dict[str, Any], log_probs: Tensor, *, slack: float) -> Tensor:
    """Compute `sdpo`'s scale of the rejected gradient, (pairs,).

    Args:
        batch: from `pair_batches.collate`.
        log_probs: token log-probs, nats, (pairs, columns of chosen and rejected).
        slack: the paper's mu, in [0, 1).
    """
    layout: Layout = batch["layout"]
    widths = [layout.chosen, layout.rejected]
    masks, ids = (
        part[:, layout.prompt :].to(log_probs.device).split(widths, 1) for part in (batch["mask"], batch["ids"])
    )
    return sdpo_lambda_text(log_probs.split(widths, 1), masks, ids, slack=slack)


# Both layouts


def shared_prefix_log_probs(
    model: nn.Module, batch: dict[str, Any], *, head: str = "raw", kernel: str = "default"
) -> Tensor:
    """Compute the log-probs of the completions' tokens from one packed sequence per pair.

    Args:
        model: the model, possibly wrapped.
        batch: from `pair_batches.collate`, on the model's device.
        head: a name in HEADS.
        kernel: kernel of causal attention, see `prefix_attention.kernels`.

    Returns:
        Log-probs in nats, 0 at padding, (pairs, columns of chosen and rejected).
    """
    base_model, layout = unwrap(model), layout_with_kernel(batch, kernel)
    install(base_model)
    inputs = shared_prefix_inputs(base_model, batch, layout) | image_inputs(base_model, batch)
    with use_layout(layout), find_placeholders_once(base_model, batch, "shared_prefix"):
        return _completion_log_probs(model, inputs, batch, *batch["places"]["shared_prefix"], head=head)


def _completion_log_probs(
    model: nn.Module, inputs: dict[str, Any], batch: dict[str, Any], predicting: Tensor, tokens: Tensor, *, head: str
) -> Tensor:
    """Log-probs of the completions' tokens in nats, 0 at padding, (pairs, columns of chosen and rejected).

    Args:
        predicting: places of the hidden states that predict them, see `prefix_layout.token_places`.
        tokens: places of the tokens.
    """
    ids = batch["ids"][:, batch["layout"].prompt :]
    targets = ids.flatten().index_select(0, tokens)
    select = lambda hidden: hidden.flatten(0, 1).index_select(0, predicting)
    log_probs = target_log_probs(model, inputs, select, targets, head=head)
    return log_probs.new_zeros(ids.numel()).index_copy(0, tokens, log_probs).view(ids.shape)


def separate_log_probs(
    model: nn.Module,
    batch: dict[str, Any],
    *,
    head: str = "raw",
    padding_side: str = "right",
    without_waiting: bool = False,
) -> Tensor:
    """Compute the log-probs of the completions' tokens from two separate sequences per pair.

    Args:
        model: the model, possibly wrapped.
        batch: from `pair_batches.collate`, on the model's device.
        head: a name in HEADS.
        padding_side: "left" or "right".
        without_waiting: True gives the model masks and positions, for which it would make the host wait for the device. Only for
            padding on the right.

    Returns:
        Log-probs in nats, 0 at padding, (pairs, columns of chosen and rejected).
    """
    base_model = unwrap(model)
    inputs, padding = separate_inputs(base_model, batch, padding_side=padding_side, without_waiting=without_waiting)
    predicting, tokens = batch["places"]["separate"]
    width = inputs["input_ids"].shape[1]
    predicting = predicting + padding.index_select(0, predicting // width)
    inputs |= image_inputs(base_model, batch, repeated=bool(batch["layout"].rejected))
    with contextlib.ExitStack() as stack:
        if without_waiting:
            stack.enter_context(use_layout(RightPadded(width)))
            stack.enter_context(find_placeholders_once(base_model, batch, "separate"))
        return _completion_log_probs(model, inputs, batch, predicting, tokens, head=head)


# The head


HEADS = ("raw", "finished", "own")
"""How logits are computed: by the head, by the head and then `_finish`, or by the model's whole forward pass."""


def detect_head(model: nn.Module, batch: dict[str, Any]) -> str:
    """Return the name in HEADS that gives the model's own logits on this batch."""
    base_model = unwrap(model)
    inputs, _ = separate_inputs(base_model, batch, padding_side="right")
    head_outputs: list[Tensor] = []

    def last_column(head: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        head_outputs.append(head(hidden[:, -1:]))
        return head_outputs[0]

    if base_model.get_output_embeddings() is None:
        return "own"
    with _replace_head(base_model, last_column):
        images = image_inputs(base_model, batch, repeated=bool(batch["layout"].rejected))
        logits = model(**inputs, **images, use_cache=False).logits.float()
    if not head_outputs:
        return "own"
    differences = {
        "raw": (head_outputs[0].float() - logits).abs().max(),
        "finished": (_finish(base_model, head_outputs[0]) - logits).abs().max(),
    }
    nearest = min(differences, key=lambda name: float(differences[name]))
    limit = max(1e-3, 4 * torch.finfo(head_outputs[0].dtype).eps)  # models cap and scale logits in half precision
    return nearest if differences[nearest] <= limit * logits.abs().max() else "own"


def _finish(base_model: Any, logits: Tensor) -> Tensor:
    """Apply what models do to their head's output, in float32: soft cap (Gemma), scale (Cohere, Granite)."""
    text = base_model.config.get_text_config()
    logits = logits.float()
    if getattr(text, "logit_scale", None):
        logits = logits * text.logit_scale
    if getattr(text, "logits_scaling", None):
        logits = logits / text.logits_scaling
    cap = getattr(text, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def _chunked_log_probs(base_model: Any, logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-prob of each target, nats, (tokens,), from hidden states (tokens, width), one chunk of logits at a time."""

    def chunk(states: Tensor, tokens: Tensor) -> Tensor:
        return -F.cross_entropy(logits(states), tokens, reduction="none")

    size = max(16, HEAD_ELEMENTS // base_model.config.get_text_config().vocab_size)
    if len(targets) <= size:
        return chunk(hidden, targets)
    recompute = torch.is_grad_enabled() and hidden.requires_grad
    pairs = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.cat([checkpoint(chunk, *pair, use_reentrant=False) if recompute else chunk(*pair) for pair in pairs])  # type: ignore[misc]


@contextlib.contextmanager
def _replace_head(
    base_model: Any, replacement: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
) -> Iterator[None]:
    """Context manager in which the output head returns replacement(its own forward, hidden states)."""
    head = base_model.get_output_embeddings()
    own_forward, is_wrapped = head.forward, "forward" in vars(head)
    head.forward = lambda hidden: replacement(own_forward, hidden)
    try:
        yield
    finally:
        if is_wrapped:
            head.forward = own_forward
        else:
            del head.forward


def target_log_probs(model: nn.Module, inputs: dict[str, Any], select: Any, targets: Tensor, *, head: str) -> Tensor:
    """Compute the log-prob of each target token in one forward pass.

    Cross entropy runs inside the model's own forward pass, as DDP and FSDP need it. The head then returns one number per
    token instead of logits.

    Args:
        model: the model, possibly wrapped.
        inputs: keyword arguments of the model.
        select: function from hidden states (rows, columns, width) to those that predict the targets, (tokens, width).
        targets: token ids, (tokens,).
        head: a name in HEADS.

    Returns:
        Log-probs in nats, (tokens,).
    """
    base_model = unwrap(model)
    if head == "own":
        logits = model(**inputs, use_cache=False).logits
        return -F.cross_entropy(select(logits).float(), targets, reduction="none")
    log_probs: list[Tensor] = []

    def log_probs_instead_of_logits(own_forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        module = base_model.get_output_embeddings()

        def logits(states: Tensor) -> Tensor:
            output = float32_logits(module, own_forward, states)
            return _finish(base_model, output) if head == "finished" else output

        log_probs.append(_chunked_log_probs(base_model, logits, select(hidden), targets))
        return log_probs[0][None, :, None]

    with _replace_head(base_model, log_probs_instead_of_logits):
        model(**inputs, use_cache=False)
    return log_probs[0]
