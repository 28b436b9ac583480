"""Text for the terminal: control characters of datasets and models as escapes, and paths quoted for a shell."""

from __future__ import annotations

import re
import shlex
from typing import Any

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except for tab and newline, marks that change the direction of text, and halves of characters."""


def printable(text: str) -> str:
    r"""Return a text with its control characters as escapes, such as \x1b."""
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def print_rows(rows: dict[str, str]) -> None:
    """Print names and values, one per line."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(printable(key), printable(value))
    Console().print(table, highlight=False, markup=False)


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun in singular or plural: 1 vote, 2 votes."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def quoted(path: Any) -> str:
    """Quote a path for a command to copy. A name that begins with a dash is not read as an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
