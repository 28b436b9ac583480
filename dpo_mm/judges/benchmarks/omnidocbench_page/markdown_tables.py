"""Tables written with `|` in Markdown, as HTML.

Each row becomes a table, and the tables of consecutive lines are joined. The published rules have side effects
that change scores, and this module has them too:

- A cell with ":" or "---" is lost, as if it were part of the line below the header.
- The line directly above a table is lost.
- A row may go over several lines: it ends where a line ends in "|".

Source: github.com/opendatalab/OmniDocBench (Apache-2.0), utils/table_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

ROW = re.compile(r"\|.*?\|\n", re.DOTALL)
"""A row: from one bar to the first bar at the end of a line."""
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
TABLE_TAG = re.compile(r"</?t(?:able|head|body)>")
LEAST_ROWS = 2
"""Rows from which bars are taken for a table."""
ROW_TAGS = 2
"""Lines of a row without cells: its opening and its closing tag."""
OPENING, CLOSING = "<table>", "</table>"


def has_rows(text: str) -> bool:
    """Check if a text has enough rows with bars for a table."""
    return len(ROW.findall(text + "\n")) >= LEAST_ROWS


def tables_as_html(text: str) -> str:
    """Return a text with HTML instead of its tables with `|`."""
    lines = ["", *ROW.sub(_row_as_html, text.replace("\r", "") + "\n").split("\n")]
    joined = "\n".join(_join_tables(lines))
    joined = joined.replace(OPENING, '<table border="1" >')
    return joined.replace("<td>", '<td colspan="1" rowspan="1">')


def _row_as_html(row: re.Match[str]) -> str:
    """Table of the cells in the first line of a row, and of those in its third and later ones."""
    header, *others = [line.strip().split("|")[1:-1] for line in row[0].strip().split("\n")]
    body = [
        "    <tr>\n" + "".join(f"      <td>{cell.strip()}</td>\n" for cell in cells) + "    </tr>"
        for cells in others[1:]
    ]
    head = "".join(f"      <th>{cell.strip()}</th>\n" for cell in header)
    lines = [
        OPENING,
        "  <thead>",
        f"    <tr>\n{head}    </tr>",
        "  </thead>",
        "  <tbody>",
        *body,
        "  </tbody>",
        CLOSING,
    ]
    return "\n".join(lines) + "\n"


def _join_tables(lines: list[str]) -> Iterator[str]:
    """Yield lines with the tables that follow each other joined to one. `lines` begins and ends with an empty line."""
    number = 0
    while number < len(lines) - 1:
        if OPENING not in lines[number + 1]:
            yield lines[number]
            number += 1
            continue
        ends = (n for n in range(number + 1, len(lines) - 1) if CLOSING in lines[n] and OPENING not in lines[n + 1])
        end = next(ends, None)
        if end is None:  # a table without an end, which the published code drops with all that follows
            return
        yield _joined_table(lines[number + 1 : end + 1])
        number = end + 1


def _joined_table(lines: list[str]) -> str:
    parts = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if OPENING in following:
            parts.append(line)
        elif "</thead>" not in line and ":" not in line and "---" not in line:
            parts.append("\n" + line)
    rows: list[str] = []
    for table in TABLE.findall(COMMENT.sub("", "".join(parts))):
        cells = [
            line.replace("<th>", "<td>").replace("</th>", "</td>") if "<th>" in line else line
            for line in table.split("\n")
        ]
        cells = [line for line in cells if not TABLE_TAG.search(line)]
        rows += cells if len(cells) > ROW_TAGS else []
    return "\n\n" + "\n".join([OPENING, *rows, CLOSING]) + "\n\n"
