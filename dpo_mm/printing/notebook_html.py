"""HTML of results for notebooks. Texts of datasets and models are escaped."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from dpo_mm.printing.printed_text import printable

LONGEST = 300
"""Longest text of a cell, in characters."""


def escaped(text: object) -> str:
    """Return a text for HTML, shortened, with its control characters as escapes."""
    plain = printable(str(text))
    return html.escape(plain if len(plain) <= LONGEST else f"{plain[: LONGEST - 3]}...")


def table_of_values(title: str, rows: Mapping[str, object]) -> str:
    """Return a heading and a table of names and values."""
    return _table(title, [f"<th>{escaped(name)}</th><td>{escaped(value)}</td>" for name, value in rows.items()])


def table_with_head(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a heading and a table whose first row names its columns."""
    cells = ["".join(f"<th>{escaped(name)}</th>" for name in head)]
    cells += ["".join(f"<td>{escaped(value)}</td>" for value in row) for row in rows]
    return _table(title, cells)


def _table(title: str, rows: Sequence[str]) -> str:
    body = "".join(f'<tr style="text-align: left">{row}</tr>' for row in rows)
    return f"<p><b>{escaped(title)}</b></p><table>{body}</table>"
