"""A progress bar with the remaining time, on standard error or in a notebook, for work that takes longer than a second."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from dpo_mm.process.process_rank import process_rank

SECONDS_PER_UPDATE = 0.05
"""Time between two updates of the bar. An import advances 15,000 times per second."""


class Advance(Protocol):
    """Function that moves a progress bar by a number of steps, and gives it another title."""

    def __call__(self, count: int, title: str | None = None) -> None: ...


@contextlib.contextmanager
def progress_bar(title: str, total: int | None) -> Iterator[Advance]:
    """Context manager that prints a progress bar in the main process.

    Args:
        title: text in front of the bar.
        total: number of steps. None: unknown.

    Returns:
        A function `advance(n)` that moves the bar by n steps. `advance(n, title)` also changes its title.
    """
    import time

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not process_rank().is_first:
        yield lambda count, title=None: None
        return
    if Console().is_jupyter:  # rich needs ipywidgets there
        from tqdm.auto import tqdm

        with tqdm(desc=title, total=total) as notebook_bar:

            def advance_in_notebook(count: int, title: str | None = None) -> None:
                if title:
                    notebook_bar.set_description(title, refresh=False)
                notebook_bar.update(count)

            yield advance_in_notebook
        return
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task, pending, last = bar.add_task(title, total=total), 0, time.monotonic()

        def advance(count: int, title: str | None = None) -> None:
            nonlocal pending, last
            pending, now = pending + count, time.monotonic()
            if now - last >= SECONDS_PER_UPDATE or title:
                bar.update(task, advance=pending, description=title)
                pending, last = 0, now

        yield advance
        bar.advance(task, pending)
