"""Options of benchmarks that count, and their tables in a page of the documentation."""

from __future__ import annotations

import argparse
from pathlib import Path


def counting_options(description: str | None) -> argparse.Namespace:
    """Read --out and --page, and silence the libraries."""
    import diffusers
    import transformers

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, help="page to write the tables to, between its markers")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    return options


def write_tables(path: Path, name: str, tables: str) -> None:
    """Replace what stands between the markers `<!-- name -->` and `<!-- /name -->` of a page."""
    before, start, rest = path.read_text().partition(f"<!-- {name} -->")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    assert end, f"{path}: no markers"
    path.write_text(f"{before}{start}\n{tables}\n{end}{after}")
