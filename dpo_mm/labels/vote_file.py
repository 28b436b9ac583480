"""SQLite file of votes: its tables, connections that do not change other files, and errors in one line.

Triggers maintain the counts of `annotators` and `coverage`, so that no vote counts all others.
"""

from __future__ import annotations

import random
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar

from dpo_mm.labels.annotators import identity
from dpo_mm.labels.presenting import RANK_BITS

T = TypeVar("T")

LOCK_TIMEOUT = 15.0
"""Seconds to wait for another writer."""
READ_TRIES = 5
IDLE_SECONDS = 1.0
FIRST_TABLES = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE pairs (id TEXT PRIMARY KEY, digest TEXT NOT NULL)",
    "CREATE TABLE presentations ("
    " id INTEGER PRIMARY KEY, annotator TEXT NOT NULL, pair TEXT NOT NULL REFERENCES pairs(id),"
    " is_repeat INTEGER NOT NULL, swapped INTEGER NOT NULL, shown_at REAL NOT NULL, UNIQUE (annotator, pair, is_repeat))",
    "CREATE TABLE votes ("
    " id INTEGER PRIMARY KEY, presentation INTEGER NOT NULL REFERENCES presentations(id), choice TEXT NOT NULL,"
    " cast_at REAL NOT NULL, seconds REAL NOT NULL, undone_at REAL)",
    "CREATE UNIQUE INDEX one_active_vote ON votes (presentation) WHERE undone_at IS NULL",
)
COUNTS = (
    "ALTER TABLE presentations ADD COLUMN session TEXT",
    "ALTER TABLE presentations ADD COLUMN vote INTEGER",
    "CREATE TABLE annotators (name TEXT PRIMARY KEY, identity TEXT NOT NULL, presented INTEGER NOT NULL DEFAULT 0,"
    " shown INTEGER NOT NULL DEFAULT 0, votes INTEGER NOT NULL DEFAULT 0, pairs INTEGER NOT NULL DEFAULT 0, rated_at REAL)",
    "CREATE TABLE coverage (pair TEXT PRIMARY KEY, rank INTEGER NOT NULL, shown INTEGER NOT NULL DEFAULT 0,"
    " votes INTEGER NOT NULL DEFAULT 0)",
    "CREATE TABLE sessions (annotator TEXT NOT NULL, session TEXT NOT NULL, seen_at REAL NOT NULL,"
    " PRIMARY KEY (annotator, session))",
    "CREATE INDEX presentations_in_order ON presentations (annotator)",
    "CREATE INDEX presentations_by_vote ON presentations (annotator, vote)",
    "CREATE INDEX annotators_by_identity ON annotators (identity)",
    "CREATE INDEX least_shown ON coverage (shown, rank)",
    "CREATE INDEX covered ON coverage (pair) WHERE votes > 0",
    "UPDATE presentations SET vote ="
    " (SELECT id FROM votes WHERE presentation = presentations.id AND undone_at IS NULL)",
    "INSERT INTO annotators (name, identity, presented, shown, votes, pairs) SELECT annotator, identity(annotator), count(*),"
    " sum(NOT is_repeat), count(vote), sum(vote IS NOT NULL AND NOT is_repeat) FROM presentations GROUP BY annotator",
    "INSERT INTO sessions SELECT annotator, '', max(shown_at) FROM presentations GROUP BY annotator",
    "CREATE TRIGGER count_presentation AFTER INSERT ON presentations BEGIN"
    " UPDATE coverage SET shown = shown + NOT new.is_repeat WHERE pair = new.pair;"
    " UPDATE annotators SET presented = presented + 1, shown = shown + NOT new.is_repeat WHERE name = new.annotator; END",
    "CREATE TRIGGER count_vote AFTER INSERT ON votes WHEN new.undone_at IS NULL BEGIN"
    " UPDATE presentations SET vote = new.id WHERE id = new.presentation; END",
    "CREATE TRIGGER count_undo AFTER UPDATE OF undone_at ON votes WHEN new.undone_at IS NOT NULL BEGIN"
    " UPDATE presentations SET vote = NULL WHERE vote = new.id AND id = new.presentation; END",
    "CREATE TRIGGER count_active AFTER UPDATE OF vote ON presentations WHEN (old.vote IS NULL) != (new.vote IS NULL) BEGIN"
    " UPDATE coverage SET votes = votes + (new.vote IS NOT NULL) - (old.vote IS NOT NULL) WHERE pair = new.pair;"
    " UPDATE annotators SET votes = votes + (new.vote IS NOT NULL) - (old.vote IS NOT NULL),"
    " pairs = pairs + ((new.vote IS NOT NULL) - (old.vote IS NOT NULL)) * NOT new.is_repeat"
    " WHERE name = new.annotator; END",
)
"""Statements that add the counts to a file without them, such as one of the first version."""


def connect(path: Path) -> sqlite3.Connection:
    """Open a connection that waits for other writers and writes through to the disk. It does not create the file."""
    connection = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=LOCK_TIMEOUT, isolation_level=None)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


class IdleConnection:
    """A connection that is open between transactions, so that not each of them ends with a copy of the log to the file.

    It is closed when it was not needed for IDLE_SECONDS. The file is then complete without its log.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock, self._last_use = path, threading.Lock(), 0.0
        self._connection: sqlite3.Connection | None = None

    def renew(self) -> None:
        """Open the connection if it is closed, and leave it open for another IDLE_SECONDS."""
        with self._lock:
            self._last_use = time.monotonic()
            if self._connection is None:
                connection = sqlite3.connect(f"{self._path.as_uri()}?mode=rw", uri=True, check_same_thread=False)
                connection.execute("PRAGMA schema_version").fetchone()
                self._connection = connection
                threading.Thread(target=self._close_when_idle, daemon=True).start()

    def _close_when_idle(self) -> None:
        while (idle := time.monotonic() - self._last_use) < IDLE_SECONDS:
            time.sleep(IDLE_SECONDS - idle)
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None


@contextmanager
def transaction(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a transaction that locks the file for writing from its start. Its changes are on disk when it ends.

    Raises:
        ValueError, OSError: as in `one_line_errors`.
    """
    with one_line_errors(path), closing(connect(path)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def prepare(path: Path, ids: Sequence[str], *, source: str) -> None:
    """Create the file or add to it what it lacks: tables, counts, and pairs that are new in the dataset.

    Raises:
        ValueError: if the file is not a file of votes. It is not changed then.
        OSError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file. Choose another file for --votes")
    if path.exists() and path.stat().st_size:
        read(path, check_tables)
    with one_line_errors(path), closing(sqlite3.connect(path, timeout=LOCK_TIMEOUT)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    with transaction(path) as connection:
        connection.create_function("identity", 1, identity, deterministic=True)
        tables = check_tables(connection)
        for statement in (() if tables else FIRST_TABLES) + (() if "coverage" in tables else COUNTS):
            connection.execute(statement)
        check_pairs(connection, path, ids, source=source)
        _match_coverage(connection, ids)
        connection.execute("INSERT OR REPLACE INTO meta VALUES ('source', ?)", (source,))


def check_tables(connection: sqlite3.Connection) -> frozenset[str]:
    """Return the names of the tables, which are those of a file of votes or none.

    Raises:
        ValueError: if there are other tables, or the tables have other columns.
    """
    tables = frozenset(row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'"))
    if not tables:
        return tables
    try:
        connection.execute("SELECT key, value FROM meta LIMIT 0")
        connection.execute("SELECT id, digest FROM pairs LIMIT 0")
        connection.execute("SELECT id, annotator, pair, is_repeat, swapped, shown_at FROM presentations LIMIT 0")
        connection.execute("SELECT id, presentation, choice, cast_at, seconds, undone_at FROM votes LIMIT 0")
    except sqlite3.OperationalError as error:
        names = ", ".join(sorted(tables)[:5])
        raise ValueError(f"it is a database of another program, with the tables {names}") from error
    return tables


def check_pairs(connection: sqlite3.Connection, path: Path, ids: Sequence[str], *, source: str) -> None:
    """Check that all pairs that were shown are in the dataset.

    Raises:
        ValueError: if one is not, or the file is not a file of votes.
    """
    if not check_tables(connection):
        raise ValueError(f"{path}: not a file of votes (it is empty). Choose another file for --votes")
    unknown = sorted({row[0] for row in connection.execute("SELECT id FROM pairs")} - set(ids))
    if unknown:
        raise ValueError(
            f"{path}: has votes on {len(unknown)} pairs that are not in {source} (for example {unknown[0]!r}). "
            "Choose another file for --votes, or the dataset that was labelled"
        )


def _match_coverage(connection: sqlite3.Connection, ids: Sequence[str]) -> None:
    """Add the dataset's new pairs to `coverage`, in a random order, and remove those that are no longer in it."""
    stored, expected = {row[0] for row in connection.execute("SELECT pair FROM coverage")}, set(ids)
    if stored == expected:
        return
    connection.executemany("DELETE FROM coverage WHERE pair = ?", ((pair,) for pair in stored - expected))
    new = [(pair, random.getrandbits(RANK_BITS)) for pair in dict.fromkeys(ids) if pair not in stored]
    connection.executemany("INSERT INTO coverage (pair, rank) VALUES (?, ?)", new)
    connection.execute(
        "UPDATE coverage SET shown = counts.shown, votes = counts.votes FROM (SELECT pair, sum(NOT is_repeat) AS shown,"
        " count(vote) AS votes FROM presentations GROUP BY pair) AS counts WHERE counts.pair = coverage.pair"
    )


def read(path: Path, query: Callable[[sqlite3.Connection], T]) -> T:
    """Run a query on the file. The file and its folder are not changed, so both may be read-only.

    Raises:
        ValueError, OSError: as in `one_line_errors`.
    """
    log = path.with_name(path.name + "-wal")
    with one_line_errors(path):
        for _ in range(READ_TRIES):
            before = _state(path)
            if log.exists():
                break
            try:
                result = _run_query(f"{path.as_uri()}?mode=ro&immutable=1", query)
            except sqlite3.DatabaseError:
                if _state(path) == before:
                    raise
            else:
                if _state(path) == before and not log.exists():
                    return result
        try:
            return _run_query(f"{path.as_uri()}?mode=ro", query)
        except sqlite3.OperationalError as error:
            if not error.sqlite_errorname.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN")):
                raise
        return _read_copy(path, log, query)


def _read_copy(path: Path, log: Path, query: Callable[[sqlite3.Connection], T]) -> T:
    """Run a query on a copy of the file and of the log that a killed writer left in a folder that cannot be written."""
    with tempfile.TemporaryDirectory(prefix="dpo-mm-votes-") as folder:
        copy = Path(folder) / path.name
        shutil.copyfile(path, copy)
        if log.exists():
            shutil.copyfile(log, copy.with_name(log.name))
        return _run_query(copy.as_uri(), query)


def _run_query(uri: str, query: Callable[[sqlite3.Connection], T]) -> T:
    with closing(sqlite3.connect(uri, uri=True, timeout=LOCK_TIMEOUT, isolation_level=None)) as connection:
        return query(connection)


def _state(path: Path) -> tuple[int, int, int]:
    """Return what changes if the file is written or replaced."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


@contextmanager
def one_line_errors(path: Path) -> Iterator[None]:
    """Context manager that names the file, the reason and the fix if SQLite fails.

    Raises:
        ValueError: if it is not a file of votes.
        OSError: if it is locked, read-only, missing, damaged or on a full disk.
    """
    try:
        yield
    except sqlite3.Error as error:
        name = str(getattr(error, "sqlite_errorname", "") or "")
        if name.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN")) and path.parent.is_dir():
            name = "SQLITE_FULL" if shutil.disk_usage(path.parent).free < 1_000_000 else name
        if name.startswith("SQLITE_CANTOPEN") and not path.exists() and path.parent.is_dir():
            name = "SQLITE_MISSING"
        reason = next((text for start, text in REASONS.items() if name.startswith(start)), None)
        if reason is None:
            raise ValueError(f"{path}: not a file of votes ({error}). Choose another file for --votes") from error
        raise OSError(f"{path}: {reason.format(error=error)}") from error
    except ValueError as error:
        if str(error).startswith("it is a database of another program"):
            raise ValueError(f"{path}: not a file of votes, {error}. Choose another file for --votes") from error
        raise


REASONS = {
    "SQLITE_BUSY": "another program has locked this file. Close that program, then try again",
    "SQLITE_LOCKED": "another program has locked this file. Close that program, then try again",
    "SQLITE_READONLY": "this file or its folder is read-only, so votes cannot be saved. Make both writable",
    "SQLITE_FULL": "the disk is full, so votes cannot be saved. Free some space, then try again",
    "SQLITE_MISSING": "this file is missing, or its folder cannot be written. Restore it, or start the page again",
    "SQLITE_CANTOPEN": "this file cannot be opened ({error}). Make the file and its folder readable and writable",
    "SQLITE_IOERR": "the disk failed ({error}). Check the disk, then try again",
    "SQLITE_CORRUPT": "this file is damaged ({error}). Restore a copy of it",
    "SQLITE_PERM": "this file cannot be read. Change its permissions",
}
"""Start of SQLite's error name to the reason and the fix."""
