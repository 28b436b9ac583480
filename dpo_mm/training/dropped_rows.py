"""Rows whose image is missing or broken when it is used: they stop the run, or are dropped by name.

Large vision-language rows are decoded in the steps, long after their headers were read. A dropped row stays dropped: its name is in
quarantine.jsonl of the run, which all of its processes read, and in every checkpoint. So the order of rows depends on nothing
else, and a resumed run has the same.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dpo_mm.data.load_pairs import UndecodableImageError
from dpo_mm.files.resumable import explain_unwritten
from dpo_mm.training.coupled_rows import CoupledRows
from dpo_mm.training.response_rows import QUARANTINE, StreamedRows

logger = logging.getLogger(__name__)

MAX_WORKERS = 256
"""Loader processes whose rows are noted."""
USER_ERRORS = ("UndecodableImageError", "RowError", "ValueError", "OSError", "FileNotFoundError", "UnwrittenError")
"""Errors whose message is enough. A loader process sends it with its traceback."""


class DroppedRows:
    """The dropped rows of a run, by id. Rows with the same id are dropped together.

    Args:
        folder: output folder of the run.
        action: raise | drop. What to do with a row whose image does not decode.
        digests: returns the digests that the rows with an id had when the run started.
    """

    def __init__(self, folder: Path, action: str, digests: Callable[[str], Sequence[str]] | None = None) -> None:
        self.path, self.action, self.digests = folder / QUARANTINE, action, digests
        self.size, self.ids = -1, frozenset[str]()

    def read(self, rows: Any, number: int) -> Any:
        """Return an encoded row, or the line that lists it if it is dropped now.

        Raises:
            UndecodableImageError: if its image does not decode and the action is "raise".
        """
        try:
            return rows[number]
        except UndecodableImageError as error:
            if self.action == "raise":
                raise
            self.add(error)
            return error.as_json_line()

    def add(self, error: UndecodableImageError) -> None:
        """Append a row to the list."""
        if error.row in self.current():
            return
        logger.warning("row %s is dropped: %s does not decode (%s)", error.row, error.column, error.reason)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with explain_unwritten(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(error.as_json_line())

    def current(self) -> frozenset[str]:
        """Return the ids of the rows that this process or another one has dropped until now."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self.size:
            self.size, self.ids = size, frozenset(line["row"] for line in self._lines())
        return self.ids

    def records(self) -> list[dict[str, Any]]:
        """Return the list for a checkpoint, with the digests of the rows."""
        return [{**line, "digests": list(self.digests(line["row"])) if self.digests else []} for line in self._lines()]

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]  # the last one may not be complete
        return [json.loads(line) for line in lines]


class RunRows:
    """Rows as the steps of a run read them: a dropped row is replaced by the next one that is left.

    It notes which row each loader process reads, for the message if it dies.

    Args:
        rows: encoded rows, which may raise UndecodableImageError.
        streamed: the rows of the dataset that they come from.
        dropped: the run's list.
    """

    def __init__(self, rows: Any, streamed: StreamedRows, dropped: DroppedRows) -> None:
        self.rows, self.streamed, self.dropped, self.lengths = rows, streamed, dropped, streamed.lengths
        self.known, self.numbers = frozenset[str](), frozenset[int]()
        self.loading = torch.zeros((MAX_WORKERS, 2), dtype=torch.int64).share_memory_()
        """Process id of each loader process, and 1 + the number of the row that it reads, or 0."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number >= len(self):
            raise IndexError(number)
        worker = torch.utils.data.get_worker_info()
        if worker is None or worker.id >= MAX_WORKERS:
            return self._read(number)
        self.loading[worker.id] = torch.tensor([os.getpid(), number + 1])
        row = self._read(number)
        self.loading[worker.id, 1] = 0
        return row

    def _read(self, number: int) -> dict[str, Any]:
        for place in range(number, number + len(self)):
            at = place % len(self)
            if at in self._dropped_numbers():
                continue
            row = self.dropped.read(self.rows, at)
            if not isinstance(row, str):
                return row
        raise ValueError(f"{self.streamed.config.pairs}: no row has images that decode. Fix the images")

    def _dropped_numbers(self) -> frozenset[int]:
        ids = self.dropped.current()
        if ids != self.known:
            self.known = ids
            self.numbers = frozenset(n for n, name in enumerate(self.streamed.ids()) if name in ids)
        return self.numbers

    def read_by(self, process: int) -> str | None:
        """Return the id of the row that a loader process reads, or None if it is not known."""
        numbers = [number - 1 for pid, number in self.loading.tolist() if pid == process and number]
        return self.streamed.ids()[numbers[0]] if numbers else None


def streamed_rows(rows: Any) -> StreamedRows | None:
    """Return the rows of the dataset that encoded rows come from, or None if they are in memory."""
    while rows is not None and not isinstance(rows, StreamedRows):
        rows = getattr(rows, "rows", None)
    return rows


def run_rows(rows: Any) -> RunRows | None:
    """Return the rows of a run that may drop some, or None if they are in memory."""
    while rows is not None and not isinstance(rows, RunRows):
        rows = getattr(rows, "rows", None)
    return rows


def missing_log_probs(rows: Any, number: int) -> UndecodableImageError:
    """Return the error for a row without reference log-probs, because its image did not decode when they were computed."""
    streamed, reason = streamed_rows(rows), ValueError("it did not when the reference log-probs were computed")
    assert streamed is not None, "only rows of a dataset on disk break"
    return UndecodableImageError(streamed.config.pairs, streamed.ids()[number], "an image", reason)


def rows_of_run(rows: Any, dropped: DroppedRows) -> Any:
    """Return rows in which the next one replaces a dropped one. Rows in memory are returned unchanged."""
    if isinstance(rows, CoupledRows):
        return CoupledRows(rows_of_run(rows.liked, dropped), rows_of_run(rows.disliked, dropped))
    streamed = streamed_rows(rows)
    return rows if streamed is None else RunRows(rows, streamed, dropped)


@contextlib.contextmanager
def explain_loader_errors(*parts: Any) -> Iterator[None]:
    """Context manager that turns an error of a loader process, or its death, into one line.

    Args:
        *parts: the rows that are loaded.

    Raises:
        ValueError: with the message of the error.
        ChildProcessError: if a process died. It names the row that it read, if that is known.
    """
    try:
        yield
    except Exception as error:
        text = str(error)
        if re.match(rf"Caught ({'|'.join(USER_ERRORS)}) in DataLoader worker process", text):
            raise ValueError(text.rstrip().rpartition("\n")[2].partition(": ")[2]) from error
        pids = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", text)
        if pids is None:
            raise
        rows = [part for part in parts if isinstance(part, RunRows)]
        read = [(part, part.read_by(int(pid))) for pid in pids[1].split(",") for part in rows]
        named = [
            f" while it read row {name} of {part.streamed.config.pairs}" for part, name in read if name is not None
        ]
        raise ChildProcessError(
            f"a process that loads rows (pid {pids[1]}) was killed{named[0] if named else ''}. If memory ran out, take fewer "
            "workers, or workers: 0"
        ) from error
