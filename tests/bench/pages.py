"""Write the tables of a benchmark into a page of the documentation."""

from __future__ import annotations

from pathlib import Path


def write_tables(path: Path, name: str, tables: str) -> None:
    """Replace what stands between the markers `<!-- name -->` and `<!-- /name -->` of a page."""
    before, start, rest = path.read_text().partition(f"<!-- {name} -->")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    assert end, f"{path}: no markers"
    path.write_text(f"{before}{start}\n{tables}\n{end}{after}")
