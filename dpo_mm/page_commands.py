"""The commands of pages and votes: dpo-mm demo label | images | captions, dpo-mm label export | ratings."""

from __future__ import annotations

from typing import Annotated

import typer

from dpo_mm.terminal import print_rows, quietly

demo = typer.Typer(no_args_is_help=True, help="Pages for the browser, served to this machine alone.")
label = typer.Typer(no_args_is_help=True, help="Votes that people cast on pairs.")
Port = Annotated[int | None, typer.Option(help="Port on 127.0.0.1; the first free one from 7860 unless given.")]


@demo.command("label")
def demo_label(
    pairs: Annotated[str, typer.Option(help="Parquet, a hub set, a shipped one, or a folder.")] = "shapes-faithfulness",
    votes: Annotated[str, typer.Option(help="SQLite file that the votes go to as they are cast.")] = "labels.sqlite",
    models: Annotated[
        str | None, typer.Option(help="MODEL,MODEL+ADAPTER,...: draw fresh samples of these into the folder --pairs.")
    ] = None,
    prompts: Annotated[str, typer.Option(help="Prompts of the fresh samples.")] = "shapes-held-out",
    limit: Annotated[int, typer.Option(help="So many prompts of them.")] = 50,
    sampling_steps: Annotated[int, typer.Option(help="Steps of the fresh samples.")] = 15,
    guidance: Annotated[float, typer.Option(help="Guidance of the fresh samples.")] = 1.5,
    port: Port = None,
) -> None:
    """Label pairs blind, by keyboard, several people at once; ratings of the models behind them."""
    from dpo_mm.demo_server import load_page

    if models:
        from dpo_mm.labels.fresh import draw_samples

        pairs = "samples" if pairs == "shapes-faithfulness" else pairs
        with quietly():
            draw_samples(models.split(","), prompts, pairs, limit=limit, steps=sampling_steps, guidance=guidance)
    load_page("label").run(pairs, votes, port=port)


@demo.command("images")
def demo_images(
    model: Annotated[str, typer.Option(help="Folder, hub id or shipped model.")] = "shapes-sd",
    adapter: Annotated[
        str | None, typer.Option(help="Tuned adapter or denoiser; the shipped model has its own.")
    ] = None,
    judges: Annotated[str | None, typer.Option(help="Names or module:function, with commas.")] = None,
    finished: Annotated[
        str | None, typer.Option(help="Folder of a finished comparison: its pictures too, with filters.")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    port: Port = None,
) -> None:
    """Draw base and tuned from the same seed, side by side."""
    from dpo_mm.demo_server import load_page

    with quietly():
        load_page("compare_images").run(model, adapter, judges, finished, precision=precision, port=port)


@demo.command("captions")
def demo_captions(
    model: Annotated[str | None, typer.Option(help="Folder or hub id; the shipped captioner and reader.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Tuned adapter or model.")] = None,
    questions: Annotated[str | None, typer.Option(help="Examples to click: a shipped name, Parquet or JSONL.")] = None,
    judge: Annotated[str, typer.Option(help="What marks mistakes where the truth is known.")] = "degeneration",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 256,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    port: Port = None,
) -> None:
    """Ask base and tuned about one picture, side by side."""
    from dpo_mm.demo_server import load_page

    with quietly():
        load_page("compare_captions").run(
            model, adapter, questions, judge, max_new_tokens=max_new_tokens, precision=precision, port=port
        )


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
    from dpo_mm.labels.export import opened, standing

    for one in standing(*opened(votes, pairs)):
        print(
            f"{one.rating:6.0f}  ({one.low:.0f} to {one.high:.0f})  {one.wins} won, {one.ties} tied, {one.losses} lost  {one.model}"
        )
