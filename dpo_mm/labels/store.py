"""Votes in one SQLite file, saved as they are cast: which pair was presented to whom, in which order, and the choice.

Any number of people and processes share the file (WAL, one writer at a time). A confirmed vote is on disk. Each
presentation of a pair to an annotator is a row of `presentations` and has at most one active vote. A key pressed twice,
two windows of one person or a repeated request therefore count once. An undone vote stays in the file, marked.

Pairs with the fewest presentations come first, in a random order per annotator. Every tenth presentation repeats an
earlier pair of the same annotator, with a new left and right, to measure agreement.
"""

from __future__ import annotations

import hashlib
import random
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

CHOICES = ("left", "right", "tie", "both_bad", "skip")
BLOCK = 10
"""Number of presentations that contain one repeat."""
MIN_REPEAT_DISTANCE = 3
"""Smallest number of presentations between a pair and its repeat."""
MAX_NAME_LENGTH = 80
SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS pairs (id TEXT PRIMARY KEY, digest TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS presentations (
    id INTEGER PRIMARY KEY, annotator TEXT NOT NULL, pair TEXT NOT NULL REFERENCES pairs(id),
    is_repeat INTEGER NOT NULL, swapped INTEGER NOT NULL, shown_at REAL NOT NULL, UNIQUE (annotator, pair, is_repeat));
CREATE TABLE IF NOT EXISTS votes (
    id INTEGER PRIMARY KEY, presentation INTEGER NOT NULL REFERENCES presentations(id), choice TEXT NOT NULL,
    cast_at REAL NOT NULL, seconds REAL NOT NULL, undone_at REAL);
CREATE UNIQUE INDEX IF NOT EXISTS one_active_vote ON votes (presentation) WHERE undone_at IS NULL;
"""
ACTIVE_VOTES = "votes JOIN presentations ON presentations.id = votes.presentation AND votes.undone_at IS NULL"


@dataclass(frozen=True)
class PresentedPair:
    """Presentation of a pair to an annotator.

    Args:
        id: id of the presentation.
        pair: id of the pair.
        is_repeat: the annotator voted on this pair before.
        swapped: b is on the left.
    """

    id: int
    pair: str
    is_repeat: bool
    swapped: bool


@dataclass(frozen=True)
class Vote:
    """Active vote of an annotator on a pair.

    Args:
        annotator: name of the annotator.
        pair: id of the pair.
        is_repeat: the annotator had voted on this pair before.
        swapped: b was on the left.
        choice: a, b, tie, both_bad or skip.
        cast_at: Unix time of the vote.
        seconds: time from the presentation to the vote.
    """

    annotator: str
    pair: str
    is_repeat: bool
    swapped: bool
    choice: str
    cast_at: float
    seconds: float


@dataclass(frozen=True)
class LabelProgress:
    """Progress of an annotator and of all annotators.

    Args:
        own_pairs: number of pairs that this annotator has voted on, of num_pairs.
        num_pairs: number of pairs.
        votes: number of active votes of all annotators.
        annotators: number of annotators with an active vote.
        covered_pairs: number of pairs with an active vote.
    """

    own_pairs: int
    num_pairs: int
    votes: int
    annotators: int
    covered_pairs: int


class VoteStore:
    """Store of the votes on a dataset's pairs, in one SQLite file."""

    def __init__(self, path: str | Path, ids: Sequence[str], *, source: str) -> None:
        """Open or create the file.

        Args:
            path: SQLite file.
            ids: ids of the dataset's pairs.
            source: the dataset, stored for the export.

        Raises:
            ValueError: if the file is not a vote store, or has votes on pairs that are not in `ids`.
        """
        self.path, self.ids = Path(path).absolute(), tuple(ids)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(_connect(self.path)) as connection:
                connection.executescript(SCHEMA)
                stored_ids = {row[0] for row in connection.execute("SELECT id FROM pairs")}
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path}: not a file of votes ({error}). Choose another file for --votes") from error
        unknown = sorted(stored_ids - set(self.ids))
        if unknown:
            raise ValueError(
                f"{path}: has votes on {len(unknown)} pairs that are not in {source} (for example {unknown[0]!r}). "
                "Choose another file for --votes, or the dataset that was labelled"
            )
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES ('source', ?)", (source,))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Open a transaction that locks the file for writing from its start. Its changes are on disk when it ends."""
        with closing(_connect(self.path)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    def next_pair(self, annotator: str) -> PresentedPair | None:
        """Return the pair to present to this annotator next, or None if all are labelled.

        It is the presentation without a vote if there is one, otherwise a new pair or a repeat.

        Raises:
            ValueError: if the name is empty or too long.
        """
        annotator = annotator_name(annotator)
        with self._transaction() as connection:
            pending = connection.execute(
                "SELECT id, pair, is_repeat, swapped FROM presentations WHERE annotator = ? AND NOT EXISTS"
                " (SELECT 1 FROM votes WHERE votes.presentation = presentations.id AND undone_at IS NULL)"
                " ORDER BY id LIMIT 1",
                (annotator,),
            ).fetchone()
            if pending:
                connection.execute("UPDATE presentations SET shown_at = ? WHERE id = ?", (time.time(), pending[0]))
                return PresentedPair(pending[0], pending[1], bool(pending[2]), bool(pending[3]))
            repeat = self._repeated_pair(connection, annotator)
            pair = repeat or self._new_pair(connection, annotator)
            if pair is None:
                return None
            is_repeat, swapped = repeat is not None, bool(secrets.randbits(1))
            connection.execute("INSERT OR IGNORE INTO pairs VALUES (?, '')", (pair,))
            row = connection.execute(
                "INSERT INTO presentations (annotator, pair, is_repeat, swapped, shown_at) VALUES (?, ?, ?, ?, ?)",
                (annotator, pair, is_repeat, swapped, time.time()),
            )
            return PresentedPair(int(row.lastrowid or 0), pair, is_repeat, swapped)

    def _new_pair(self, connection: sqlite3.Connection, annotator: str) -> str | None:
        counts = dict(connection.execute("SELECT pair, count(*) FROM presentations WHERE NOT is_repeat GROUP BY pair"))
        rows = connection.execute("SELECT pair FROM presentations WHERE annotator = ?", (annotator,))
        presented = {row[0] for row in rows}
        remaining = [pair for pair in self._order(annotator) if pair not in presented]
        return min(remaining, key=lambda pair: counts.get(pair, 0), default=None)

    def _order(self, annotator: str) -> list[str]:
        """Return the pairs in a random order that depends only on the annotator's name."""
        return random.Random(annotator).sample(self.ids, len(self.ids))

    def _repeated_pair(self, connection: sqlite3.Connection, annotator: str) -> str | None:
        """Return the pair to repeat if the next presentation is the repeat of its block."""
        rows = connection.execute("SELECT pair FROM presentations WHERE annotator = ? ORDER BY id", (annotator,))
        presented = [row[0] for row in rows]
        block, index = divmod(len(presented), BLOCK)
        random_byte = hashlib.blake2b(f"{block}\0{annotator}".encode(), digest_size=4).digest()[0]
        if index != BLOCK // 2 + random_byte % (BLOCK - BLOCK // 2):
            return None
        skipped = connection.execute(
            f"SELECT pair FROM {ACTIVE_VOTES} WHERE annotator = ? AND choice = 'skip'", (annotator,)
        )
        excluded = {row[0] for row in skipped} | set(presented[-MIN_REPEAT_DISTANCE:])
        candidates = [pair for pair, count in Counter(presented).items() if count == 1 and pair not in excluded]
        return random.Random(f"{block}\0{annotator}").choice(candidates) if candidates else None

    def record_digest(self, pair: str, digest: str) -> None:
        """Store the digest of a pair when it is first shown.

        Raises:
            ValueError: if the stored digest differs.
        """
        with self._transaction() as connection:
            (stored,) = connection.execute("SELECT digest FROM pairs WHERE id = ?", (pair,)).fetchone()
            if stored not in ("", digest):
                raise ValueError(
                    f"{self.path}: the images or the prompt of pair {pair!r} have changed since it was voted on. "
                    "Choose another file for --votes"
                )
            connection.execute("UPDATE pairs SET digest = ? WHERE id = ?", (digest, pair))

    def digests(self) -> dict[str, str]:
        """Return the digest of each pair that was shown, by pair id."""
        with closing(_connect(self.path)) as connection:
            return dict(connection.execute("SELECT id, digest FROM pairs WHERE digest != ''"))

    def cast(self, annotator: str, presentation: int, choice: str) -> bool:
        """Save a vote.

        Args:
            annotator: name of the annotator.
            presentation: id of the `PresentedPair`.
            choice: one of CHOICES.

        Returns:
            True if the vote is on disk. False if the presentation already has a vote or is not this annotator's.

        Raises:
            ValueError: if the choice is not in CHOICES.
        """
        if choice not in CHOICES:
            raise ValueError(f"choice {choice!r} is unknown. Expected one of {', '.join(CHOICES)}")
        now = time.time()
        with self._transaction() as connection:
            row = connection.execute(
                "INSERT INTO votes (presentation, choice, cast_at, seconds)"
                " SELECT id, ?, ?, max(0, ? - shown_at) FROM presentations WHERE id = ? AND annotator = ?"
                " ON CONFLICT DO NOTHING",
                (choice, now, now, presentation, annotator_name(annotator)),
            )
            return row.rowcount == 1

    def undo(self, annotator: str) -> bool:
        """Mark the annotator's last active vote as undone, so that its pair is presented again. False if there is none."""
        with self._transaction() as connection:
            row = connection.execute(
                "UPDATE votes SET undone_at = ? WHERE id ="
                f" (SELECT max(votes.id) FROM {ACTIVE_VOTES} WHERE annotator = ?)",
                (time.time(), annotator_name(annotator)),
            )
            return row.rowcount == 1

    def votes(self) -> list[Vote]:
        """Return the active votes in the order in which they were cast."""
        with closing(_connect(self.path)) as connection:
            rows = connection.execute(
                "SELECT annotator, pair, is_repeat, swapped, choice, cast_at, seconds"
                f" FROM {ACTIVE_VOTES} ORDER BY votes.id"
            )
            return [
                Vote(annotator, pair, bool(is_repeat), bool(swapped), _unswap(choice, bool(swapped)), cast_at, seconds)
                for annotator, pair, is_repeat, swapped, choice, cast_at, seconds in rows
            ]

    def progress(self, annotator: str) -> LabelProgress:
        """Count the votes of this annotator and of all annotators."""
        with closing(_connect(self.path)) as connection:
            votes, annotators, covered_pairs = connection.execute(
                f"SELECT count(*), count(DISTINCT annotator), count(DISTINCT pair) FROM {ACTIVE_VOTES}"
            ).fetchone()
            (own_pairs,) = connection.execute(
                f"SELECT count(*) FROM {ACTIVE_VOTES} WHERE annotator = ? AND NOT is_repeat",
                (annotator_name(annotator),),
            ).fetchone()
        return LabelProgress(own_pairs, len(self.ids), votes, annotators, covered_pairs)


def annotator_name(text: str) -> str:
    """Return an annotator's name as it is stored, without extra spaces.

    Raises:
        ValueError: if it is empty or too long.
    """
    name = " ".join(text.split())
    if not 0 < len(name) <= MAX_NAME_LENGTH:
        raise ValueError(f"the annotator's name has {len(name)} characters. Expected 1 to {MAX_NAME_LENGTH}")
    return name


def source_of(path: str | Path) -> str:
    """Return the dataset that the votes in a file belong to.

    Raises:
        ValueError: if the file does not exist or is not a file of votes.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file. `dpo-mm demo label --votes {path}` creates it")
    try:
        with closing(_connect(Path(path))) as connection:
            return str(connection.execute("SELECT value FROM meta WHERE key = 'source'").fetchone()[0])
    except (sqlite3.DatabaseError, TypeError) as error:
        raise ValueError(f"{path}: not a file of votes ({error})") from error


def _connect(path: Path) -> sqlite3.Connection:
    """Open a connection that waits for other writers and writes through to the disk."""
    connection = sqlite3.connect(path, timeout=60, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _unswap(choice: str, swapped: bool) -> str:
    """Translate left and right to a and b."""
    return {"left": "ba"[not swapped], "right": "ab"[not swapped]}.get(choice, choice)
