"""Cells of Markdown and HTML tables, and which cell is above, below, left and right of which.

A cell that spans several rows or columns may have several neighbours on each side. Headings of a cell are found by walking up
or left, to marked headings on the way, or else to the edge of the table.

Source: the rules of olmOCR-bench, github.com/allenai/olmocr (Apache-2.0), olmocr/bench/table_parsing.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dpo_mm.data.benchmarks.extra_package import import_extra

bs4 = import_extra("bs4", "beautifulsoup4")

SIDES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
"""Steps in rows and columns to each side."""

MOST_SPANNED = 200
"""Largest colspan and rowspan that count. A response cannot fill the memory with larger ones."""


class Cell(NamedTuple):
    """A cell: its text, the rows and columns that it spans, and whether it is a heading."""

    text: str
    rows: int = 1
    columns: int = 1
    is_heading: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        cells: the cells.
        neighbours: by side, the indices of the cells next to each cell.
    """

    cells: tuple[Cell, ...]
    neighbours: dict[str, tuple[frozenset[int], ...]]

    def headings(self, start: int, side: str) -> set[int]:
        """Return the headings of a cell on a side ("up" or "left"). Without marked ones: the last cells on the way."""
        marked, last, seen, waiting = set(), set(), set(), {start}
        while waiting:
            cell = waiting.pop()
            seen.add(cell)
            if self.cells[cell].is_heading:
                marked.add(cell)
            beyond = self.neighbours[side][cell]
            if beyond:
                waiting |= beyond - seen
            else:
                last.add(cell)
        return (marked - {start}) or (last - {start})


def find_tables(text: str, *, with_markdown: bool = True) -> list[Table]:
    """Find the tables of a text: those in Markdown, then those in HTML."""
    rows = [*(_markdown_tables(text) if with_markdown else ()), *_html_tables(text)]
    return [table for table in map(_table, rows) if table]


def _table(rows: Sequence[Sequence[Cell]]) -> Table | None:
    """Lay out the cells on a grid and find their neighbours. None if there are no cells."""
    cells = [cell for row in rows for cell in row]
    grid, corners = _grid(rows)
    width = max((x + 1 for row in grid for x, index in enumerate(row) if index is not None), default=0)
    if not width:
        return None
    grid = [(row + [None] * width)[:width] for row in grid]
    neighbours: dict[str, tuple[frozenset[int], ...]] = {}
    for side, (down, right) in SIDES.items():
        neighbours[side] = tuple(
            frozenset(
                other
                for y, x in _edge(cell, corner, down, right)
                if (other := _nearest(grid, index, y, x, down, right)) is not None
            )
            for index, (cell, corner) in enumerate(zip(cells, corners, strict=True))
        )
    return Table(tuple(cells), neighbours)


def _grid(rows: Sequence[Sequence[Cell]]) -> tuple[list[list[int | None]], list[tuple[int, int]]]:
    """Lay out cells on a grid. Rows that only spanning cells reach are added.

    Returns:
        The index of the cell at each row and column, and row and column of each cell's upper left corner.
    """
    grid: list[list[int | None]] = []
    corners: list[tuple[int, int]] = []
    spanning: list[tuple[int, int] | None] = []  # by column, a cell from above and how many more rows it spans
    for row in rows:
        line: list[int | None] = []
        waiting = list(row)
        while waiting or len(line) < len(spanning):
            above = spanning[len(line)] if len(line) < len(spanning) else None
            if above is not None:
                spanning[len(line)] = (above[0], above[1] - 1) if above[1] > 1 else None
                line.append(above[0])
            elif waiting:
                cell, index = waiting.pop(0), len(corners)
                corners.append((len(grid), len(line)))
                end = len(line) + cell.columns
                spanning += [None] * (end - len(spanning))
                spanning[len(line) : end] = [(index, cell.rows - 1) if cell.rows > 1 else None] * cell.columns
                line += [index] * cell.columns
            else:
                line.append(None)
        grid.append(line)
    while any(spanning):
        grid.append([above[0] if above else None for above in spanning])
        spanning = [(above[0], above[1] - 1) if above and above[1] > 1 else None for above in spanning]
    return grid, corners


def _edge(cell: Cell, corner: tuple[int, int], down: int, right: int) -> list[tuple[int, int]]:
    """Return rows and columns of the positions of a cell at one of its sides."""
    y, x = corner
    if right:
        return [(y + n, x + (cell.columns - 1) * (right > 0)) for n in range(cell.rows)]
    return [(y + (cell.rows - 1) * (down > 0), x + n) for n in range(cell.columns)]


def _nearest(grid: list[list[int | None]], index: int, y: int, x: int, down: int, right: int) -> int | None:
    """Return the nearest other cell from a position in a direction, if there is one."""
    while 0 <= (y := y + down) < len(grid) and 0 <= (x := x + right) < len(grid[y]):
        other = grid[y][x]
        if other is not None and other != index:
            return other
    return None


def _markdown_tables(text: str) -> Iterator[list[list[Cell]]]:
    """Two or more lines with bars in a row are a table. Its first row and column are headings."""
    lines: list[str] = []
    for line in [*text.strip().split("\n"), ""]:
        if "|" in line:
            lines.append(line)
            continue
        if len(lines) > 1:
            yield [
                [Cell(cell, is_heading=y == 0 or x == 0) for x, cell in enumerate(row)]
                for y, row in enumerate(_markdown_rows(lines))
            ]
        lines = []


def _markdown_rows(lines: Sequence[str]) -> list[list[str]]:
    rules = [line for line in lines if line.replace("|", "").strip() and not line.replace("|", "").strip().strip("- :")]
    rows = []
    for line in lines:
        if line in rules[:1] or (line.strip() and not line.strip("- :|")):
            continue  # the rule between head and body
        cells = [cell.strip() for cell in line.split("|")]
        cells = cells[1:] if cells and not cells[0] else cells
        cells = cells[:-1] if cells and not cells[-1] else cells
        if cells:
            rows.append(cells)
    return rows


def _html_tables(text: str) -> Iterator[list[list[Cell]]]:
    for table in bs4.BeautifulSoup(text, "html.parser").find_all("table"):
        rows = table.find_all("tr")
        yield [
            [
                _html_cell(cell, rows_left=len(rows) - number, in_head=row.find_parent("thead") is not None)
                for cell in row.find_all(["th", "td"], recursive=False)
            ]
            for number, row in enumerate(rows)
        ]


def _html_cell(cell: Any, *, rows_left: int, in_head: bool) -> Cell:
    for line_break in cell.find_all("br"):
        line_break.replace_with("\n")
    rows = rows_left if str(cell.get("rowspan")).strip() == "0" else _span(cell.get("rowspan"))
    text = cell.get_text(separator="").strip()
    return Cell(text, max(1, rows), _span(cell.get("colspan")), cell.name == "th" or in_head)


def _span(value: object) -> int:
    try:
        return min(max(1, int(str(value))), MOST_SPANNED)
    except ValueError:
        return 1
