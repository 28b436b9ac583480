"""Commands for votes: `dpo-mm label export` and `dpo-mm label ratings`."""

from __future__ import annotations

from typing import Annotated

import typer

from dpo_mm.cli.terminal import print_rows

label = typer.Typer(no_args_is_help=True, help="Votes that people cast on pairs.")


Moved = Annotated[str | None, typer.Option(help="The set that was labelled, where it has moved.")]


Votes = Annotated[str, typer.Argument(help="SQLite file of the votes.")]


@label.command("export")
def label_export(
    votes: Votes,
    output: Annotated[str | None, typer.Option(help="File to write; labels.parquet or labels.json.")] = None,
    form: Annotated[
        str, typer.Option("--format", help="rows: preference rows, Parquet; label-studio or argilla: JSON.")
    ] = "rows",
    pairs: Moved = None,
) -> None:
    """Write the votes as preference rows, or for other tools."""
    from datasets import disable_progress_bars

    from dpo_mm.labels.export import export

    disable_progress_bars()
    output = output or ("labels.parquet" if form == "rows" else "labels.json")
    print_rows(export(votes, output, pairs=pairs, form=form))
    print(f"Exported: {output}" + (f"\nNext: dpo-mm train CONFIG.yaml --pairs {output}" if form == "rows" else ""))


@label.command("ratings")
def label_ratings(votes: Votes, pairs: Moved = None) -> None:
    """How the models stand by the votes: Bradley-Terry ratings with 95 % intervals."""
    from dpo_mm.labels.export import model_ratings, open_votes

    for one in model_ratings(*open_votes(votes, pairs)):
        print(
            f"{one.rating:6.0f}  ({one.low:.0f} to {one.high:.0f})  {one.wins} won, {one.ties} tied, {one.losses} lost  {one.model}"
        )
