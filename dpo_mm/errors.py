"""Errors that users see: an interrupted run, a row that is not readable, mining without a pair, and hints for misspelt names."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint for an error about an unknown name: the nearest known name, or all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


class RowError(ValueError):
    """A row that is not readable or not valid. The message names its file, the row and the fix."""


class NoPairsError(ValueError):
    """Mining that made no pair. The message names the folder, the reason and the fix."""


def one_line(error: BaseException) -> str:
    """Return the text of an error on one line, at most 200 characters, or its type if it has none."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, TypeError | AttributeError):
        return f"a value is of another type than expected ({' '.join(str(error).split())[:150]})"
    return " ".join(str(error).split())[:200] or type(error).__name__


class name_row:  # used like a function, and three times as fast as a generator with @contextmanager
    """Context manager in which any error becomes a RowError, except for errors of the disk or the memory.

    Args:
        name: the file and the row, the start of the message.
        fix: what the user can do, a sentence without its full stop.
        clear: errors that name the row already.
        columns: columns of the row, which the error about a missing one lists. None: they are not known.
    """

    __slots__ = ("clear", "columns", "fix", "name")

    def __init__(
        self, name: str, fix: str, *, clear: tuple[type[Exception], ...] = (), columns: Iterable[str] | None = None
    ) -> None:
        self.name, self.fix, self.clear, self.columns = name, fix, clear, columns

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, RowError | MemoryError):
            return
        if (isinstance(error, OSError) and error.errno is not None) or (
            isinstance(error, self.clear) and not isinstance(error, UnicodeError)
        ):
            return
        reason = one_line(error)
        if isinstance(error, KeyError) and self.columns is not None:
            reason = f"column {error} is missing (has {', '.join(self.columns)})"
        raise RowError(f"{self.name}: {reason}. {self.fix}") from error


class TrainingInterrupted(SystemExit):
    """Work that SIGTERM or Ctrl-C ended early. It ends the process with status 143 or 130 unless it is caught.

    Attributes:
        number: number of the signal.
        saved: what is saved, as a sentence without its full stop. "" if nothing is.
        command: command line that resumes the work. "" if it is not known.
    """

    def __init__(self, number: int, saved: str = "", command: str = "") -> None:
        super().__init__(128 + number)
        self.number, self.saved, self.command = number, saved, command

    def __str__(self) -> str:
        by = f"interrupted by {'Ctrl-C' if self.number == signal.SIGINT else 'SIGTERM'}"
        line = f": {self.command}" if self.command else ""
        if self.saved:
            return f"{by}. {self.saved}, and the same command resumes{line}"
        return f"{by}. Nothing was saved. Run the same command again{line}"
