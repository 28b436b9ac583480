"""Votes are stored once, survive a killed process, and become preference rows."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dpo_mm.data.schema import load_pairs, make_image_rows
from dpo_mm.labels.agreement import Agreement, agreement
from dpo_mm.labels.export import export, preset_for, tally, train_command
from dpo_mm.labels.pairs import open_pairs
from dpo_mm.labels.presenting import BLOCK
from dpo_mm.labels.store import Vote, VoteStore, source_of
from tests.conftest import noise_image, rows

IDS = [f"pair-{n}" for n in range(30)]


@pytest.fixture
def store(tmp_path: Path) -> VoteStore:
    return VoteStore(tmp_path / "votes.sqlite", IDS, source="a set")


def label(store: VoteStore, annotator: str, count: int, choice: str = "left") -> list[str]:
    """Vote on `count` presentations with one choice. Return the pairs in the order of presentation."""
    pairs = []
    for _ in range(count):
        shown = store.next_pair(annotator)
        assert shown and store.cast(annotator, shown.id, choice)
        pairs.append(shown.pair)
    return pairs


def label_all(store: VoteStore, annotator: str) -> list[str]:
    pairs = []
    while shown := store.next_pair(annotator):
        assert store.cast(annotator, shown.id, "left")
        pairs.append(shown.pair)
    return pairs


def test_show_without_vote_returns_the_same_presentation(store: VoteStore) -> None:
    first = store.next_pair("Ada")
    assert first and store.next_pair("Ada") == first
    reopened = VoteStore(store.path, IDS, source="a set")
    assert reopened.next_pair(" Ada ") == first
    assert reopened.cast("Ada", first.id, "tie")
    assert reopened.next_pair("Ada") != first


def test_show_repeats_one_pair_in_ten(store: VoteStore) -> None:
    pairs = label_all(store, "Ada")
    votes = store.votes()
    first_votes = [vote.pair for vote in votes if not vote.is_repeat]
    assert sorted(first_votes) == sorted(IDS)
    assert 3 <= sum(vote.is_repeat for vote in votes) <= 4
    for block in range(len(votes) // BLOCK):
        assert sum(vote.is_repeat for vote in votes[block * BLOCK : (block + 1) * BLOCK]) == 1
    for index, vote in enumerate(votes):
        if vote.is_repeat:
            assert vote.pair in pairs[: index - 3], "a repeat comes at least three presentations later"


def test_votes_left_and_right_are_random_and_stored(store: VoteStore) -> None:
    for annotator in "ABC":
        label(store, annotator, 25)
    swapped = [vote.swapped for vote in store.votes()]
    assert 13 <= sum(swapped) <= 62, "of 75: a fair coin fails this once in 10^7"
    assert all(vote.choice == "ab"[vote.swapped] for vote in store.votes()), "left is b exactly if the pair was swapped"


def test_votes_right_is_the_other_image(store: VoteStore) -> None:
    label(store, "Ada", 12, "right")
    assert all(vote.choice == "ba"[vote.swapped] for vote in store.votes())


def test_show_pairs_with_fewest_presentations_come_first(store: VoteStore) -> None:
    ada, bob = label(store, "Ada", 5), label(store, "Bob", 5)
    assert not set(ada) & set(bob)
    assert store.progress("Ada").covered_pairs == 10
    assert ada != sorted(ada), "the order is not the dataset's"


def test_cast_counts_one_vote_per_presentation(store: VoteStore) -> None:
    shown = store.next_pair("Ada")
    assert shown
    assert store.cast("Ada", shown.id, "left")
    assert not store.cast("Ada", shown.id, "right"), "a second key on the same presentation"
    assert not store.cast("Bob", shown.id, "right"), "another annotator's presentation"
    assert not store.cast("Ada", 999, "left"), "an unknown presentation"
    assert len(store.votes()) == 1
    with pytest.raises(ValueError, match=r"choice 'both' is unknown\. Expected one of left, right"):
        store.cast("Ada", shown.id, "both")


def test_undo_presents_the_pair_again_and_keeps_the_record(store: VoteStore) -> None:
    first, second = label(store, "Ada", 2)
    pending = store.next_pair("Ada")
    label(store, "Bob", 1)
    assert pending and store.undo("Ada") and store.undo("Ada") and not store.undo("Ada")
    assert [vote.annotator for vote in store.votes()] == ["Bob"], "nobody else's vote is touched"
    assert label(store, "Ada", 3, "tie") == [first, second, pending.pair]
    with sqlite3.connect(store.path) as connection:
        assert connection.execute("SELECT count(*) FROM votes WHERE undone_at IS NOT NULL").fetchone() == (2,)


def test_progress_counts_votes_and_annotators(store: VoteStore) -> None:
    label(store, "Ada", 3)
    label(store, "Bob", 2, "skip")
    progress = store.progress("Ada")
    assert (progress.own_pairs, progress.num_pairs, progress.votes, progress.annotators, progress.covered_pairs) == (
        3,
        30,
        5,
        2,
        5,
    )
    assert store.progress("new").own_pairs == 0


def test_show_invalid_name_raises(store: VoteStore) -> None:
    for name in ("", "  ", "x" * 81):
        with pytest.raises(ValueError, match="Expected 1 to 80"):
            store.next_pair(name)


def test_vote_store_other_dataset_or_file_raises(store: VoteStore, tmp_path: Path) -> None:
    shown = store.next_pair("Ada")
    assert shown
    with pytest.raises(ValueError, match="has votes on 1 pairs that are not in other"):
        VoteStore(store.path, ["x"], source="other")
    assert source_of(store.path) == "a set", "a refused dataset is not stored"
    store.record_digest(shown.pair, "one")
    store.record_digest(shown.pair, "one")
    with pytest.raises(ValueError, match=r"pair .* has changed"):
        store.record_digest(shown.pair, "two")
    broken = tmp_path / "notes.txt"
    broken.write_text("not a database, but long enough to be taken for one" * 20)
    with pytest.raises(ValueError, match="not a file of votes"):
        VoteStore(broken, IDS, source="a set")
    with pytest.raises(ValueError, match="not a file of votes"):
        source_of(broken)
    with pytest.raises(ValueError, match="no such file"):
        source_of(tmp_path / "none.sqlite")


def vote_in_process(path: str, annotator: str, count: int) -> None:
    store = VoteStore(path, IDS, source="a set")
    for _ in range(count):
        if (shown := store.next_pair(annotator)) is None:
            return
        assert store.cast(annotator, shown.id, "left") or annotator == "both", "two windows of one person may meet"


def test_concurrent_processes_store_every_vote_once(tmp_path: Path) -> None:
    path = str(tmp_path / "votes.sqlite")
    context = multiprocessing.get_context("fork")
    people = [
        context.Process(target=vote_in_process, args=(path, annotator, 25))
        for annotator in ("Ada", "Bob", "Cy", "both", "both")
    ]
    for person in people:
        person.start()
    for person in people:
        person.join()
    assert [person.exitcode for person in people] == [0] * 5
    store = VoteStore(path, IDS, source="a set")
    counts = Counter(vote.annotator for vote in store.votes())
    assert counts["Ada"] == counts["Bob"] == counts["Cy"] == 25
    assert 25 <= counts["both"] <= 34
    assert max(Counter((v.annotator, v.pair, v.is_repeat) for v in store.votes()).values()) == 1


VOTER = """
import sys
from dpo_mm.labels.store import VoteStore
store = VoteStore(sys.argv[1], [f"pair-{n}" for n in range(2000)], source="a set")
while shown := store.next_pair("Ada"):
    assert store.cast("Ada", shown.id, "left")
    print(shown.id, flush=True)
"""


def test_killed_process_loses_no_confirmed_vote(tmp_path: Path) -> None:
    path = tmp_path / "votes.sqlite"
    with subprocess.Popen([sys.executable, "-c", VOTER, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        confirmed = [int(process.stdout.readline()) for _ in range(20)]
        os.kill(process.pid, signal.SIGKILL)
        confirmed += [int(line) for line in process.stdout.read().split("\n")[:-1]]
    with sqlite3.connect(path) as connection:
        stored = {row[0] for row in connection.execute("SELECT presentation FROM votes")}
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert set(confirmed) <= stored and len(stored) <= len(confirmed) + 1
    store = VoteStore(path, [f"pair-{n}" for n in range(2000)], source="a set")
    label(store, "Ada", 3)


def vote(annotator: str, pair: str, choice: str, is_repeat: bool = False) -> Vote:
    return Vote(annotator, pair, is_repeat, False, choice, 0.0, 1.0)


def test_tally_matches_hand_count() -> None:
    votes = [
        *(vote(annotator, "one", choice) for annotator, choice in zip("ABCD", ("a", "a", "tie", "b"))),
        *(vote(annotator, "split", choice) for annotator, choice in zip("AB", ("a", "b"))),
        *(vote(annotator, "bad", choice) for annotator, choice in zip("ABC", ("both_bad", "both_bad", "a"))),
        vote("A", "worst", "both_bad"),
        vote("A", "skipped", "skip"),
        vote("A", "one", "b", is_repeat=True),
    ]
    assert tally(votes) == {
        "one": {"preference": "a", "p_a": 0.625, "votes_a": 2, "votes_b": 1},
        "split": {"preference": "tie", "p_a": 0.5, "votes_a": 1, "votes_b": 1},
        "bad": {"preference": "both_bad", "p_a": 1.0, "votes_a": 1, "votes_b": 0},
        "worst": {"preference": "both_bad", "p_a": None, "votes_a": 0, "votes_b": 0},
    }


def test_agreement_matches_hand_count() -> None:
    votes = [
        *(vote(annotator, "one", choice) for annotator, choice in zip("ABC", ("a", "a", "b"))),
        vote("A", "two", "tie"),
        vote("B", "two", "skip"),
        vote("A", "one", "a", is_repeat=True),
        vote("B", "one", "b", is_repeat=True),
        vote("C", "one", "skip", is_repeat=True),
    ]
    assert agreement(votes) == Agreement(same_annotator=1, repeats=2, two_annotators=1, comparisons=3)


def test_export_rows_have_preferences_and_counts(pairs: str, tmp_path: Path) -> None:
    pair_rows = open_pairs(pairs)
    path = str(tmp_path / "votes.sqlite")
    store = VoteStore(path, pair_rows["id"], source=pairs)
    choices = dict(zip(label(store, "Ada", 4, "left"), (vote.choice for vote in store.votes())))
    shown = store.next_pair("Ada")
    assert shown and store.cast("Ada", shown.id, "skip")
    printed = export(path, str(tmp_path / "out" / "labels.parquet"))
    exported = load_pairs(str(tmp_path / "out" / "labels.parquet"))
    assert {row["id"]: row["preference"] for row in exported} == choices and printed["pairs"] == "4 of 12"
    original = {row["id"]: row for row in load_pairs(pairs)}
    for row in exported:
        assert row["p_a"] == float(row["preference"] == "a") and row["votes_a"] + row["votes_b"] == 1
        assert row["source"] == "labelled by 1 person" and row["prompt"] == original[row["id"]]["prompt"]
        assert row["image_a"].tobytes() == original[row["id"]]["image_a"].tobytes()


def test_export_holds_the_images_of_one_row_group(pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an export whose memory grows with the number of labelled images."""
    from dpo_mm.labels import export as module

    path = str(tmp_path / "votes.sqlite")
    label(VoteStore(path, open_pairs(pairs)["id"], source=pairs), "Ada", 8)
    whole = export(path, str(tmp_path / "whole.parquet"))
    monkeypatch.setattr(module, "GROUP_ROWS", 3)
    assert export(path, str(tmp_path / "parts.parquet")) == whole
    tables = [pq.ParquetFile(tmp_path / f"{name}.parquet") for name in ("whole", "parts")]
    assert [table.num_row_groups for table in tables] == [1, -(-tables[0].metadata.num_rows // 3)] and tables[
        0
    ].read().equals(tables[1].read())
    items = [{"a": ["é", {"b": "x\ny"}]}, {}, {"c": [1, []]}]
    module._write_json(iter(items), tmp_path / "items.json")
    assert (tmp_path / "items.json").read_text() == json.dumps(items, ensure_ascii=False, indent=1)


def test_export_changed_pair_raises(write_pairs: Callable[..., str], tmp_path: Path) -> None:
    from dpo_mm.labels.pairs import pair_digest

    path, pair_rows = tmp_path / "votes.sqlite", open_pairs(write_pairs(rows(3)))
    store = VoteStore(path, pair_rows["id"], source="here")
    with pytest.raises(ValueError, match="there are no votes except skips"):
        export(str(path), str(tmp_path / "labels.parquet"), pairs=write_pairs(rows(3)))
    label(store, "Ada", 3)
    for row in pair_rows:
        store.record_digest(row["id"], pair_digest(row))
    changed = rows(3)
    changed[1]["prompt"] = "something else"
    with pytest.raises(ValueError, match="pair 'row-1' has changed"):
        export(str(path), str(tmp_path / "labels.parquet"), pairs=write_pairs(changed))
    assert not (tmp_path / "labels.parquet").exists()


def test_open_pairs_folder_of_two_models(tmp_path: Path) -> None:
    for model in ("base", "tuned"):
        (tmp_path / model).mkdir()
        for n, name in enumerate(("0001", "a-red_star")):
            noise_image(n + 10 * (model == "base")).save(tmp_path / model / f"{name}.png")
    (tmp_path / "0001.txt").write_text("a big circle\n")
    pair_rows = open_pairs(str(tmp_path))
    assert list(pair_rows["prompt"]) == ["a big circle", "a red star"]
    assert list(pair_rows["model_a"]) == ["base", "base"] and list(pair_rows["model_b"]) == ["tuned", "tuned"]
    store = VoteStore(tmp_path / "votes.sqlite", pair_rows["id"], source=str(tmp_path))
    label(store, "Ada", 2, "tie")
    export(str(store.path), str(tmp_path / "labels.parquet"))
    exported = load_pairs(str(tmp_path / "labels.parquet"))
    assert exported[0]["image_b"].tobytes() == noise_image(0).tobytes() and list(exported["preference"]) == [
        "tie",
        "tie",
    ]
    (tmp_path / "tuned" / "0001.png").unlink()
    with pytest.raises(
        ValueError, match="base/ and tuned/ do not have the same images \\('0001' is only in one of them\\)"
    ):
        open_pairs(str(tmp_path))
    with pytest.raises(ValueError, match=r"has 0 subfolders and no .*Expected two"):
        open_pairs(str(tmp_path / "base"))


def test_open_pairs_repeated_id_raises(write_pairs: Callable[..., str]) -> None:
    repeated = rows(3)
    repeated[2]["id"] = "row-0"
    with pytest.raises(ValueError, match="several rows have the id 'row-0'"):
        open_pairs(write_pairs(repeated))


def test_train_command_quotes_paths_and_names_an_existing_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = train_command("my votes.sqlite", preset_for(make_image_rows([{**rows(1)[0], "prompt": "a red star"}])))
    assert "label export 'my votes.sqlite' --output 'my votes.parquet' && dpo-mm train " in command
    assert "/faithfulness-shapes.yaml" in command
    photos = make_image_rows([{**rows(1)[0], "prompt": "a photo of a dog"}])
    assert preset_for(photos).name == "faithfulness-sd15.yaml"
    recipe = command.split("dpo-mm train ")[1].split(" --pairs")[0]
    assert Path(recipe).is_file()
