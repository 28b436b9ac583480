"""The order of training as data: groups in batches of their own, each row equally often, whoever asks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from dpo_mm.training.pair_stream import PairStream


class Rows(list[dict[str, Any]]):
    buckets: list[range]


def grouped(*sizes: int) -> Rows:
    rows = Rows({"id": str(n)} for n in range(sum(sizes)))
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    rows.buckets = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return rows


def stream(rows: Any, length: int = 10**6, **more: Any) -> PairStream:
    return PairStream(rows, seed=more.pop("seed", 3), length=length, batch_size=more.pop("batch_size", 4), **more)


def group_of(rows: Rows, row: dict[str, Any]) -> int:
    return next(n for n, group in enumerate(rows.buckets) if int(row["id"]) in group)


@pytest.mark.parametrize("sizes", [(5, 3, 9), (1, 40), (2, 2), (16, 16, 1)])
def test_batch_has_one_bucket_and_each_row_once_per_epoch(sizes: tuple[int, ...]) -> None:
    rows = grouped(*sizes)
    seen = stream(rows)
    total = 12 * sum(sizes) // 4 * 4
    found = [seen[number] for number in range(total)]
    for start in range(0, total, 4):
        assert len({group_of(rows, row) for row in found[start : start + 4]}) == 1
    counts = Counter((row["id"], row["visit"]) for row in found)
    assert set(counts.values()) == {1}
    visits = Counter(row["id"] for row in found)
    assert set(visits) == {row["id"] for row in rows}
    assert max(visits.values()) - min(visits.values()) <= 4 + 1


def test_epochs_differ_and_depend_on_the_seed() -> None:
    rows = grouped(8, 12)
    order = lambda **more: [stream(rows, **more)[n]["id"] for n in range(20)]
    assert order() == order() != order(seed=4)
    whole = [stream(rows)[n]["id"] for n in range(40)]
    assert sorted(whole[:20]) == sorted(whole[20:]) and whole[:20] != whole[20:]


def test_item_depends_on_its_index_only() -> None:
    rows = grouped(5, 3, 9)
    walked = [stream(rows)[n] for n in range(400)]
    fresh = stream(rows)
    assert [fresh[n] for n in (399, 7, 250)] == [walked[399], walked[7], walked[250]]


def test_one_bucket_has_the_order_of_rows_without_buckets() -> None:
    rows = grouped(7)
    plain = [{"id": str(n)} for n in range(7)]
    assert [stream(rows)[n] for n in range(30)] == [stream(plain)[n] for n in range(30)]


def test_evaluation_rows_are_in_order_in_full_batches() -> None:
    rows = grouped(3, 2)
    watched = stream(rows, shuffle=False, num_fixed_draws=2, length=12)
    found = [(int(watched[n]["id"]), watched[n]["visit"]) for n in range(12)]
    assert found[:8] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 0), (1, 0)]
    assert found[8:] == [(3, 0), (4, 0), (3, 1), (4, 1)]
