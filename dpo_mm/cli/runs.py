"""Command `dpo-mm runs`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from dpo_mm.cli.terminal import say
from dpo_mm.printing.printed_text import printable

if TYPE_CHECKING:
    from dpo_mm.cli.run_list import RunList

MOST_COLUMNS = 6
"""Settings that the table shows at most."""


def runs(
    folder: Annotated[str, typer.Argument(help="Folder with output folders of training runs, at any depth.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with every setting and all comparisons.")] = False,
) -> None:
    """List training runs and their verdicts.

    The columns are the settings in which they differ, their steps, and the newest comparison of each.
    """
    from dpo_mm.cli.run_list import list_runs

    listed = list_runs(folder)
    if as_json:
        print(json.dumps(listed.as_dict(), indent=1))
        return
    for line in listed.damaged:
        say(f"warning: {line}")
    if listed.runs:
        _print_table(listed)


def _print_table(listed: RunList) -> None:
    from rich.console import Console
    from rich.table import Table

    from dpo_mm.cli.run_list import shown

    differing = listed.differing()
    columns, rest = differing[:MOST_COLUMNS], differing[MOST_COLUMNS:]
    if common := listed.common():
        say(", ".join(f"{name}: {value}" for name, value in common.items()))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("run", *columns, "steps done", "verdict", "difference (95 % interval)", "date"):
        table.add_column(name, overflow="fold")
    for run in listed.runs:
        newest = run.comparisons[0] if run.comparisons else None
        results = [newest.verdict, str(newest)] if newest else ["not compared", ""]
        settings = [shown(run.settings.get(name)) for name in columns]
        table.add_row(*(printable(cell) for cell in (run.folder, *settings, run.progress, *results, run.date)))
    Console().print(table, highlight=False, markup=False)
    if rest:
        say(f"They also differ in {', '.join(rest)}. --json prints every setting")
