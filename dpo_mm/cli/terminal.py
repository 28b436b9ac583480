"""Terminal output: tables of names and values, and silence for other libraries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def suppress_library_output() -> Iterator[None]:
    """Context manager that disables the progress bars and notices of other libraries."""
    import datasets
    import diffusers
    import transformers

    datasets.disable_progress_bars()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    yield


def print_rows(rows: dict[str, str]) -> None:
    """Print names and values, one per line."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key, value in rows.items():
        table.add_row(key, value)
    Console().print(table, highlight=False, markup=False)
