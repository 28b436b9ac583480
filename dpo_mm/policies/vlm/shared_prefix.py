"""Packed sequences [images + prompt][chosen][rejected]: log-probs of two completions in one forward pass.

Images and prompt run through the model once, and the log-probs equal those of two separate sequences:

    columns    [ prompt P          ][ chosen C              ][ rejected R            ]
    position   0 ... len(P) - 1      len(P) ...               len(P) ...

    P attends to P
    C attends to P and C, causally
    R attends to P and R, causally, and never to C. Its positions continue at len(P), as if C were absent.

    query | key   P         C         R
    P             model's   -         -
    C             all       causal    -
    R             all       -         causal

The model's own mask function is wrapped (`transformers.AttentionMaskInterface`). Attention is two or three calls for the
parts (`transformers.AttentionInterface`), see `dpo_mm.policies.vlm.prefix_attention`. So there is no score matrix of the
whole sequence, and no code per model family.

Layers with a state, such as linear attention, share the state after the prompt, see
`dpo_mm.policies.vlm.recurrent_prefix`. `install` refuses layers that do neither, and
`dpo_mm.policies.vlm.token_log_probs` checks the rest on the first batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

from dpo_mm.policies.vlm.pair_batches import join_images
from dpo_mm.policies.vlm.prefix_attention import attend_causally, attend_packed, attend_with_mask, backends
from dpo_mm.policies.vlm.prefix_layout import CURRENT, Layout, PackedTokens, Packing, RightPadded
from dpo_mm.policies.vlm.recurrent_prefix import share_states

COMPLETION_TYPES = {("paligemma", "token_type_ids"): 1}
"""Token type of a completion if it is not 0. PaliGemma's prefix has type 0 and attends to itself in both directions."""


# Masks


def mask_chosen_from_rejected(mask_function: Callable[..., Any], layout: Layout) -> Callable[..., Any]:
    """Wrap a model's mask function so that chosen and rejected do not attend to each other.

    Args:
        mask_function: a mask function of transformers: (batch, head, query column, key column) to bool.
        layout: columns of the packed sequence.
    """
    prompt, chosen, rejected_start = layout.prompt, layout.chosen, layout.rejected_start

    def mask(batch: Any, head: Any, query: Any, key: Any) -> Any:
        query_in_rejected, key_in_rejected = query >= rejected_start, key >= rejected_start
        visible = (key < prompt) | ((query >= prompt) & (query_in_rejected == key_in_rejected))
        # The model's rule (causal, sliding window, ...) compares positions. Moving the columns of rejected back by the
        # length of chosen gives them the positions that they have if chosen is absent, so the rule applies unchanged.
        # True counts as 1 in the product, and the columns of prompt and chosen do not move.
        return visible & mask_function(batch, head, query - chosen * query_in_rejected, key - chosen * key_in_rejected)

    return mask


def _mask_builder(build: Callable[..., Any], *, may_skip: bool) -> Callable[..., Any]:
    """Wrap a mask builder of transformers. `may_skip`: the attention needs no mask if it is causal without padding."""

    def masks(*, q_length: int, kv_length: int, mask_function: Any = causal_mask_function, **rest: Any) -> Any:
        layout = CURRENT.get()
        if layout is None or (q_length, kv_length) != (layout.total, layout.total):
            return build(q_length=q_length, kv_length=kv_length, mask_function=mask_function, **rest)
        plain = may_skip and mask_function is causal_mask_function and rest.get("allow_is_causal_skip")
        if plain and (isinstance(layout, RightPadded) or not layout.has_padding or layout.packing is not None):
            return None
        if isinstance(layout, RightPadded):
            return build(q_length=q_length, kv_length=kv_length, mask_function=mask_function, **rest)
        rest |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return build(
            q_length=q_length,
            kv_length=kv_length,
            mask_function=mask_chosen_from_rejected(mask_function, layout),
            **rest,
        )

    return masks


# Attention


def _attention(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an attention function: the calls of `prefix_attention` for a shared prefix, and one call otherwise."""

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        prefix_layout: Layout | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        layout = prefix_layout
        if layout is None or query.shape[2] != layout.total:
            current = CURRENT.get()
            if mask is None and isinstance(current, Layout) and query.shape[2] == current.total:
                raise RuntimeError(f"{type(module).__name__} does not pass on the layout of the shared prefix")
            return attend(module, query, key, value, mask, **rest)
        if rest.get("position_bias") is not None:
            raise RuntimeError(f"{type(module).__name__} adds a position bias, which a shared prefix does not support")
        tensors = query, key, value
        with backends(layout.kernel, query.device):
            if mask is not None:
                return attend_with_mask(attend, module, *tensors, mask, layout, **rest), None
            if layout.packing is not None:
                return attend_packed(module, *tensors, layout, **rest), None
            return attend_causally(attend, module, *tensors, layout, **rest), None

    return forward


def _eager_of_model(module: nn.Module, *arguments: Any, **rest: Any) -> Any:
    """Eager attention of the model's own module, which implements its soft caps and sinks."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *arguments, **rest)


NAMES = {"sdpa": "dpo_mm_sdpa", "eager": "dpo_mm_eager"}
"""Name of the registered attention function, by the name of the function that it wraps."""


def install(base_model: Any) -> None:
    """Set an attention function that supports a shared prefix, in the text layers only.

    Batches without a shared prefix run as before.

    Args:
        base_model: a transformers model without wrappers.

    Raises:
        ValueError: if the model's text layers do not support a shared prefix.
    """
    for base, attend, build in (("sdpa", sdpa_attention_forward, sdpa_mask), ("eager", _eager_of_model, eager_mask)):
        AttentionInterface.register(NAMES[base], _attention(attend))
        AttentionMaskInterface.register(NAMES[base], _mask_builder(build, may_skip=base == "sdpa"))
    text = base_model.config.get_text_config()
    layer_types = enumerate(getattr(text, "layer_types", None) or ())
    others = {layer: kind for layer, kind in layer_types if not _attends(kind)}
    refused = set(others) - share_states(base_model.get_decoder())
    if refused:
        raise ValueError(f"it has {' and '.join(sorted({others[layer] for layer in refused}))} layers")
    current = text._attn_implementation
    if current in NAMES.values():
        return
    name = NAMES["eager" if current == "eager" else "sdpa"]
    part = next((key for key in base_model.config.sub_configs if getattr(base_model.config, key, None) is text), None)
    if part is None and text is not base_model.config:
        raise ValueError("its text layers have no separate configuration")
    base_model.set_attn_implementation(name if part is None else {part: name})
    if text._attn_implementation != name:
        raise ValueError("its attention cannot be set")


def _attends(kind: str) -> bool:
    return kind.endswith("attention") and "linear" not in kind


# Inputs


def unwrap(model: nn.Module) -> Any:
    """Return the transformers model inside DDP, a compiled module or a PEFT model."""
    inner: Any = model
    while True:
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "_orig_mod", getattr(inner, "module", None)), nn.Module):
            inner = getattr(inner, "_orig_mod", None) or inner.module
        else:
            return inner


def position_ids(
    base_model: Any,
    ids: Tensor,
    mask: Tensor,
    token_type_inputs: dict[str, Tensor],
    image_inputs: dict[str, Tensor],
) -> Tensor:
    """Compute the position ids with the model's own function, including rotary positions of images.

    Args:
        base_model: a transformers model without wrappers.
        ids: token ids, (rows, columns).
        mask: 1 for a token, 0 for padding, (rows, columns).
        token_type_inputs: token types by name, (rows, columns) each.
        image_inputs: image tensors by name.

    Returns:
        Position ids, (rows, columns), or (3 or 4, rows, columns) for multi-dimensional rotary positions.
    """
    grids = {k: v for k, v in image_inputs.items() if k.endswith("grid_thw") or k == "second_per_grid_ts"}
    rope_deltas = getattr(base_model.base_model, "rope_deltas", None)
    positions = base_model._prepare_position_ids_for_generation(
        ids, {"attention_mask": mask, **token_type_inputs, **grids}
    )
    if hasattr(base_model.base_model, "rope_deltas"):
        base_model.base_model.rope_deltas = rope_deltas
    return positions


def _extend_token_types(base_model: Any, token_type_inputs: dict[str, Tensor], columns: int) -> dict[str, Tensor]:
    """Add columns with the token type of a completion."""
    model_type = base_model.config.model_type
    return {
        name: F.pad(types, (0, columns), value=COMPLETION_TYPES.get((model_type, name), 0))
        for name, types in token_type_inputs.items()
    }


def packed_positions(base_model: Any, batch: dict[str, Any]) -> Tensor:
    """Compute the position ids of the packed sequence [prompt][chosen][rejected].

    Models read the sizes of images for it, and wait for the device if the batch is on it. So it runs before the batch is moved.
    """
    layout, ids, mask = batch["layout"], batch["ids"], batch["mask"]
    longer = max(layout.chosen, layout.rejected)
    # Positions of one sequence [prompt][longer completion], from which each column takes its own.
    logical_ids = F.pad(ids[:, : layout.prompt], (0, longer), value=1)
    logical_mask = F.pad(mask[:, : layout.prompt], (0, longer), value=1)
    logical_types = _extend_token_types(base_model, batch["types"], longer)
    logical_positions = position_ids(base_model, logical_ids, logical_mask, logical_types, batch["images"])
    return logical_positions[..., layout.logical_positions(ids.device)]


def positions_of(base_model: Any, batch: dict[str, Any]) -> Tensor:
    """Return the position ids of the packed sequence, (..., rows, columns)."""
    return batch["positions"] if "positions" in batch else packed_positions(base_model, batch)


def layout_with_kernel(batch: dict[str, Any], kernel: str) -> Layout:
    """Return the batch's layout with a kernel of attention. "varlen" is for rows of different length only."""
    layout: Layout = batch["layout"]
    if kernel != "varlen" or "packing" not in batch:
        return dataclasses.replace(layout, kernel=kernel)
    packing = Packing(**{name: PackedTokens(**fields) for name, fields in batch["packing"].items()})
    return dataclasses.replace(layout, kernel=kernel, packing=packing)


def shared_prefix_inputs(base_model: Any, batch: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """Build the model inputs of the packed sequence [prompt][chosen][rejected], without the image tensors."""
    return {
        "input_ids": batch["ids"],
        "attention_mask": batch["mask"],
        "position_ids": positions_of(base_model, batch),
        "prefix_layout": layout,
        **_extend_token_types(base_model, batch["types"], layout.chosen + layout.rejected),
    }


def separate_inputs(
    base_model: Any, batch: dict[str, Any], *, padding_side: str, without_waiting: bool = False
) -> tuple[dict[str, Any], Tensor]:
    """Build the model inputs of separate sequences, without the image tensors.

    Args:
        base_model: a transformers model without wrappers.
        batch: from `pair_batches.collate`.
        padding_side: "left" or "right".
        without_waiting: True takes the positions of images from the batch. The model would wait for the device to compute them.

    Returns:
        Inputs of [prompt][chosen] of all pairs, then of [prompt][rejected], (2 * pairs, columns), and the number of columns
        of padding before each, (2 * pairs,). For one-sided rows, only the former.
    """
    layout = batch["layout"]
    columns_of_sides = [
        [slice(layout.rejected_start)],
        [slice(layout.prompt), slice(layout.rejected_start, None)],
    ][: 2 if layout.rejected else 1]
    width = max(layout.rejected_start, layout.prompt + layout.rejected)

    def stack_sides(x: Tensor) -> Tensor:
        parts = [torch.cat([x[..., part] for part in columns], dim=-1) for columns in columns_of_sides]
        return torch.cat([F.pad(part, (0, width - part.shape[-1])) for part in parts], dim=-2)

    mask = stack_sides(batch["mask"])
    order = (mask if padding_side == "left" else 1 - mask).argsort(dim=1, stable=True)
    token_type_inputs = _extend_token_types(base_model, batch["types"], layout.chosen + layout.rejected)
    packed = {"input_ids": batch["ids"], "attention_mask": batch["mask"], **token_type_inputs}
    inputs = {name: stack_sides(value).gather(1, order) for name, value in packed.items()}
    positions = positions_of(base_model, batch) if without_waiting else None
    if padding_side == "left":
        images = join_images([batch["images"]] * (2 if layout.rejected else 1))
        token_type_inputs = {name: inputs[name] for name in token_type_inputs}
        inputs["position_ids"] = position_ids(
            base_model, inputs["input_ids"], inputs["attention_mask"], token_type_inputs, images
        )
    elif positions is not None and positions.ndim == 3:  # of images. Those of text alone are the columns
        stacked = stack_sides(positions)
        inputs["position_ids"] = stacked.gather(-1, order.expand(stacked.shape))
    return inputs, (width - mask.sum(1)) * (padding_side == "left")


@contextlib.contextmanager
def find_placeholders_once(base_model: Any, batch: dict[str, Any], layout: str) -> Iterator[None]:
    """Context manager in which the image tokens of a batch are located in its first forward pass only.

    Models compare their number with that of the features, for which the host waits. The reference's pass does it for the policy's.

    Args:
        base_model: a transformers model without wrappers.
        batch: from `pair_batches.collate`. It stores the results.
        layout: name of the layout of the sequences.
    """
    inner = base_model.base_model
    if not hasattr(inner, "get_placeholder_mask"):
        yield
        return
    find = inner.get_placeholder_mask
    results, calls = batch.setdefault("placeholders", {}).setdefault(layout, []), 0

    def stored(*arguments: Any, **rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > len(results):
            results.append(find(*arguments, **rest))
        return results[calls - 1]

    inner.get_placeholder_mask = stored
    try:
        yield
    finally:
        del inner.get_placeholder_mask
