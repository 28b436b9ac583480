"""What the command line says and what it keeps quiet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def suppress_library_output() -> Iterator[None]:
    """Within it the libraries' own bars and notices are off; ours remain."""
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
    """Names and values, one a line."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key, value in rows.items():
        table.add_row(key, value)
    Console().print(table, highlight=False, markup=False)
