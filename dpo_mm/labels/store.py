"""Votes in SQLite, kept as they are cast: what was shown to whom, on which sides, and what was said.

Any number of people and processes share one file (WAL, one writer at a time). A vote that was confirmed is on disk.
A pair put before a labeller is a row of `shown`, and a row has one living vote at most, so that a key pressed twice,
two windows of one person or a request sent again count once. An undone vote stays in the file, marked.

Pairs with the fewest showings come first, each labeller in an order of their own. Every tenth showing repeats an earlier
pair of the same labeller, sides drawn anew, to measure agreement.
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
"""Showings of which one is a repeat."""
APART = 3
"""Showings at least between a pair and its repeat."""
LONGEST_NAME = 80
SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS pairs (id TEXT PRIMARY KEY, digest TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS shown (
    id INTEGER PRIMARY KEY, labeller TEXT NOT NULL, pair TEXT NOT NULL REFERENCES pairs(id),
    again INTEGER NOT NULL, swapped INTEGER NOT NULL, shown_at REAL NOT NULL, UNIQUE (labeller, pair, again));
CREATE TABLE IF NOT EXISTS votes (
    id INTEGER PRIMARY KEY, shown INTEGER NOT NULL REFERENCES shown(id), choice TEXT NOT NULL,
    cast_at REAL NOT NULL, seconds REAL NOT NULL, undone_at REAL);
CREATE UNIQUE INDEX IF NOT EXISTS one_living_vote ON votes (shown) WHERE undone_at IS NULL;
"""
LIVING = "votes JOIN shown ON shown.id = votes.shown AND votes.undone_at IS NULL"


@dataclass(frozen=True)
class PresentedPair:
    """A pair put before a labeller; swapped: b stands on the left; again: a repeat."""

    id: int
    pair: str
    again: bool
    swapped: bool


@dataclass(frozen=True)
class Vote:
    """A living vote; `said` in the pair's own terms: a, b, tie, both_bad or skip. seconds: from showing to vote."""

    labeller: str
    pair: str
    again: bool
    swapped: bool
    said: str
    cast_at: float
    seconds: float


@dataclass(frozen=True)
class LabelProgress:
    """mine: pairs this labeller has answered, of `total`. covered: pairs that anyone has answered."""

    mine: int
    total: int
    votes: int
    people: int
    covered: int


class VoteStore:
    """The votes on a set of pairs, in one SQLite file."""

    def __init__(self, path: str | Path, ids: Sequence[str], *, source: str) -> None:
        """Open or begin the votes on the pairs of these ids. source: the set, remembered for the export.

        Raises ValueError where the file is no store of votes or holds votes on pairs that are not among them.
        """
        self.path, self.ids = Path(path).absolute(), tuple(ids)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(_connect(self.path)) as connection:
                connection.executescript(SCHEMA)
                voted = {row[0] for row in connection.execute("SELECT id FROM pairs")}
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path}: not a file of votes ({error}); choose another for --votes") from error
        foreign = sorted(voted - set(self.ids))
        if foreign:
            raise ValueError(
                f"{path}: holds votes on {len(foreign)} pairs that {source} hasn't, such as {foreign[0]!r}; "
                "choose another file for --votes, or give the set that they belong to"
            )
        with self._writing() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES ('source', ?)", (source,))

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the pen from its start, on disk when it ends."""
        with closing(_connect(self.path)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    def show(self, labeller: str) -> PresentedPair | None:
        """What this labeller is to answer now: what stands open, else a new pair or a repeat; None when all is done."""
        labeller = name_of(labeller)
        with self._writing() as connection:
            open_ = connection.execute(
                "SELECT id, pair, again, swapped FROM shown WHERE labeller = ? AND NOT EXISTS"
                " (SELECT 1 FROM votes WHERE votes.shown = shown.id AND undone_at IS NULL) ORDER BY id LIMIT 1",
                (labeller,),
            ).fetchone()
            if open_:
                connection.execute("UPDATE shown SET shown_at = ? WHERE id = ?", (time.time(), open_[0]))
                return PresentedPair(open_[0], open_[1], bool(open_[2]), bool(open_[3]))
            repeat = self._repeat(connection, labeller)
            pair = repeat or self._fresh(connection, labeller)
            if pair is None:
                return None
            again, swapped = repeat is not None, bool(secrets.randbits(1))
            connection.execute("INSERT OR IGNORE INTO pairs VALUES (?, '')", (pair,))
            row = connection.execute(
                "INSERT INTO shown (labeller, pair, again, swapped, shown_at) VALUES (?, ?, ?, ?, ?)",
                (labeller, pair, again, swapped, time.time()),
            )
            return PresentedPair(int(row.lastrowid or 0), pair, again, swapped)

    def _fresh(self, connection: sqlite3.Connection, labeller: str) -> str | None:
        counts = dict(connection.execute("SELECT pair, count(*) FROM shown WHERE NOT again GROUP BY pair"))
        seen = {row[0] for row in connection.execute("SELECT pair FROM shown WHERE labeller = ?", (labeller,))}
        left = [pair for pair in self._order(labeller) if pair not in seen]
        return min(left, key=lambda pair: counts.get(pair, 0), default=None)

    def _order(self, labeller: str) -> list[str]:
        """The pairs in an order of the labeller's own, the same whenever asked."""
        return random.Random(labeller).sample(self.ids, len(self.ids))

    def _repeat(self, connection: sqlite3.Connection, labeller: str) -> str | None:
        """The pair to repeat where the next showing is the one of its ten that repeats."""
        shown = [
            row[0] for row in connection.execute("SELECT pair FROM shown WHERE labeller = ? ORDER BY id", (labeller,))
        ]
        block, place = divmod(len(shown), BLOCK)
        chance = hashlib.blake2b(f"{block}\0{labeller}".encode(), digest_size=4).digest()[0]
        if place != BLOCK // 2 + chance % (BLOCK - BLOCK // 2):
            return None
        skipped = connection.execute(f"SELECT pair FROM {LIVING} WHERE labeller = ? AND choice = 'skip'", (labeller,))
        out = {row[0] for row in skipped} | set(shown[-APART:])
        once = [pair for pair, times in Counter(shown).items() if times == 1 and pair not in out]
        return random.Random(f"{block}\0{labeller}").choice(once) if once else None

    def confirm(self, pair: str, digest: str) -> None:
        """Remember what a pair looked like when first shown. Raises ValueError where it looks otherwise now."""
        with self._writing() as connection:
            (before,) = connection.execute("SELECT digest FROM pairs WHERE id = ?", (pair,)).fetchone()
            if before not in ("", digest):
                raise ValueError(
                    f"{self.path}: pair {pair!r} had other pictures or another prompt when it was voted on; "
                    "choose another file for --votes"
                )
            connection.execute("UPDATE pairs SET digest = ? WHERE id = ?", (digest, pair))

    def digests(self) -> dict[str, str]:
        """What each pair that was shown looked like, by id."""
        with closing(_connect(self.path)) as connection:
            return dict(connection.execute("SELECT id, digest FROM pairs WHERE digest != ''"))

    def cast(self, labeller: str, shown: int, choice: str) -> bool:
        """Keep a vote; True once it is on disk, False where that showing has a vote or is not this labeller's.

        Raises ValueError for a choice that isn't in CHOICES.
        """
        if choice not in CHOICES:
            raise ValueError(f"choice {choice!r} is unknown; expected one of {', '.join(CHOICES)}")
        now = time.time()
        with self._writing() as connection:
            row = connection.execute(
                "INSERT INTO votes (shown, choice, cast_at, seconds)"
                " SELECT id, ?, ?, max(0, ? - shown_at) FROM shown WHERE id = ? AND labeller = ?"
                " ON CONFLICT DO NOTHING",
                (choice, now, now, shown, name_of(labeller)),
            )
            return row.rowcount == 1

    def undo(self, labeller: str) -> bool:
        """Take back the labeller's last living vote, so that its pair stands open again; False where there is none."""
        with self._writing() as connection:
            row = connection.execute(
                f"UPDATE votes SET undone_at = ? WHERE id = (SELECT max(votes.id) FROM {LIVING} WHERE labeller = ?)",
                (time.time(), name_of(labeller)),
            )
            return row.rowcount == 1

    def votes(self) -> list[Vote]:
        """The living votes, as cast."""
        with closing(_connect(self.path)) as connection:
            found = connection.execute(
                f"SELECT labeller, pair, again, swapped, choice, cast_at, seconds FROM {LIVING} ORDER BY votes.id"
            )
            return [
                Vote(labeller, pair, bool(again), bool(swapped), _said(choice, bool(swapped)), cast_at, seconds)
                for labeller, pair, again, swapped, choice, cast_at, seconds in found
            ]

    def progress(self, labeller: str) -> LabelProgress:
        """How far this labeller and all of them are."""
        with closing(_connect(self.path)) as connection:
            votes, people, covered = connection.execute(
                f"SELECT count(*), count(DISTINCT labeller), count(DISTINCT pair) FROM {LIVING}"
            ).fetchone()
            (mine,) = connection.execute(
                f"SELECT count(*) FROM {LIVING} WHERE labeller = ? AND NOT again", (name_of(labeller),)
            ).fetchone()
        return LabelProgress(mine, len(self.ids), votes, people, covered)


def name_of(labeller: str) -> str:
    """A labeller's name as it is kept. Raises ValueError where it is empty or too long."""
    name = " ".join(labeller.split())
    if not 0 < len(name) <= LONGEST_NAME:
        raise ValueError(f"a labeller's name has {len(name)} letters; expected 1 to {LONGEST_NAME}")
    return name


def source_of(path: str | Path) -> str:
    """The set that a file of votes belongs to. Raises ValueError where it is missing or no file of votes."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; `dpo-mm demo label --votes {path}` begins one")
    try:
        with closing(_connect(Path(path))) as connection:
            return str(connection.execute("SELECT value FROM meta WHERE key = 'source'").fetchone()[0])
    except (sqlite3.DatabaseError, TypeError) as error:
        raise ValueError(f"{path}: not a file of votes ({error})") from error


def _connect(path: Path) -> sqlite3.Connection:
    """A connection that waits for others and writes through to the disk."""
    connection = sqlite3.connect(path, timeout=60, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _said(choice: str, swapped: bool) -> str:
    return {"left": "ba"[not swapped], "right": "ab"[not swapped]}.get(choice, choice)
