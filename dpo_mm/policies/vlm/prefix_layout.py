"""Columns of a packed sequence [images + prompt][chosen][rejected]."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


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


CURRENT: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)
"""Layout of the packed sequence that a model runs on, or None."""


@contextlib.contextmanager
def use_layout(layout: Layout) -> Iterator[None]:
    """Context manager in which masks are built for this layout."""
    token = CURRENT.set(layout)
    try:
        yield
    finally:
        CURRENT.reset(token)
