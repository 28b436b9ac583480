"""Errors that users see: an interrupted run, a row that is not readable, and hints for misspelt names."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint for an error about an unknown name: the nearest known name, or all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


class RowError(ValueError):
    """A row that is not readable or not valid. The message names its file, the row and the fix."""


def one_line(error: BaseException) -> str:
    """Return the text of an error on one line, at most 200 characters, or its type if it has none."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def name_row(name: str, fix: str) -> Iterator[None]:
    """Context manager in which any error becomes a RowError, except for errors of the disk or the memory.

    Args:
        name: the file and the row, the start of the message.
        fix: what the user can do, a sentence without its full stop.
    """
    try:
        yield
    except (RowError, MemoryError, TrainingInterrupted):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise RowError(f"{name}: {one_line(error)}. {fix}") from error


class TrainingInterrupted(Exception):
    """A run that SIGTERM ended early, after everything was saved."""
