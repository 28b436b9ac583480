"""Responses in a repetition loop are stopped, and no other ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dpo_mm.policies.vlm.loop_stop import MAX_PERIOD, MIN_REPEATS, MIN_TOKENS, LoopStop, longest_repetition
from dpo_mm.policies.vlm.vlm_policy import VisionLanguage
from tests.contracts.tiny_vlms import build


def stopped_at(responses: list[list[int]], allowed: list[int], prompt: int = 3) -> list[int]:
    """Feed responses of equal length token by token, as `generate` does, until all are stopped or at their end."""
    stop = LoopStop(prompt, torch.tensor(allowed))
    ids = torch.tensor([[9] * prompt + response for response in responses])
    for end in range(prompt + 1, ids.shape[1] + 1):
        stop(ids[:, :end], None)
    return stop.stopped_at.tolist()


@pytest.mark.parametrize("period", [1, 3, 8, 20, MAX_PERIOD])
def test_loop_is_stopped_after_the_needed_tokens_and_repeats(period: int) -> None:
    """Catches an end that is one token early or late, and a prompt that counts as part of the loop."""
    unit = list(range(100, 100 + period))
    needed = max(MIN_TOKENS, MIN_REPEATS * period)
    response = [7, 8, *(unit * 700)][:600]
    assert stopped_at([response], [0]) == [2 + needed]
    assert stopped_at([response], [5]) == [2 + needed + 5]


def test_text_without_a_long_loop_is_not_stopped() -> None:
    counting = list(range(300))
    nearly = ([*range(20), 50, *range(20), 51] * 10)[:300]  # no exact repeat of 20 tokens
    broken = ([5] * (MIN_TOKENS - 1) + [6]) * 4 + [5] * 44
    assert stopped_at([counting], [0]) == [0]
    assert stopped_at([broken], [0]) == [0]
    assert stopped_at([nearly[:150]], [0]) == [0]


def test_rows_of_a_batch_are_stopped_apart() -> None:
    loop, other = [1, *([5] * 199)], list(range(200))
    assert stopped_at([loop, other, [2, *loop[:-1]]], [0, 0, 10]) == [1 + MIN_TOKENS, 0, 2 + MIN_TOKENS + 10]


@pytest.mark.parametrize(
    ("ids", "length"),
    [([], 0), ([1, 2, 3], 0), ([1, 1], 2), ([4, 1, 2, 1, 2, 1, 3], 5), ([7] * 30, 30), ([1, 2, 3, 1, 2], 0)],
)
def test_longest_repetition_counts_all_repeats(ids: list[int], length: int) -> None:
    assert longest_repetition(ids) == length


def test_stopped_response_is_the_beginning_of_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny random model loops at once. Catches rows that are cut elsewhere, padding that ends a turn, and changed samples."""
    monkeypatch.setattr("dpo_mm.policies.vlm.loop_stop.MIN_TOKENS", 8)
    monkeypatch.setattr("dpo_mm.policies.vlm.loop_stop.MIN_REPEATS", 2)
    policy = VisionLanguage(*build("llama"), "m")
    messages = [f"describe {'red ' * n}" for n in range(6)]
    ask: dict[str, Any] = {"images": [[]] * 6, "messages": messages, "max_new_tokens": 80, "do_sample": False}
    whole = policy.generate(**ask)
    stopped = policy.generate(**ask, loop_references=[""] * 6)
    allowed = policy.generate(**ask, loop_references=["red " * 200] * 6)
    shorter = [one.tokens < other.tokens for one, other in zip(stopped, whole, strict=True)]
    assert any(shorter)
    for one, other, short in zip(stopped, whole, shorter, strict=True):
        assert other.text.startswith(one.text.rstrip("\N{REPLACEMENT CHARACTER}"))
        assert (one.hit_limit and other.hit_limit) if short else one == other
    assert allowed == whole
