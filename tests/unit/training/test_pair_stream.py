"""The order of training as data: groups in batches of their own, each row equally often, whoever asks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from dpo_mm.config import TrainConfig
from dpo_mm.training.pair_stream import PairStream, eval_stream, training_stream


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


def test_rows_without_buckets_have_a_new_order_in_each_epoch_and_for_each_seed() -> None:
    """It catches one order for all epochs, and one for all seeds."""
    rows = [{"id": str(n)} for n in range(12)]
    order = lambda seed, epoch: [stream(rows, seed=seed)[12 * epoch + n]["id"] for n in range(12)]
    found = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(ids, key=int) == [row["id"] for row in rows] != ids for ids in found)
    assert len({tuple(ids) for ids in found}) == 4


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


def orders(rows: Rows, seen: PairStream, epochs: int) -> dict[int, list[list[int]]]:
    """Order of the rows of each bucket in each epoch, counted from the bucket's start."""
    found: dict[int, list[list[int]]] = {n: [[] for _ in range(epochs + 2)] for n in range(len(rows.buckets))}
    for number in range(epochs * len(rows)):
        row = seen[number]
        which = group_of(rows, row)
        found[which][row["visit"]].append(int(row["id"]) - rows.buckets[which].start)
    return found


def test_rows_of_a_bucket_are_shuffled_in_orders_of_their_own() -> None:
    """It catches buckets without shuffling, one order for all buckets, one order for all epochs, and batches in order."""
    rows = grouped(12, 12)
    seen = stream(rows)
    found = orders(rows, seen, 4)
    whole = [order for bucket in found.values() for order in bucket[:4]]
    assert all(sorted(order) == list(range(12)) != order for order in whole)
    assert len({tuple(order) for order in whole}) == 8
    buckets = [group_of(rows, seen[number]) for number in range(0, 96, 4)]
    assert buckets != sorted(buckets) and [buckets[n : n + 6] for n in (0, 6, 12)] != [buckets[:6]] * 3


def test_mirrored_batches_have_one_bucket_and_half_as_many_rows() -> None:
    """It catches batches of a bucket that are counted in rows, not in rows and their mirror images."""
    rows = grouped(5, 3, 9)
    seen = stream(rows, antithetic=True)
    found = [seen[number] for number in range(2 * 12 * 17 // 4 * 4)]
    for start in range(0, len(found), 4):
        batch = found[start : start + 4]
        assert len({group_of(rows, row) for row in batch}) == 1
        assert [row["sign"] for row in batch] == [1, -1, 1, -1]
        assert (batch[0]["id"], batch[2]["id"]) == (batch[1]["id"], batch[3]["id"])
    assert set(Counter((row["id"], row["visit"]) for row in found).values()) == {2}
    first_epoch = [stream(grouped(3, 5), antithetic=True, batch_size=2)[number] for number in range(16)]
    assert Counter((row["id"], row["visit"]) for row in first_epoch) == {(str(n), 0): 2 for n in range(8)}


@pytest.mark.parametrize("antithetic", [False, True])
def test_strata_and_length_are_those_of_a_step_on_all_processes(antithetic: bool) -> None:
    """It catches strata per process or per micro-batch, which leave parts of the schedule out of a step."""
    config = TrainConfig(
        "m", "p", "o", steps=10, batch_size=2, accumulate=3, stratified_timesteps=True, antithetic_noise=antithetic
    )
    rows = [{"id": str(n)} for n in range(5)]
    seen = training_stream(config, rows, processes=2)
    assert (len(seen), seen.num_strata, seen.batch_size) == (120, 12, 2)
    count = 6 if antithetic else 12
    step = Counter(seen[number]["stratum"] for number in range(12, 24))
    assert step == {(stratum, count): 12 // count for stratum in range(count)}
    assert training_stream(TrainConfig("m", "p", "o"), rows, processes=2).num_strata == 0


def test_group_by_length_pads_less_and_its_order_is_that_of_any_number_of_processes() -> None:
    """It catches an order that depends on processes or on items before, and an epoch with a row twice."""
    lengths = [int(length) for length in np.random.default_rng(0).lognormal(4, 1, 203)]
    rows = [
        {"id": str(n), "prompt_ids": [0] * (length - 1), "chosen_ids": [0], "rejected_ids": []}
        for n, length in enumerate(lengths)
    ]

    def ids(batch_size: int, accumulate: int, processes: int, strategy: str = "group_by_length") -> list[int]:
        config = TrainConfig(
            "m", "p", "o", steps=60, batch_size=batch_size, accumulate=accumulate, train_sampling_strategy=strategy
        )
        stream = training_stream(config, rows, processes)
        items = {n: int(stream[n]["id"]) for n in np.random.default_rng(1).permutation(len(stream))}
        return [items[n] for n in range(len(stream))]

    grouped, shuffled = ids(8, 1, 1), ids(8, 1, 1, "random")
    assert grouped == ids(2, 2, 2) == ids(4, 1, 2)
    epochs = [grouped[:203], grouped[203:406]]
    assert epochs[0] != epochs[1] and all(sorted(epoch) == list(range(203)) for epoch in epochs)
    assert lengths[grouped[0]] == max(lengths)
    padded = [
        sum(8 * max(lengths[n] for n in order[start : start + 8]) for start in range(0, 400, 8))
        for order in (grouped, shuffled)
    ]
    assert padded[0] < 0.6 * padded[1]


def test_images_are_evaluated_at_a_draw_of_each_quarter_of_the_schedule_and_text_once() -> None:
    """It catches evaluation at one draw of an image, which is noise, and draws that are not spread over the schedule."""
    config = TrainConfig("m", "p", "o", batch_size=2)
    rows = [{"id": str(n)} for n in range(3)]
    images, text = (eval_stream(rows, config, modality=modality) for modality in ("image", "text"))
    found = [images[number] for number in range(len(images))]
    assert len(found) == 12 and len(text) == 3 and [text[n]["id"] for n in range(3)] == ["0", "1", "2"]
    for row in rows:
        strata = {each["visit"]: each["stratum"] for each in found if each["id"] == row["id"]}
        assert sorted(strata) == [0, 1, 2, 3] and set(strata.values()) == {(n, 4) for n in range(4)}
    assert [each["number"] for each in found] == list(range(12))


def test_evaluation_rows_that_fill_up_a_bucket_have_no_number() -> None:
    config = TrainConfig("m", "p", "o", batch_size=5)
    rows = grouped(3, 2)
    watched = eval_stream(rows, config, modality="image")
    found = [watched[number] for number in range(len(watched))]
    assert len(watched) == 15 + 10 and [row["number"] for row in found].count(-1) == 3 + 2
    counted = Counter((row["id"], row["visit"]) for row in found if row["number"] >= 0)
    assert len(counted) == 20 and set(counted.values()) == {1}
