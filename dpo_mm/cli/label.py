"""Commands for votes: `dpo-mm label export` and `dpo-mm label ratings`."""

from __future__ import annotations

from typing import Annotated

import typer

from dpo_mm.cli.terminal import say
from dpo_mm.printing.printed_text import print_rows, quoted

label = typer.Typer(no_args_is_help=True, help="Export votes, or rate models by them.")
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace an earlier result. Only files that dpo-mm wrote and that are unchanged."),
]
Votes = Annotated[str, typer.Argument(help="SQLite file of the votes.")]
Pairs = Annotated[str | None, typer.Option(help="The dataset that was labelled, if it has moved since.")]


@label.command("export")
def label_export(
    votes: Votes,
    output: Annotated[str | None, typer.Option(help="File to write. Default: labels.parquet or labels.json.")] = None,
    format: Annotated[
        str, typer.Option(help="rows (preference rows, Parquet), label-studio or argilla (JSON).")
    ] = "rows",
    pairs: Pairs = None,
    overwrite: Overwrite = False,
) -> None:
    """Write votes as preference rows or for other tools.

    The rows can be trained on: dpo-mm train CONFIG.yaml --pairs labels.parquet
    """
    from datasets import disable_progress_bars

    from dpo_mm.labels.export import export

    disable_progress_bars()
    output = output or ("labels.parquet" if format == "rows" else "labels.json")
    print_rows(export(votes, output, pairs=pairs, format=format, overwrite=overwrite))
    say(f"Exported: {output}")
    if format == "rows":
        say(f"Next: dpo-mm train CONFIG.yaml --pairs {quoted(output)}")


@label.command("ratings")
def label_ratings(votes: Votes, pairs: Pairs = None) -> None:
    """Rate the models by the votes on their images.

    The ratings are those of the Bradley-Terry model, with 95 % intervals.
    """
    from dpo_mm.labels.agreement import krippendorff_alpha
    from dpo_mm.labels.export import model_ratings, open_votes

    store, rows = open_votes(votes, pairs)
    ratings = model_ratings(store, rows)
    for previous, rating in zip([None, *ratings], ratings, strict=False):
        if ratings[-1].group and (previous is None or previous.group != rating.group):
            say(f"Group {rating.group + 1}, never compared with the other models, so on a separate scale:")
        say(
            f"{rating.rating:6.0f}  ({rating.low:.0f} to {rating.high:.0f})  {rating.wins} won, {rating.ties} tied, "
            f"{rating.losses} lost  {rating.model}"
        )
    say(f"Agreement of people (Krippendorff's alpha): {krippendorff_alpha(store.votes()).text()}")
