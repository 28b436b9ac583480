"""Layers with a recurrent or a convolution state on packed sequences [images + prompt][chosen][rejected].

Linear attention (Qwen3.5), short convolutions (LFM2) and Mamba read a sequence in order and carry a state. On a packed
sequence they would carry the state of chosen into rejected. Such a layer runs twice instead:

    prompt             from an empty state      -> its outputs, and the state S after its last token
    chosen, rejected   both from S, as two rows -> their outputs

The layer's own forward pass does both, with a cache that holds S, as it does in generation. S stays in the graph of the
gradient. No code depends on the model family.
"""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_mm.policies.vlm.prefix_layout import CURRENT, Layout


class StateCache:
    """Cache of one layer's states, with the methods of `transformers.Cache` that such layers call.

    A `transformers.Cache` copies states in place and without gradient. This one stores the tensors.
    """

    def __init__(self) -> None:
        self.conv: dict[int, Tensor] = {}
        self.recurrent: dict[int, Tensor] = {}

    def repeat(self) -> StateCache:
        """Return a cache with the states of all rows twice, for chosen and for rejected."""
        other = StateCache()
        other.conv = {name: torch.cat([state, state]) for name, state in self.conv.items()}
        other.recurrent = {name: torch.cat([state, state]) for name, state in self.recurrent.items()}
        return other

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the last inputs of the layer's convolution, (rows, width, columns), or None at the start."""
        return self.conv.get(state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the recurrent state, or None at the start."""
        return self.recurrent.get(state_idx)

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """Store the last inputs of the convolution. Returns all inputs, those before the sequence first."""
        before = self.conv.get(state_idx)
        inputs = conv_states if before is None else torch.cat([before, conv_states], dim=-1)
        self.conv[state_idx] = inputs if conv_kernel_size is None else inputs[..., -conv_kernel_size:]
        return inputs

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Store the recurrent state, and return it."""
        self.recurrent[state_idx] = recurrent_states
        return recurrent_states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int = 0) -> bool:
        """Return True after the prompt."""
        return state_idx in self.conv

    def is_recording_past(self, layer_idx: int) -> bool:
        """Return False: earlier states are not stored."""
        return False


def share_states(decoder: nn.Module) -> set[int]:
    """Let the layers with a convolution and a cache share the state after the prompt.

    Sequences without a shared prefix run as before.

    Args:
        decoder: the language model.

    Returns:
        The indices of these layers.
    """
    shared: set[int] = set()
    module: Any
    for module in decoder.modules():
        if not _has_state(module):
            continue
        if "forward" not in vars(module):
            module.forward = MethodType(_forward, module)  # a method, so that it follows a copy of the module
        if getattr(module.forward, "__func__", None) is _forward:
            shared.add(module.layer_idx)
    return shared


def _has_state(module: nn.Module) -> bool:
    convolves = any(isinstance(child, nn.Conv1d) for child in module.children())
    return convolves and hasattr(module, "layer_idx") and "cache" in inspect.signature(type(module).forward).parameters


def _forward(
    module: nn.Module,
    hidden_states: Tensor,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    *,
    prefix_layout: Layout | None = None,
    **rest: Any,
) -> Tensor:
    """Forward pass of a layer with states. With a shared prefix, chosen and rejected start from the prompt's state."""

    def run(columns: Tensor, mask: Tensor | None, state: Any) -> Tensor:
        return type(module).forward(module, columns, cache=state, attention_mask=mask, **rest)

    layout = prefix_layout
    if layout is None or hidden_states.shape[1] != layout.total:
        current = CURRENT.get()
        if isinstance(current, Layout) and hidden_states.shape[1] == current.total:
            raise RuntimeError(f"{type(module).__name__} does not pass on the layout of the shared prefix")
        return run(hidden_states, attention_mask, cache)
    widths = [layout.prompt, layout.chosen, layout.rejected]
    prompt, chosen, rejected = hidden_states.split(widths, 1)
    masks = [None] * 3 if attention_mask is None else attention_mask.split(widths, 1)
    state = StateCache()
    of_prompt = run(prompt, masks[0], state)
    # At least two columns: one alone runs the kernels of generation, which have no gradient and change the state.
    width = max(layout.chosen, layout.rejected, 2)
    both = torch.cat([F.pad(part, (0, 0, 0, width - part.shape[1])) for part in (chosen, rejected)])
    both_masks = [F.pad(mask, (0, width - mask.shape[1])) for mask in masks[1:] if mask is not None]
    of_both = run(both, torch.cat(both_masks) if both_masks else None, state.repeat())
    of_chosen, of_rejected = of_both.chunk(2)
    return torch.cat([of_prompt, of_chosen[:, : layout.chosen], of_rejected[:, : layout.rejected]], dim=1)
