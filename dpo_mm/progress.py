"""A progress bar with the remaining time, on standard error, for work that takes longer than a second."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Advance = Callable[[int], None]
"""Function that moves a progress bar by a number of steps."""


@contextlib.contextmanager
def progress_bar(title: str, total: int | None) -> Iterator[Advance]:
    """Context manager that prints a progress bar in the main process.

    Args:
        title: text in front of the bar.
        total: number of steps. None: unknown.

    Returns:
        A function `advance(n)` that moves the bar by n steps.
    """
    import os

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if int(os.environ.get("RANK", "0")) > 0:
        yield lambda _: None
        return
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)
