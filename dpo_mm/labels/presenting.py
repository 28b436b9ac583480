"""Choice of the next pair for an annotator. No statement reads all presentations or votes."""

from __future__ import annotations

import hashlib
import random
import secrets
import sqlite3
import time
from dataclasses import dataclass

from dpo_mm.labels.annotators import identity

BLOCK = 10
"""Number of presentations that contain one repeat."""
MIN_REPEAT_DISTANCE = 3
"""Smallest number of presentations between a pair and its repeat."""
REPEAT_CANDIDATES = 200
"""Largest number of presentations that are read to choose a repeat."""
ACTIVE_SECONDS = 600
"""A browser without a request for this long is not active. Its open pair is presented to the annotator's other browsers."""
RANK_BITS = 62
"""Bits of a pair's random position in the order of presentation."""


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
class Candidate:
    """Pair to present next, as new or as a repeat."""

    pair: str
    is_repeat: bool


def stored_name(connection: sqlite3.Connection, name: str) -> str:
    """Return the spelling under which an annotator is stored, or `name` for a new one."""
    row = connection.execute(
        "SELECT name FROM annotators WHERE identity = ? ORDER BY name = ? DESC, rowid LIMIT 1", (identity(name), name)
    ).fetchone()
    return str(row[0]) if row else name


def enter(connection: sqlite3.Connection, name: str, session: str | None) -> str:
    """Store an annotator who is new, and the time of the browser's request. Return the stored spelling of the name."""
    name = stored_name(connection, name)
    connection.execute("INSERT OR IGNORE INTO annotators (name, identity) VALUES (?, ?)", (name, identity(name)))
    if session is not None:
        connection.execute("INSERT OR REPLACE INTO sessions VALUES (?, ?, ?)", (name, session, time.time()))
    return name


def open_presentation(connection: sqlite3.Connection, name: str, session: str | None) -> PresentedPair | None:
    """Return the first presentation without a vote that no other active browser shows.

    Args:
        session: the annotator's browser. None: presentations of all browsers.
    """
    row = connection.execute(
        "SELECT id, pair, is_repeat, swapped FROM presentations WHERE annotator = ?1 AND vote IS NULL"
        " AND (?2 IS NULL OR session IS NULL OR session = ?2 OR NOT EXISTS (SELECT 1 FROM sessions"
        " WHERE annotator = ?1 AND sessions.session = presentations.session AND seen_at > ?3)) ORDER BY id LIMIT 1",
        (name, session, time.time() - ACTIVE_SECONDS),
    ).fetchone()
    return PresentedPair(row[0], row[1], bool(row[2]), bool(row[3])) if row else None


def choose_pair(connection: sqlite3.Connection, name: str) -> Candidate | None:
    """Return the repeat if one is due, otherwise a new pair with the fewest presentations. None if all were presented."""
    counts = connection.execute("SELECT presented, shown FROM annotators WHERE name = ?", (name,)).fetchone()
    presented, shown = counts or (0, 0)
    repeat = _repeated_pair(connection, name, presented)
    if repeat is not None:
        return Candidate(repeat, True)
    pair = _new_pair(connection, name, presented, shown)
    return None if pair is None else Candidate(pair, False)


def present(connection: sqlite3.Connection, name: str, candidate: Candidate) -> PresentedPair | None:
    """Store the presentation of a pair. Return None if the pair was presented to this annotator meanwhile."""
    swapped = bool(secrets.randbits(1))
    connection.execute("INSERT OR IGNORE INTO pairs VALUES (?, '')", (candidate.pair,))
    row = connection.execute(
        "INSERT INTO presentations (annotator, pair, is_repeat, swapped, shown_at) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT DO NOTHING",
        (name, candidate.pair, candidate.is_repeat, swapped, time.time()),
    )
    if row.rowcount != 1:
        return None
    return PresentedPair(int(row.lastrowid or 0), candidate.pair, candidate.is_repeat, swapped)


def _new_pair(connection: sqlite3.Connection, name: str, presented: int, shown: int) -> str | None:
    """Return a pair with the fewest presentations of those that this annotator has not been shown."""
    if shown >= connection.execute("SELECT count(*) FROM coverage").fetchone()[0]:
        return None
    start = _random_number(name, presented, 8) >> (64 - RANK_BITS)
    level = connection.execute("SELECT min(shown) FROM coverage").fetchone()[0]
    while level is not None:
        for low, high in ((start, 1 << RANK_BITS), (0, start)):
            row = connection.execute(
                "SELECT pair FROM coverage WHERE shown = ?1 AND rank >= ?2 AND rank < ?3 AND NOT EXISTS"
                " (SELECT 1 FROM presentations WHERE annotator = ?4 AND presentations.pair = coverage.pair)"
                " ORDER BY rank LIMIT 1",
                (level, low, high, name),
            ).fetchone()
            if row:
                return str(row[0])
        level = connection.execute("SELECT min(shown) FROM coverage WHERE shown > ?", (level,)).fetchone()[0]
    return None


def _repeated_pair(connection: sqlite3.Connection, name: str, presented: int) -> str | None:
    """Return the pair to repeat if the next presentation is the repeat of its block."""
    block, index = divmod(presented, BLOCK)
    if index != BLOCK // 2 + (_random_number(name, block, 4) >> 24) % (BLOCK - BLOCK // 2):
        return None
    last = connection.execute(
        "SELECT id, pair FROM presentations WHERE annotator = ? ORDER BY id DESC LIMIT ?", (name, MIN_REPEAT_DISTANCE)
    ).fetchall()
    (first,) = connection.execute(
        "SELECT id FROM presentations WHERE annotator = ? ORDER BY id LIMIT 1", (name,)
    ).fetchone()
    start = random.Random(f"{block}\0{name}").randint(first, last[-1][0])
    for low, high in ((start, last[-1][0]), (first, start)):
        candidates = connection.execute(
            "SELECT pair FROM (SELECT id, pair, is_repeat, vote FROM presentations"
            " WHERE annotator = ?1 AND id >= ?2 AND id < ?3 ORDER BY id LIMIT ?4) AS p WHERE NOT is_repeat"
            " AND NOT EXISTS (SELECT 1 FROM presentations WHERE annotator = ?1 AND pair = p.pair AND is_repeat)"
            " AND NOT EXISTS (SELECT 1 FROM votes WHERE id = p.vote AND choice = 'skip') ORDER BY id LIMIT ?5",
            (name, low, high, REPEAT_CANDIDATES, MIN_REPEAT_DISTANCE + 1),
        )
        pair = next((row[0] for row in candidates if row[0] not in {pair for _, pair in last}), None)
        if pair is not None:
            return str(pair)
    return None


def _random_number(name: str, number: int, size: int) -> int:
    """Return a number of `size` bytes that depends only on the annotator's name and a number."""
    return int.from_bytes(hashlib.blake2b(f"{number}\0{name}".encode(), digest_size=size).digest(), "big")
