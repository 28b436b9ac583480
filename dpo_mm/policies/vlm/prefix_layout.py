"""Columns of a packed sequence [images + prompt][chosen][rejected], and where the completions' tokens are in both layouts."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedTokens:
    """Tokens of all rows one after the other, without padding, for attention of variable length."""

    places: Tensor
    """Place of each token among the flattened (rows, columns), (tokens,)."""
    ends: Tensor
    """Where each row starts, and the number of tokens, int32, (rows + 1,)."""
    longest: int
    """Number of tokens of the longest row."""


@dataclass(frozen=True)
class Packing:
    """Queries and keys of the two attention calls of packed sequences of different length."""

    first: PackedTokens
    """Prompt and chosen, as queries and keys."""
    tail: PackedTokens
    """Rejected, as queries."""
    tail_keys: PackedTokens
    """Prompt and rejected, as keys."""


@dataclass(frozen=True)
class Layout:
    """Columns of the packed sequence: prompts padded on the left, then chosen and rejected, each padded on the right."""

    prompt: int
    """Number of columns of the prompt."""
    chosen: int
    """Number of columns of chosen."""
    rejected: int
    """Number of columns of rejected."""
    has_padding: bool
    """True if any column of any row is padding."""
    kernel: str = "default"
    """Kernel of causal attention, see `prefix_attention.kernels`."""
    packing: Packing | None = None
    """Tokens without padding, if the kernel is "varlen"."""

    @property
    def rejected_start(self) -> int:
        """First column of rejected."""
        return self.prompt + self.chosen

    @property
    def total(self) -> int:
        """Number of columns of the packed sequence."""
        return self.rejected_start + self.rejected

    def logical_positions(self, device: torch.device) -> Tensor:
        """Return the position of each column in its own sequence [prompt][completion], (total,)."""
        column = torch.arange(self.total, device=device)
        return torch.where(column >= self.rejected_start, column - self.chosen, column)

    def predicting_columns(self, device: torch.device) -> Tensor:
        """Return the column whose hidden state predicts each completion token, (chosen + rejected,).

        The last column of the prompt predicts the first token of both completions.
        """
        last = torch.tensor([self.prompt - 1], device=device)
        columns = torch.arange(self.prompt, self.total, device=device)
        return torch.cat([last, columns[: self.chosen - 1], last, columns[self.chosen : -1]])


@dataclass(frozen=True)
class RightPadded:
    """Separate sequences, each padded on the right. A causal model needs no mask for their tokens."""

    total: int
    """Number of columns."""


def token_places(layout: Layout, lengths: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Find the completions' tokens, so that the training step needs no boolean mask, for which the host would wait.

    Args:
        layout: columns of the packed sequence.
        lengths: number of tokens of prompt, chosen and rejected, (rows,) each.

    Returns:
        For "shared_prefix" and "separate", (2, tokens): the place of the hidden state that predicts each token, among the
        flattened (sequences, columns) of this layout, and the token's place among the flattened (rows, columns of
        completions). Separate sequences are those of `shared_prefix.separate_inputs`, padded on the right.
    """
    width = max(layout.rejected_start, layout.prompt + layout.rejected)
    rows, columns = len(lengths[0]), layout.chosen + layout.rejected
    shared: list[list[Tensor]] = [[] for _ in range(rows)]
    separate: list[Tensor] = []
    predicting = layout.predicting_columns(torch.device("cpu"))
    for side, first in ((1, 0), (2, layout.chosen)):
        for row, (prompt, length) in enumerate(zip(lengths[0], lengths[side], strict=True)):
            column = torch.arange(length)
            token, sequence = row * columns + first + column, row + (side - 1) * rows
            shared[row].append(torch.stack([row * layout.total + predicting[first + column], token]))
            separate.append(torch.stack([sequence * width + prompt - 1 + column, token]))
    return {
        "shared_prefix": torch.cat([part for parts in shared for part in parts], dim=1),
        "separate": torch.cat(separate, dim=1),
    }


def packed_tokens(layout: Layout, lengths: Sequence[Sequence[int]]) -> dict[str, dict[str, Any]]:
    """List the fields of `Packing`, as a dict that is moved to the device with a batch.

    Args:
        layout: columns of the packed sequence.
        lengths: number of tokens of prompt, chosen and rejected, (rows,) each.
    """
    rows = list(zip(*lengths, strict=True))
    p, s = layout.prompt, layout.rejected_start
    columns = {
        "first": [list(range(p - prompt, p + chosen)) for prompt, chosen, _ in rows],
        "tail": [list(range(s, s + rejected)) for *_, rejected in rows],
        "tail_keys": [[*range(p - prompt, p), *range(s, s + rejected)] for prompt, _, rejected in rows],
    }
    return {
        name: {
            "places": torch.cat([torch.tensor(part) + row * layout.total for row, part in enumerate(parts)]),
            "ends": torch.tensor([0, *itertools.accumulate(len(part) for part in parts)], dtype=torch.int32),
            "longest": max(len(part) for part in parts),
        }
        for name, parts in columns.items()
    }


CURRENT: contextvars.ContextVar[Layout | RightPadded | None] = contextvars.ContextVar("layout", default=None)
"""Layout of the sequences that a model runs on. None: the model chooses its masks alone."""


@contextlib.contextmanager
def use_layout(layout: Layout | RightPadded) -> Iterator[None]:
    """Context manager in which masks are built for this layout."""
    token = CURRENT.set(layout)
    try:
        yield
    finally:
        CURRENT.reset(token)
