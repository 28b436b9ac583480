"""Log-probs of two completions of one prompt, from ONE sequence a pair: [image + prompt][chosen][rejected].

Rejected sees the prompt and itself, never chosen, and its positions go on from the prompt's end, so that the answer is
that of two plain forwards while images and prompt go through the model once. The model's own mask function is wrapped
(`transformers.AttentionMaskInterface`), and attention is three calls, of prompt, chosen and rejected
(`transformers.AttentionInterface`): no score matrix of the whole sequence, nothing a family of models has to write.

Not every model can be asked this way: linear attention carries chosen's state into rejected. `install` refuses the
layers it knows of, and `dpo_mm.policies.vlm.token_log_probs` checks the rest before it trusts this.
"""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

COMPLETION_TYPES = {("paligemma", "token_type_ids"): 1}
"""Token type of a completion where it is not 0, by model type: PaliGemma's prefix (0) sees itself both ways."""


@dataclass(frozen=True)
class Layout:
    """Columns of the sequence: prompts padded on the left, then chosen, then rejected, padded on the right."""

    prompt: int
    chosen: int
    rejected: int
    padded: bool
    """Whether any column of any row is padding."""

    @property
    def rejected_start(self) -> int:
        """Columns of prompt and chosen: where rejected starts."""
        return self.prompt + self.chosen

    @property
    def total(self) -> int:
        return self.rejected_start + self.rejected

    def logical_positions(self, device: torch.device) -> Tensor:
        """The column that each would have in [prompt][its completion], (total,)."""
        column = torch.arange(self.total, device=device)
        return torch.where(column >= self.rejected_start, column - self.chosen, column)

    def predicting_columns(self, device: torch.device) -> Tensor:
        """The column whose state predicts each completion token, (chosen + rejected,)."""
        last = torch.tensor([self.prompt - 1], device=device)
        columns = torch.arange(self.prompt, self.total, device=device)
        return torch.cat([last, columns[: self.chosen - 1], last, columns[self.chosen : -1]])


_LAYOUT: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def use_layout(layout: Layout) -> Iterator[None]:
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


# Masks


def mask_chosen_from_rejected(mask_function: Callable[..., Any], layout: Layout) -> Callable[..., Any]:
    """A model's own mask function over logical columns, with chosen and rejected unseen by each other."""
    prompt, both, chosen = layout.prompt, layout.rejected_start, layout.chosen

    def mask(batch: Any, head: Any, query: Any, key: Any) -> Any:
        late_query, late_key = query >= both, key >= both
        seen = (key < prompt) | ((query >= prompt) & (late_query == late_key))
        return seen & mask_function(batch, head, query - chosen * late_query, key - chosen * late_key)

    return mask


def _mask_builder(build: Callable[..., Any], *, may_skip: bool) -> Callable[..., Any]:
    def masks(*, q_length: int, kv_length: int, mask_function: Any = causal_mask_function, **rest: Any) -> Any:
        layout = _LAYOUT.get()
        if layout is None or (q_length, kv_length) != (layout.total, layout.total):
            return build(q_length=q_length, kv_length=kv_length, mask_function=mask_function, **rest)
        if (
            may_skip
            and not layout.padded
            and mask_function is causal_mask_function
            and rest.get("allow_is_causal_skip")
        ):
            return None
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
    """An attention function that handles a shared prefix as three calls of `attend`, and all else by one."""

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
            if mask is None and _LAYOUT.get() is not None and query.shape[2] == _LAYOUT.get().total:  # type: ignore[union-attr]
                raise RuntimeError(f"{type(module).__name__} is not told of the shared prefix")
            return attend(module, query, key, value, mask, **rest)
        if rest.get("position_bias") is not None:
            raise RuntimeError(
                f"{type(module).__name__} adds a bias by position, which a shared prefix does not handle"
            )
        p, s = layout.prompt, layout.rejected_start
        keys, values = (torch.cat([x[:, :, :p], x[:, :, s:]], dim=2) for x in (key, value))
        parts = (
            (query[:, :, :p], key[:, :, :p], value[:, :, :p], None if mask is None else mask[..., :p, :p]),
            (
                query[:, :, p:s],
                key[:, :, :s],
                value[:, :, :s],
                _causal_tail_mask(query, p, s) if mask is None else mask[..., p:s, :s],
            ),
            (
                query[:, :, s:],
                keys,
                values,
                _causal_tail_mask(query, p, p + layout.rejected) if mask is None else _drop_chosen_columns(mask, p, s),
            ),
        )
        return torch.cat([attend(module, *part, **rest)[0] for part in parts], dim=1), None

    return forward


def _causal_tail_mask(query: Tensor, start: int, end: int) -> Tensor:
    """The causal mask of columns start..end over all columns before end."""
    return torch.ones(end - start, end, dtype=torch.bool, device=query.device).tril_(start)[None, None]


def _drop_chosen_columns(mask: Tensor, prompt: int, both: int) -> Tensor:
    return torch.cat([mask[..., both:, :prompt], mask[..., both:, both:]], dim=-1)


def _own_eager(module: nn.Module, *arguments: Any, **rest: Any) -> Any:
    """The eager attention of the model's own file, which knows its soft caps and sinks."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *arguments, **rest)


NAMES = {"sdpa": "dpo_mm_sdpa", "eager": "dpo_mm_eager"}


def install(core: Any) -> None:
    """Let the model's text layers, and those alone, attend through a shared prefix. Raises ValueError where they can't.

    Without a shared prefix in sight they attend as before.
    """
    for base, attend, build in (("sdpa", sdpa_attention_forward, sdpa_mask), ("eager", _own_eager, eager_mask)):
        AttentionInterface.register(NAMES[base], _attention(attend))
        AttentionMaskInterface.register(NAMES[base], _mask_builder(build, may_skip=base == "sdpa"))
    text = core.config.get_text_config()
    kinds = sorted({kind for kind in getattr(text, "layer_types", None) or () if not _attends(kind)})
    if kinds:
        raise ValueError(f"it has {' and '.join(kinds)} layers")
    current = text._attn_implementation
    if current in NAMES.values():
        return
    name = NAMES["eager" if current == "eager" else "sdpa"]
    part = next((key for key in core.config.sub_configs if getattr(core.config, key, None) is text), None)
    if part is None and text is not core.config:
        raise ValueError("its text layers have no configuration of their own")
    core.set_attn_implementation(name if part is None else {part: name})
    if text._attn_implementation != name:
        raise ValueError("its attention cannot be set")


def _attends(kind: str) -> bool:
    return kind.endswith("attention") and "linear" not in kind


# Inputs


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside DDP, a compiled module or a PEFT model."""
    inner: Any = model
    while True:
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "_orig_mod", getattr(inner, "module", None)), nn.Module):
            inner = getattr(inner, "_orig_mod", None) or inner.module
        else:
            return inner


def position_ids(core: Any, ids: Tensor, mask: Tensor, types: dict[str, Tensor], images: dict[str, Tensor]) -> Tensor:
    """Positions by the model's own helper, rotary ones of images included: (rows, columns), (3 or 4, rows, columns)."""
    grids = {k: v for k, v in images.items() if k.endswith("grid_thw") or k == "second_per_grid_ts"}
    deltas = getattr(core.base_model, "rope_deltas", None)
    found = core._prepare_position_ids_for_generation(ids, {"attention_mask": mask, **types, **grids})
    if hasattr(core.base_model, "rope_deltas"):
        core.base_model.rope_deltas = deltas
    return found


def _with_completion(core: Any, types: dict[str, Tensor], columns: int) -> dict[str, Tensor]:
    kind = core.config.model_type
    return {k: F.pad(v, (0, columns), value=COMPLETION_TYPES.get((kind, k), 0)) for k, v in types.items()}


def shared_inputs(core: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """What the model is given for [prompt][chosen][rejected], images apart."""
    layout, ids, mask = batch["layout"], batch["ids"], batch["mask"]
    longer = max(layout.chosen, layout.rejected)
    logical_ids = F.pad(ids[:, : layout.prompt], (0, longer), value=1)
    logical_mask = F.pad(mask[:, : layout.prompt], (0, longer), value=1)
    types = _with_completion(core, batch["types"], longer)
    found = position_ids(core, logical_ids, logical_mask, types, batch["images"])[
        ..., layout.logical_positions(ids.device)
    ]
    types = _with_completion(core, batch["types"], layout.chosen + layout.rejected)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": found, "prefix_layout": layout, **types}


def plain_inputs(core: Any, batch: dict[str, Any], *, padding_side: str) -> tuple[dict[str, Any], Tensor]:
    """What the model is given for [prompt][chosen] of all pairs, then [prompt][rejected], and which tokens count."""
    layout = batch["layout"]
    kept = [list(range(layout.rejected_start)), [*range(layout.prompt), *range(layout.rejected_start, layout.total)]]
    width = max(len(columns) for columns in kept)

    def rows(x: Tensor) -> Tensor:
        return torch.cat([F.pad(x[:, columns], (0, width - len(columns))) for columns in kept])

    mask = rows(batch["mask"])
    order = (mask if padding_side == "left" else 1 - mask).argsort(dim=1, stable=True)
    types = _with_completion(core, batch["types"], layout.chosen + layout.rejected)
    values = {"input_ids": batch["ids"], "attention_mask": batch["mask"], **types}
    inputs = {name: rows(value).gather(1, order) for name, value in values.items()}
    counted = (torch.arange(width, device=mask.device) >= layout.prompt) & (mask == 1)
    if padding_side == "left":
        images = repeat_for_both(batch["images"])
        types = {name: inputs[name] for name in types}
        inputs["position_ids"] = position_ids(core, inputs["input_ids"], inputs["attention_mask"], types, images)
    return inputs, counted.gather(1, order)


def repeat_for_both(images: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.cat([value, value]) for name, value in images.items()}
