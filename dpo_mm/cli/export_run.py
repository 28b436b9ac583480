"""Command `dpo-mm export`."""

from __future__ import annotations

from typing import Annotated

import typer

from dpo_mm.cli.label import Overwrite
from dpo_mm.cli.terminal import say, suppress_library_output
from dpo_mm.printing.printed_text import print_rows


def export(
    run: Annotated[str, typer.Argument(help="Output folder of a training run, or the name of a bundled adapter.")],
    to: Annotated[
        str,
        typer.Option(
            help="diffusers (LoRA of an image generator), kohya (the same for ComfyUI and A1111), merged (a whole model) or "
            "vllm (LoRA of a text model)."
        ),
    ],
    output: Annotated[str | None, typer.Option(help="Folder for the files. Default: RUN-FORMAT.")] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Also upload the files to this hub id. Nothing is uploaded without it.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --push-to-hub: a new repository is public, not private.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a finished run for other programs.

    A model card is written next to the weights. Merged models are saved whole, in the precision of the training.
    """
    if public and not push_to_hub:
        raise ValueError("public belongs to --push-to-hub. Add it, or remove --public")
    folder = output or f"{run.rstrip('/')}-{to}"
    with suppress_library_output():
        from dpo_mm.export import exporting, hub

        if push_to_hub:
            hub.check_name(push_to_hub)
        print_rows(exporting.export(run, to, folder, published_as=push_to_hub, overwrite=overwrite))
        say(f"Exported: {folder}")
        if push_to_hub:
            say(f"Uploaded: {hub.push(folder, push_to_hub, public=public)}")
