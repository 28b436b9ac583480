from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_mm.data.schema import load_pairs
from dpo_mm.labels.export import Agreement, agreement, export, tally, train_command
from dpo_mm.labels.pairs import open_pairs
from dpo_mm.labels.store import BLOCK, Vote, VoteStore, source_of
from tests.conftest import picture, rows

IDS = [f"pair-{n}" for n in range(30)]


@pytest.fixture
def store(tmp_path: Path) -> VoteStore:
    return VoteStore(tmp_path / "votes.sqlite", IDS, source="a set")


def label(store: VoteStore, who: str, count: int, choice: str = "left") -> list[str]:
    """Answers so many showings alike; the pairs in the order they came."""
    pairs = []
    for _ in range(count):
        shown = store.show(who)
        assert shown and store.cast(who, shown.id, choice)
        pairs.append(shown.pair)
    return pairs


def all_of(store: VoteStore, who: str) -> list[str]:
    pairs = []
    while shown := store.show(who):
        assert store.cast(who, shown.id, "left")
        pairs.append(shown.pair)
    return pairs


def test_what_is_open_is_shown_again(store: VoteStore) -> None:
    first = store.show("Ada")
    assert first and store.show("Ada") == first
    again = VoteStore(store.path, IDS, source="a set")
    assert again.show(" Ada ") == first
    assert again.cast("Ada", first.id, "tie")
    assert again.show("Ada") != first


def test_one_in_ten_is_a_repeat(store: VoteStore) -> None:
    pairs = all_of(store, "Ada")
    votes = store.votes()
    fresh = [vote.pair for vote in votes if not vote.again]
    assert sorted(fresh) == sorted(IDS)
    assert 3 <= sum(vote.again for vote in votes) <= 4
    for block in range(len(votes) // BLOCK):
        assert sum(vote.again for vote in votes[block * BLOCK : (block + 1) * BLOCK]) == 1
    for place, vote in enumerate(votes):
        if vote.again:
            assert vote.pair in pairs[: place - 3], "a repeat comes at least three showings later"


def test_sides_are_random_and_kept(store: VoteStore) -> None:
    for who in "ABC":
        label(store, who, 25)
    swapped = [vote.swapped for vote in store.votes()]
    assert 13 <= sum(swapped) <= 62, "of 75: a fair coin fails this once in 10^7"
    assert all(vote.said == "ab"[vote.swapped] for vote in store.votes()), "left is b exactly where sides are swapped"


def test_right_is_the_other_side(store: VoteStore) -> None:
    label(store, "Ada", 12, "right")
    assert all(vote.said == "ba"[vote.swapped] for vote in store.votes())


def test_pairs_that_few_have_seen_come_first(store: VoteStore) -> None:
    ada, bob = label(store, "Ada", 5), label(store, "Bob", 5)
    assert not set(ada) & set(bob)
    assert store.progress("Ada").covered == 10
    assert ada != sorted(ada), "the order is not the set's"


def test_a_vote_counts_once(store: VoteStore) -> None:
    shown = store.show("Ada")
    assert shown
    assert store.cast("Ada", shown.id, "left")
    assert not store.cast("Ada", shown.id, "right"), "a second key on the same showing"
    assert not store.cast("Bob", shown.id, "right"), "somebody else's showing"
    assert not store.cast("Ada", 999, "left"), "a showing that never was"
    assert len(store.votes()) == 1
    with pytest.raises(ValueError, match="choice 'both' is unknown; expected one of left, right"):
        store.cast("Ada", shown.id, "both")


def test_undo_reopens_and_keeps_the_record(store: VoteStore) -> None:
    first, second = label(store, "Ada", 2)
    waiting = store.show("Ada")
    label(store, "Bob", 1)
    assert waiting and store.undo("Ada") and store.undo("Ada") and not store.undo("Ada")
    assert [vote.labeller for vote in store.votes()] == ["Bob"], "nobody else's vote is touched"
    assert label(store, "Ada", 3, "tie") == [first, second, waiting.pair]
    with sqlite3.connect(store.path) as connection:
        assert connection.execute("SELECT count(*) FROM votes WHERE undone_at IS NOT NULL").fetchone() == (2,)


def test_progress_counts(store: VoteStore) -> None:
    label(store, "Ada", 3)
    label(store, "Bob", 2, "skip")
    mine = store.progress("Ada")
    assert (mine.mine, mine.total, mine.votes, mine.people, mine.covered) == (3, 30, 5, 2, 5)
    assert store.progress("new").mine == 0


def test_names_are_checked(store: VoteStore) -> None:
    for name in ("", "  ", "x" * 81):
        with pytest.raises(ValueError, match="expected 1 to 80"):
            store.show(name)


def test_another_set_is_refused(store: VoteStore, tmp_path: Path) -> None:
    shown = store.show("Ada")
    assert shown
    with pytest.raises(ValueError, match="holds votes on 1 pairs that other hasn't"):
        VoteStore(store.path, ["x"], source="other")
    assert source_of(store.path) == "a set", "a refused set leaves no mark"
    store.confirm(shown.pair, "one")
    store.confirm(shown.pair, "one")
    with pytest.raises(ValueError, match="had other pictures or another prompt"):
        store.confirm(shown.pair, "two")
    broken = tmp_path / "notes.txt"
    broken.write_text("not a database, but long enough to be taken for one" * 20)
    with pytest.raises(ValueError, match="not a file of votes"):
        VoteStore(broken, IDS, source="a set")
    with pytest.raises(ValueError, match="not a file of votes"):
        source_of(broken)
    with pytest.raises(ValueError, match="no such file"):
        source_of(tmp_path / "none.sqlite")


def work(path: str, who: str, count: int) -> None:
    store = VoteStore(path, IDS, source="a set")
    for _ in range(count):
        if (shown := store.show(who)) is None:
            return
        assert store.cast(who, shown.id, "left") or who == "both", "two windows of one person may meet"


def test_processes_lose_and_double_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "votes.sqlite")
    context = multiprocessing.get_context("fork")
    people = [context.Process(target=work, args=(path, who, 25)) for who in ("Ada", "Bob", "Cy", "both", "both")]
    for person in people:
        person.start()
    for person in people:
        person.join()
    assert [person.exitcode for person in people] == [0] * 5
    store = VoteStore(path, IDS, source="a set")
    counts = Counter(vote.labeller for vote in store.votes())
    assert counts["Ada"] == counts["Bob"] == counts["Cy"] == 25
    assert 25 <= counts["both"] <= 34
    assert max(Counter((v.labeller, v.pair, v.again) for v in store.votes()).values()) == 1


CONFIRMING = """
import sys
from dpo_mm.labels.store import VoteStore
store = VoteStore(sys.argv[1], [f"pair-{n}" for n in range(2000)], source="a set")
while shown := store.show("Ada"):
    assert store.cast("Ada", shown.id, "left")
    print(shown.id, flush=True)
"""


def test_kill_loses_no_confirmed_vote(tmp_path: Path) -> None:
    path = tmp_path / "votes.sqlite"
    with subprocess.Popen([sys.executable, "-c", CONFIRMING, str(path)], stdout=subprocess.PIPE, text=True) as labeller:
        assert labeller.stdout
        confirmed = [int(labeller.stdout.readline()) for _ in range(20)]
        os.kill(labeller.pid, signal.SIGKILL)
        confirmed += [int(line) for line in labeller.stdout.read().split("\n")[:-1]]
    with sqlite3.connect(path) as connection:
        kept = {row[0] for row in connection.execute("SELECT shown FROM votes")}
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert set(confirmed) <= kept and len(kept) <= len(confirmed) + 1
    store = VoteStore(path, [f"pair-{n}" for n in range(2000)], source="a set")
    label(store, "Ada", 3)


def vote(who: str, pair: str, said: str, again: bool = False) -> Vote:
    return Vote(who, pair, again, False, said, 0.0, 1.0)


def test_tally_by_hand() -> None:
    votes = [
        *(vote(who, "one", said) for who, said in zip("ABCD", ("a", "a", "tie", "b"))),
        *(vote(who, "split", said) for who, said in zip("AB", ("a", "b"))),
        *(vote(who, "bad", said) for who, said in zip("ABC", ("both_bad", "both_bad", "a"))),
        vote("A", "worst", "both_bad"),
        vote("A", "skipped", "skip"),
        vote("A", "one", "b", again=True),
    ]
    assert tally(votes) == {
        "one": {"preference": "a", "p_a": 0.625, "votes_a": 2, "votes_b": 1},
        "split": {"preference": "tie", "p_a": 0.5, "votes_a": 1, "votes_b": 1},
        "bad": {"preference": "both_bad", "p_a": 1.0, "votes_a": 1, "votes_b": 0},
        "worst": {"preference": "both_bad", "p_a": None, "votes_a": 0, "votes_b": 0},
    }


def test_agreement_by_hand() -> None:
    votes = [
        *(vote(who, "one", said) for who, said in zip("ABC", ("a", "a", "b"))),
        vote("A", "two", "tie"),
        vote("B", "two", "skip"),
        vote("A", "one", "a", again=True),
        vote("B", "one", "b", again=True),
        vote("C", "one", "skip", again=True),
    ]
    assert agreement(votes) == Agreement(same_self=1, repeats=2, same_others=1, meetings=3)


def test_votes_become_rows(pairs: str, tmp_path: Path) -> None:
    given = open_pairs(pairs)
    path = str(tmp_path / "votes.sqlite")
    store = VoteStore(path, given["id"], source=pairs)
    said = dict(zip(label(store, "Ada", 4, "left"), (vote.said for vote in store.votes())))
    shown = store.show("Ada")
    assert shown and store.cast("Ada", shown.id, "skip")
    printed = export(path, str(tmp_path / "out" / "labels.parquet"))
    found = load_pairs(str(tmp_path / "out" / "labels.parquet"))
    assert {row["id"]: row["preference"] for row in found} == said and printed["pairs"] == "4 of 12"
    before = {row["id"]: row for row in load_pairs(pairs)}
    for row in found:
        assert row["p_a"] == float(row["preference"] == "a") and row["votes_a"] + row["votes_b"] == 1
        assert row["source"] == "labelled by 1 person" and row["prompt"] == before[row["id"]]["prompt"]
        assert row["image_a"].tobytes() == before[row["id"]]["image_a"].tobytes()


def test_changed_pictures_are_not_exported(write_pairs: Callable[..., str], tmp_path: Path) -> None:
    from dpo_mm.labels.pairs import digest

    path, given = tmp_path / "votes.sqlite", open_pairs(write_pairs(rows(3)))
    store = VoteStore(path, given["id"], source="here")
    with pytest.raises(ValueError, match="no votes yet"):
        export(str(path), str(tmp_path / "labels.parquet"), pairs=write_pairs(rows(3)))
    label(store, "Ada", 3)
    for row in given:
        store.confirm(row["id"], digest(row))
    changed = rows(3)
    changed[1]["prompt"] = "something else"
    with pytest.raises(ValueError, match="'row-1' has other pictures or another prompt"):
        export(str(path), str(tmp_path / "labels.parquet"), pairs=write_pairs(changed))
    assert not (tmp_path / "labels.parquet").exists()


def test_a_folder_of_two_folders(tmp_path: Path) -> None:
    for side in ("base", "tuned"):
        (tmp_path / side).mkdir()
        for n, name in enumerate(("0001", "a-red_star")):
            picture(n + 10 * (side == "base")).save(tmp_path / side / f"{name}.png")
    (tmp_path / "0001.txt").write_text("a big circle\n")
    given = open_pairs(str(tmp_path))
    assert list(given["prompt"]) == ["a big circle", "a red star"]
    assert list(given["model_a"]) == ["base", "base"] and list(given["model_b"]) == ["tuned", "tuned"]
    store = VoteStore(tmp_path / "votes.sqlite", given["id"], source=str(tmp_path))
    label(store, "Ada", 2, "tie")
    export(str(store.path), str(tmp_path / "labels.parquet"))
    found = load_pairs(str(tmp_path / "labels.parquet"))
    assert found[0]["image_b"].tobytes() == picture(0).tobytes() and list(found["preference"]) == ["tie", "tie"]
    (tmp_path / "tuned" / "0001.png").unlink()
    with pytest.raises(ValueError, match="base/ and tuned/ don't pair up \\('0001' is in one of them only\\)"):
        open_pairs(str(tmp_path))
    with pytest.raises(ValueError, match="has 0 folders; expected two"):
        open_pairs(str(tmp_path / "base"))


def test_ids_that_stand_twice_are_refused(write_pairs: Callable[..., str]) -> None:
    twice = rows(3)
    twice[2]["id"] = "row-0"
    with pytest.raises(ValueError, match="id 'row-0' stands twice"):
        open_pairs(write_pairs(twice))


def test_the_train_command_names_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = train_command("my votes.sqlite", ["a red star"])
    assert "label export 'my votes.sqlite' --output 'my votes.parquet' && dpo-mm train " in command
    assert "faithfulness-sd15.yaml" in train_command("v.sqlite", ["a photo of a dog"])
    recipe = command.split("dpo-mm train ")[1].split(" --pairs")[0]
    assert Path(recipe).is_file()
