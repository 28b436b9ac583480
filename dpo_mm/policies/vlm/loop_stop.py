"""Stop a response that has begun to repeat itself, instead of generating the loop up to the token limit.

A loop is a unit of up to MAX_PERIOD tokens that repeats. A response is stopped when its loop is longer than any repetition
in its reference text by MIN_TOKENS tokens and by MIN_REPEATS repeats. `python -m tests.bench.loop_stop` shows that no
response that was stopped would have ended by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

MAX_PERIOD = 64
MIN_TOKENS, MIN_REPEATS = 64, 8


class LoopRuns:
    """Lengths of the repetitions at the end of growing sequences, for each period.

    Attributes:
        lengths: tokens that repeat the token one period before, up to the last token, (rows, MAX_PERIOD). Column p - 1 is
            period p.
    """

    def __init__(self, rows: int, device: Any) -> None:
        self.lengths = torch.zeros(rows, MAX_PERIOD, dtype=torch.long, device=device)
        self.periods = torch.arange(1, MAX_PERIOD + 1, device=device)

    def add(self, ids: Tensor) -> None:
        """Take the last token of sequences (rows, tokens) into account. Call it for each new token."""
        before = ids[:, -1 - MAX_PERIOD : -1].flip(1)
        equal = torch.zeros_like(self.lengths, dtype=torch.bool)
        equal[:, : before.shape[1]] = before == ids[:, -1:]
        self.lengths = (self.lengths + 1) * equal

    def repetitions(self) -> Tensor:
        """Length of the repetition at the end with its first unit, or 0 below two repeats, (rows, MAX_PERIOD)."""
        return torch.where(self.lengths >= self.periods, self.lengths + self.periods, 0)


class LoopStop(StoppingCriteria):
    """Stopping criterion of transformers' `generate`.

    Args:
        prompt_tokens: tokens before the responses.
        allowed: tokens of a repetition that each response may have, (rows,), see `longest_repetition`.

    Attributes:
        stopped_at: tokens of each response when it was stopped, (rows,), 0 if it was not.
    """

    def __init__(self, prompt_tokens: int, allowed: Tensor) -> None:
        self.prompt_tokens, self.runs = prompt_tokens, LoopRuns(len(allowed), allowed.device)
        self.needed = allowed[:, None] + torch.clamp(MIN_REPEATS * self.runs.periods, min=MIN_TOKENS)
        self.stopped_at = torch.zeros_like(allowed)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        response = input_ids[:, self.prompt_tokens :]
        self.runs.add(response)
        stop = (self.runs.repetitions() >= self.needed).any(1)
        self.stopped_at = torch.where((self.stopped_at == 0) & stop, response.shape[1], self.stopped_at)
        return stop


def longest_repetition(ids: Sequence[int]) -> int:
    """Return the length of the longest repetition in a sequence of tokens, with all its repeats. 0 if nothing repeats."""
    runs, longest = LoopRuns(1, "cpu"), 0
    sequence = torch.tensor([list(ids)])
    for end in range(1, len(ids) + 1):
        runs.add(sequence[:, :end])
        longest = max(longest, int(runs.repetitions().max()))
    return longest
