"""Commands that serve pages: `dpo-mm demo label`, `images` and `captions`."""

from __future__ import annotations

from typing import Annotated

import typer

from dpo_mm.cli.terminal import suppress_library_output

demo = typer.Typer(no_args_is_help=True, help="Pages for the browser, served to this machine alone.")
Port = Annotated[int | None, typer.Option(help="Port on 127.0.0.1; the first free one from 7860 unless given.")]


@demo.command("label")
def demo_label(
    pairs: Annotated[str, typer.Option(help="Parquet, a hub set, a shipped one, or a folder.")] = "shapes-faithfulness",
    votes: Annotated[str, typer.Option(help="SQLite file that the votes go to as they are cast.")] = "labels.sqlite",
    models: Annotated[
        str | None, typer.Option(help="MODEL,MODEL+ADAPTER,...: draw fresh samples of these into the folder --pairs.")
    ] = None,
    prompts: Annotated[str, typer.Option(help="Prompts of the fresh samples.")] = "shapes-held-out",
    max_prompts: Annotated[int, typer.Option(help="So many prompts of them.")] = 50,
    num_inference_steps: Annotated[int, typer.Option(help="Steps of the fresh samples.")] = 15,
    guidance_scale: Annotated[float, typer.Option(help="Guidance of the fresh samples.")] = 1.5,
    port: Port = None,
) -> None:
    """Label pairs blind, by keyboard, several people at once; ratings of the models behind them."""
    from dpo_mm.demo_server import load_page

    if models:
        from dpo_mm.labels.fresh_samples import draw_samples

        pairs = "samples" if pairs == "shapes-faithfulness" else pairs
        with suppress_library_output():
            draw_samples(
                models.split(","), prompts, pairs, limit=max_prompts, steps=num_inference_steps, guidance=guidance_scale
            )
    load_page("label").run(pairs, votes, port=port)


@demo.command("images")
def demo_images(
    model: Annotated[str, typer.Option(help="Folder, hub id or shipped model.")] = "shapes-sd",
    adapter: Annotated[
        str | None, typer.Option(help="Tuned adapter or denoiser; the shipped model has its own.")
    ] = None,
    judges: Annotated[str | None, typer.Option(help="Names or module:function, with commas.")] = None,
    comparison: Annotated[
        str | None, typer.Option(help="Folder of a finished comparison: its pictures too, with filters.")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    port: Port = None,
) -> None:
    """Draw base and tuned from the same seed, side by side."""
    from dpo_mm.demo_server import load_page

    with suppress_library_output():
        load_page("compare_images").run(model, adapter, judges, comparison, precision=precision, port=port)


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

    with suppress_library_output():
        load_page("compare_captions").run(
            model, adapter, questions, judge, max_new_tokens=max_new_tokens, precision=precision, port=port
        )
