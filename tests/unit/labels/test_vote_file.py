"""The file of votes: several browsers, names, older files, other programs' files, errors, reading, and cost at size."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from dpo_mm.labels import presenting, store, vote_file
from dpo_mm.labels.annotators import annotator_name, identity
from dpo_mm.labels.store import VoteReader, VoteStore, source_of

IDS = [f"pair-{n}" for n in range(30)]


@pytest.fixture
def votes(tmp_path: Path) -> VoteStore:
    return VoteStore(tmp_path / "votes.sqlite", IDS, source="a set")


def test_two_browsers_with_one_name_lose_no_vote(votes: VoteStore) -> None:
    """It catches one open pair per name, as before: the second browser's votes were dropped."""
    cast = 0
    for _ in range(8):
        shown = [votes.next_pair("Ada", session) for session in ("one", "two")]
        assert shown[0] and shown[1] and shown[0].pair != shown[1].pair
        assert votes.next_pair("Ada", "one") == shown[0], "a reload shows the same pair"
        cast += sum(votes.cast("Ada", presented.id, "left") for presented in shown if presented)
    assert cast == len(votes.votes()) == 16
    assert votes.undo("Ada", "one") and votes.undo("Ada", "one")
    assert len({vote.pair for vote in votes.votes()}) >= 13
    first = votes.next_pair("Ada", "one")
    assert first and first.id == 13, "each browser undoes its own last votes"


def test_open_pair_of_a_browser_that_left_is_presented_again(votes: VoteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    abandoned = votes.next_pair("Ada", "one")
    other = votes.next_pair("Ada", "two")
    monkeypatch.setattr(presenting, "ACTIVE_SECONDS", -1)
    assert abandoned and other and votes.next_pair("Ada", "two") == abandoned


def test_last_open_pairs_are_presented_to_any_browser(tmp_path: Path) -> None:
    votes = VoteStore(tmp_path / "v.sqlite", IDS[:1], source="a set")
    assert votes.next_pair("Ada", "one") == votes.next_pair("Ada", "two") is not None


def test_name_is_taken_by_another_browser(votes: VoteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not votes.is_taken("Ada", "one"), "a new name"
    votes.next_pair("Ada", "one")
    assert not votes.is_taken("Ada", "one") and not votes.is_taken("Ada", None) and not votes.is_taken("Bob", "two")
    assert votes.is_taken("ADA", "two"), "a new browser"
    votes.next_pair("Ada", "two")
    assert votes.is_taken("Ada", "one") and votes.is_taken("Ada", "two"), "both are active"
    monkeypatch.setattr(store, "ACTIVE_SECONDS", -1)
    assert not votes.is_taken("Ada", "one") and votes.is_taken("Ada", "three")


@pytest.mark.parametrize(
    "other",
    [
        "ADA  É",
        "ada e\u0301",
        " Ada\u200bÉ".replace("a\u200b", "a \u200b"),
        "Ada\u00a0É",
        "\u202eAda É",
        "Ada É\ufe0f",
        "ada\u200d é",
    ],
)
def test_spellings_of_one_name_are_one_person(votes: VoteStore, other: str) -> None:
    """It catches names that look alike and count twice: NFC, case, and each kind of invisible character."""
    shown = votes.next_pair("Ada É")
    assert shown and votes.next_pair(other) == shown and votes.cast(other, shown.id, "left")
    assert [vote.annotator for vote in votes.votes()] == ["Ada É"]
    assert votes.progress(other).own_pairs == 1


def test_names_without_visible_characters_are_refused() -> None:
    for name in ("", " \u200b", "\u200d", "\u3164", "\x00\x1b", "\ud800"):
        with pytest.raises(ValueError, match="Expected 1 to 80"):
            annotator_name(name)
    assert annotator_name("\u202e👩\u200d🚀\x1b[2J  z") == "👩\u200d🚀[2J z"
    assert identity("Straße") == identity("STRASSE") and identity("Ada") != identity("Adа")


def test_ratings_wait_for_the_end_and_then_do_not_change(tmp_path: Path) -> None:
    """It catches two looks with a vote or an undo between them, which show which model made which image."""
    votes = VoteStore(tmp_path / "v.sqlite", IDS[:6], source="a set")
    assert votes.reveal_ratings("Eve") is None
    for _ in range(6):
        shown = votes.next_pair("Eve")
        assert shown and votes.reveal_ratings("Eve") is None and votes.cast("Eve", shown.id, "left")
    assert votes.undo("Eve") and votes.reveal_ratings("Eve") is None, "the undone pair is open"
    while shown := votes.next_pair("Eve"):
        votes.cast("Eve", shown.id, "right")
    other = votes.next_pair("Mallory")
    assert other and votes.cast("Mallory", other.id, "left")
    time = votes.reveal_ratings("eve")
    assert time is not None and votes.reveal_ratings("Eve") == time
    before = votes.votes(at=time)
    with pytest.raises(ValueError, match="votes can no longer be undone"):
        votes.undo("Eve")
    assert votes.undo("Mallory") and len(votes.votes()) == len(before) - 1
    assert votes.votes(at=time) == before, "a vote that is undone later still counts at that time"


FIRST_VERSION = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE pairs (id TEXT PRIMARY KEY, digest TEXT NOT NULL);
CREATE TABLE presentations (
    id INTEGER PRIMARY KEY, annotator TEXT NOT NULL, pair TEXT NOT NULL REFERENCES pairs(id),
    is_repeat INTEGER NOT NULL, swapped INTEGER NOT NULL, shown_at REAL NOT NULL, UNIQUE (annotator, pair, is_repeat));
CREATE TABLE votes (
    id INTEGER PRIMARY KEY, presentation INTEGER NOT NULL REFERENCES presentations(id), choice TEXT NOT NULL,
    cast_at REAL NOT NULL, seconds REAL NOT NULL, undone_at REAL);
CREATE UNIQUE INDEX one_active_vote ON votes (presentation) WHERE undone_at IS NULL;
INSERT INTO meta VALUES ('source', 'a set');
INSERT INTO pairs VALUES ('pair-1', 'digest'), ('pair-2', '');
INSERT INTO presentations VALUES (1, 'Ada', 'pair-1', 0, 1, 5), (2, 'ada', 'pair-1', 0, 0, 6), (3, 'Ada', 'pair-2', 0, 0, 7);
INSERT INTO votes VALUES (1, 1, 'left', 6, 1, 7), (2, 1, 'left', 8, 1, NULL), (3, 2, 'tie', 8, 1, NULL);
"""


def first_version(path: Path) -> Path:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(FIRST_VERSION)
    return path


def test_file_of_the_first_version_is_read_and_continued(tmp_path: Path) -> None:
    path = first_version(tmp_path / "old.sqlite")
    before = path.read_bytes()
    old = VoteReader(path, IDS, source="a set")
    assert [(v.annotator, v.pair, v.choice) for v in old.votes()] == [("Ada", "pair-1", "b"), ("ada", "pair-1", "tie")]
    assert path.read_bytes() == before and source_of(path) == "a set" and old.digests() == {"pair-1": "digest"}
    votes = VoteStore(path, IDS, source="a set")
    assert votes.votes() == old.votes()
    progress = votes.progress("Ada")
    assert (progress.own_pairs, progress.votes, progress.annotators, progress.covered_pairs) == (1, 2, 2, 1)
    shown = votes.next_pair("Ada")
    assert shown and shown.id == 3 and votes.cast("Ada", 3, "left"), "the open pair is continued"
    later = votes.next_pair("ada")
    assert later and later.pair not in ("pair-1", "pair-2"), "an exact spelling of an old name is its own person"
    assert votes.progress("Ada").covered_pairs == 2


def test_file_of_another_program_is_refused_and_unchanged(tmp_path: Path) -> None:
    for schema in ("CREATE TABLE notes (text)", "CREATE TABLE votes (id, who); CREATE TABLE meta (a, b)"):
        path = tmp_path / f"{len(schema)}.sqlite"
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript(schema)
        before = path.read_bytes()
        for open_file in (lambda p: VoteStore(p, IDS, source="x"), lambda p: VoteReader(p, IDS, source="x"), source_of):
            with pytest.raises(
                ValueError, match=r"not a file of votes, it is a database of another program, with the tables"
            ):
                open_file(path)
        assert path.read_bytes() == before and len(list(tmp_path.glob(f"{path.name}*"))) == 1
    (tmp_path / "folder.sqlite").mkdir()
    with pytest.raises(ValueError, match="not a file"):
        VoteStore(tmp_path / "folder.sqlite", IDS, source="x")


def test_locked_file_is_named(votes: VoteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vote_file, "LOCK_TIMEOUT", 0.05)
    with closing(sqlite3.connect(votes.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OSError, match=r"votes\.sqlite: another program has locked this file\. Close"):
            votes.next_pair("Ada")
        other.execute("COMMIT")
    assert votes.next_pair("Ada")


def test_full_disk_is_named_and_loses_nothing(votes: VoteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = votes.next_pair("Ada")
    connect = vote_file.connect

    def connect_to_full_disk(path: Path) -> sqlite3.Connection:
        connection = connect(path)
        connection.execute("PRAGMA max_page_count = 1")  # SQLite raises it to the present number of pages
        return connection

    assert shown
    with monkeypatch.context() as patch:
        patch.setattr(vote_file, "connect", connect_to_full_disk)
        with pytest.raises(OSError, match=r"the disk is full, so votes cannot be saved\. Free some space"):
            for number in range(200):
                votes.next_pair(f"person {number} {'x' * 60}")
    assert votes.cast("Ada", shown.id, "left") and len(votes.votes()) == 1


def test_missing_file_is_not_created_again(votes: VoteStore) -> None:
    for path in votes.path.parent.glob("votes.sqlite*"):
        path.unlink()
    for call in (votes.next_pair, votes.undo, votes.progress):
        with pytest.raises(OSError, match="this file is missing"):
            call("Ada")
    assert not votes.path.exists()


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder read-only, and run without the rights of root, which may write to it."""
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.mark.parametrize("is_killed", [False, True])
def test_votes_are_read_from_a_read_only_folder(is_killed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It catches reading that creates a log, a lost log of a killed page, and a store that hides that it cannot write."""
    monkeypatch.setattr(vote_file, "IDLE_SECONDS", 60.0 if is_killed else 0.01)
    with tempfile.TemporaryDirectory() as name:
        copy, original = Path(name), Path(name) / "original"
        copy.chmod(0o755)
        original.mkdir()
        votes = VoteStore(original / "votes.sqlite", IDS, source="a set", stays_open=True)
        shown = votes.next_pair("Ada")
        assert shown and votes.cast("Ada", shown.id, "left")
        log = original / "votes.sqlite-wal"
        deadline = time.monotonic() + 20
        while not is_killed and log.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert log.exists() == is_killed, "the file is complete soon after the last vote"
        for file in (votes.path, *([log] if is_killed else [])):
            shutil.copy(file, copy)
        shutil.rmtree(original)
        before = hashes(copy)
        with read_only(copy):
            reader = VoteReader(copy / "votes.sqlite", IDS, source="a set")
            assert [vote.pair for vote in reader.votes()] == [shown.pair] and source_of(reader.path) == "a set"
            with pytest.raises(OSError, match=r"read-only|cannot be opened"):
                VoteStore(copy / "votes.sqlite", IDS, source="a set")
        assert hashes(copy) == before


def steps_per_vote(monkeypatch: pytest.MonkeyPatch, votes: VoteStore, annotator: str, count: int) -> float:
    """Return the largest number of hundreds of SQLite's virtual machine steps of a vote."""
    connect, steps = vote_file.connect, [0]

    def counted(path: Path) -> sqlite3.Connection:
        connection = connect(path)

        def add() -> int:
            steps[0] += 1
            return 0

        connection.set_progress_handler(add, 100)
        return connection

    largest = 0
    with monkeypatch.context() as patch:
        patch.setattr(vote_file, "connect", counted)
        patch.setattr(store, "connect", counted)
        for _ in range(count):
            steps[0] = 0
            shown = votes.next_pair(annotator, "browser")
            assert shown and votes.cast(annotator, shown.id, "left")
            votes.record_digest(shown.pair, "digest")
            assert votes.progress(annotator).votes and votes.is_taken(annotator, "browser") in (True, False)
            votes.undo(annotator, "browser")
            votes.cast(annotator, shown.id, "left")
            largest = max(largest, steps[0])
    return largest


def fill(votes: VoteStore, people: int) -> None:
    """Store a vote of each of some people on every pair, as the store itself would."""
    with closing(sqlite3.connect(votes.path)) as connection, connection:
        connection.execute("INSERT OR IGNORE INTO pairs SELECT pair, '' FROM coverage")
        for number in range(people):
            connection.execute("INSERT INTO annotators (name, identity) VALUES (?1, ?1)", (f"person {number}",))
            connection.execute(
                "INSERT INTO presentations (annotator, pair, is_repeat, swapped, shown_at) SELECT ?, pair, 0, 0, 0 FROM coverage",
                (f"person {number}",),
            )
        connection.execute(
            "INSERT INTO votes (presentation, choice, cast_at, seconds) SELECT id, 'left', 0, 0 FROM presentations"
        )


def test_a_vote_costs_the_same_for_any_number_of_pairs_and_votes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts steps of SQLite. It catches any statement that reads all pairs, all votes or all of one person's."""
    steps = {}
    for size in (100, 2000):
        votes = VoteStore(tmp_path / f"{size}.sqlite", [f"p{n}" for n in range(size)], source="a set")
        fill(votes, people=2)
        steps[size] = steps_per_vote(monkeypatch, votes, "Ada", 10)
    covered = 2000 * 4 / 100  # progress counts the pairs with a vote, in the smallest index
    assert steps[2000] - steps[100] < covered, steps
