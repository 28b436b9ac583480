"""Votes in one SQLite file, saved as they are cast: which pair was presented to whom, in which order, and the choice.

Any number of people and processes share the file (WAL, one writer at a time). A confirmed vote is on disk. Each
presentation of a pair to an annotator is a row of `presentations` and has at most one active vote. A key pressed twice,
two windows of one person or a repeated request therefore count once. An undone vote stays in the file, marked.

Each browser has a session. Two browsers with one name are presented different pairs, so that no vote is lost.

Pairs with the fewest presentations come first, in a random order per annotator. Every tenth presentation repeats an
earlier pair of the same annotator, with a new left and right, to measure agreement.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from dpo_mm.labels.annotators import annotator_name
from dpo_mm.labels.presenting import (
    ACTIVE_SECONDS,
    Candidate,
    PresentedPair,
    choose_pair,
    enter,
    open_presentation,
    present,
    stored_name,
)
from dpo_mm.labels.vote_file import (
    IdleConnection,
    T,
    check_pairs,
    check_tables,
    connect,
    one_line_errors,
    prepare,
    read,
    transaction,
)

CHOICES = ("left", "right", "tie", "both_bad", "skip")


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


class VoteReader:
    """The votes of a file. Reading does not change the file or its folder."""

    def __init__(self, path: str | Path, ids: Sequence[str], *, source: str) -> None:
        """Check that the file belongs to a dataset.

        Args:
            path: SQLite file.
            ids: ids of the dataset's pairs.
            source: name of the dataset, for the error.

        Raises:
            ValueError: if the file is not a file of votes, or has votes on pairs that are not in `ids`.
            OSError: if it cannot be read.
        """
        self.path, self.ids = Path(path).absolute(), tuple(ids)
        self._read(lambda c: check_pairs(c, self.path, self.ids, source=source))

    def _read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        return read(self.path, query)

    def digests(self) -> dict[str, str]:
        """Return the digest of each pair that was shown, by pair id."""
        return self._read(lambda c: dict(c.execute("SELECT id, digest FROM pairs WHERE digest != ''")))

    def votes(self, *, at: float | None = None) -> list[Vote]:
        """Return the active votes in the order in which they were cast.

        Args:
            at: Unix time. The votes are those that were active then. None: now.
        """
        active = "undone_at IS NULL" if at is None else "cast_at <= :at AND (undone_at IS NULL OR undone_at > :at)"
        columns = "annotator, pair, is_repeat, swapped, choice, cast_at, seconds"
        rows = self._read(
            lambda c: c.execute(
                f"SELECT {columns} FROM votes JOIN presentations ON presentations.id = votes.presentation"
                f" WHERE {active} ORDER BY votes.id",
                {"at": at},
            ).fetchall()
        )
        return [
            Vote(annotator, pair, bool(is_repeat), bool(swapped), _unswap(choice, bool(swapped)), cast_at, seconds)
            for annotator, pair, is_repeat, swapped, choice, cast_at, seconds in rows
        ]


class VoteStore(VoteReader):
    """Store of the votes on a dataset's pairs, in one SQLite file."""

    def __init__(self, path: str | Path, ids: Sequence[str], *, source: str, stays_open: bool = False) -> None:
        """Open or create the file.

        Args:
            path: SQLite file.
            ids: ids of the dataset's pairs.
            source: the dataset, stored for the export.
            stays_open: hold a connection between votes, which makes them faster. Only for a process that does not fork.

        Raises:
            ValueError: as in `VoteReader`.
            OSError: if the file cannot be written.
        """
        self.path, self.ids = Path(path).absolute(), tuple(ids)
        prepare(self.path, self.ids, source=source)
        self._idle = IdleConnection(self.path) if stays_open else None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with transaction(self.path) as connection:
            if self._idle is not None:
                self._idle.renew()
            yield connection

    def _read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        with one_line_errors(self.path), closing(connect(self.path)) as connection:
            return query(connection)

    def next_pair(self, annotator: str, session: str | None = None) -> PresentedPair | None:
        """Return the pair to present to this annotator next, or None if all are labelled.

        It is the presentation without a vote if there is one, otherwise a new pair or a repeat. It is chosen before the
        file is locked for writing.

        Args:
            annotator: name of the annotator.
            session: the annotator's browser. None: any.

        Raises:
            ValueError: if the name is empty or too long.
            OSError: if the file cannot be written.
        """
        name = annotator_name(annotator)

        def look_ahead(connection: sqlite3.Connection) -> Candidate | None:
            stored = stored_name(connection, name)
            return None if open_presentation(connection, stored, session) else choose_pair(connection, stored)

        while True:
            candidate = self._read(look_ahead)
            with self._transaction() as connection:
                stored = enter(connection, name, session)
                shown = open_presentation(connection, stored, session)
                if shown is None:
                    candidate = candidate or choose_pair(connection, stored)
                    if candidate is None:
                        shown = open_presentation(connection, stored, None)
                    elif (shown := present(connection, stored, candidate)) is None:
                        continue  # another browser presented it meanwhile
                if shown is not None:
                    connection.execute(
                        "UPDATE presentations SET shown_at = ?, session = coalesce(?, session) WHERE id = ?",
                        (time.time(), session, shown.id),
                    )
                return shown

    def is_taken(self, annotator: str, session: str | None) -> bool:
        """Return True if another browser uses this name now, or used it before this browser did."""

        def query(connection: sqlite3.Connection) -> bool:
            (taken,) = connection.execute(
                "SELECT EXISTS (SELECT 1 FROM sessions WHERE annotator = ?1 AND session != ?2 AND seen_at > ?3) OR"
                " (EXISTS (SELECT 1 FROM annotators WHERE name = ?1 AND presented > 0)"
                " AND NOT EXISTS (SELECT 1 FROM sessions WHERE annotator = ?1 AND session = ?2))",
                (stored_name(connection, annotator_name(annotator)), session, time.time() - ACTIVE_SECONDS),
            ).fetchone()
            return bool(taken)

        return session is not None and self._read(query)

    def record_digest(self, pair: str, digest: str) -> None:
        """Store the digest of a pair when it is first shown.

        Raises:
            ValueError: if the stored digest differs.
        """
        query = "SELECT digest FROM pairs WHERE id = ?"
        (stored,) = self._read(lambda c: c.execute(query, (pair,)).fetchone())
        if stored not in ("", digest):
            raise ValueError(
                f"{self.path}: pair {pair!r} has changed since it was voted on. Choose another file for --votes"
            )
        if not stored:
            with self._transaction() as connection:
                connection.execute("UPDATE pairs SET digest = ? WHERE id = ? AND digest = ''", (digest, pair))

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
            OSError: if the file cannot be written.
        """
        if choice not in CHOICES:
            raise ValueError(f"choice {choice!r} is unknown. Expected one of {', '.join(CHOICES)}")
        now, name = time.time(), annotator_name(annotator)
        with self._transaction() as connection:
            row = connection.execute(
                "INSERT INTO votes (presentation, choice, cast_at, seconds)"
                " SELECT id, ?, ?, max(0, ? - shown_at) FROM presentations WHERE id = ? AND annotator = ?"
                " ON CONFLICT DO NOTHING",
                (choice, now, now, presentation, stored_name(connection, name)),
            )
            return row.rowcount == 1

    def undo(self, annotator: str, session: str | None = None) -> bool:
        """Mark the annotator's last active vote as undone, so that its pair is presented again. False if there is none.

        Args:
            annotator: name of the annotator.
            session: the browser whose last vote is undone. None: any.

        Raises:
            ValueError: if the annotator has seen the ratings, since a new vote would show which model made which image.
            OSError: if the file cannot be written.
        """
        with self._transaction() as connection:
            name = stored_name(connection, annotator_name(annotator))
            if connection.execute("SELECT 1 FROM annotators WHERE name = ? AND rated_at", (name,)).fetchone():
                raise ValueError("The ratings have been shown, so votes can no longer be undone")
            row = connection.execute(
                "UPDATE votes SET undone_at = ?1 WHERE id = (SELECT vote FROM presentations WHERE annotator = ?2"
                " AND vote IS NOT NULL AND (?3 IS NULL OR session IS NULL OR session = ?3) ORDER BY vote DESC LIMIT 1)",
                (time.time(), name, session),
            )
            return row.rowcount == 1

    def reveal_ratings(self, annotator: str) -> float | None:
        """Return the time when the ratings were first shown to this annotator, or None if they may not be shown.

        They are shown to annotators who have labelled all pairs. From then on their votes cannot be undone, and the
        ratings that they see do not change. Otherwise two looks would show which model made which image.

        Raises:
            OSError: if the file cannot be written.
        """
        with self._transaction() as connection:
            name = stored_name(connection, annotator_name(annotator))
            row = connection.execute("SELECT shown, rated_at FROM annotators WHERE name = ?", (name,)).fetchone()
            if row is None or row[0] < len(self.ids) or open_presentation(connection, name, None):
                return None
            rated_at = row[1] or time.time()
            connection.execute("UPDATE annotators SET rated_at = ? WHERE name = ?", (rated_at, name))
            return float(rated_at)

    def progress(self, annotator: str) -> LabelProgress:
        """Count the votes of this annotator and of all annotators."""

        def query(connection: sqlite3.Connection) -> tuple[int, int, int, int]:
            name = stored_name(connection, annotator_name(annotator))
            own = connection.execute("SELECT pairs FROM annotators WHERE name = ?", (name,)).fetchone() or (0,)
            total = connection.execute("SELECT coalesce(sum(votes), 0), count(*) FROM annotators WHERE votes > 0")
            covered = connection.execute("SELECT count(*) FROM coverage WHERE votes > 0")
            return (*own, *total.fetchone(), *covered.fetchone())

        own_pairs, votes, annotators, covered_pairs = self._read(query)
        return LabelProgress(own_pairs, len(self.ids), votes, annotators, covered_pairs)


def source_of(path: str | Path) -> str:
    """Return the dataset that the votes in a file belong to.

    Raises:
        ValueError: if the file does not exist or is not a file of votes.
        OSError: if it cannot be read.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file. `dpo-mm demo label --votes {path}` creates it")

    def query(connection: sqlite3.Connection) -> str:
        if not check_tables(connection):
            raise sqlite3.DatabaseError("it has no tables")
        return str(connection.execute("SELECT value FROM meta WHERE key = 'source'").fetchone()[0])

    return read(Path(path).absolute(), query)


def _unswap(choice: str, swapped: bool) -> str:
    """Translate left and right to a and b."""
    return {"left": "ba"[not swapped], "right": "ab"[not swapped]}.get(choice, choice)
