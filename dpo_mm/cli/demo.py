"""Commands that serve pages: `dpo-mm demo label`, `images` and `captions`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_mm.cli.label import Overwrite
from dpo_mm.cli.terminal import suppress_library_output
from dpo_mm.config.setting_limits import resolve_precision
from dpo_mm.errors import TrainingInterrupted
from dpo_mm.pages.address import Serving

demo = typer.Typer(no_args_is_help=True, help="Serve a page: label pairs, or compare models.")
Port = Annotated[int | None, typer.Option(help="Port. Default: the first free one from 7860.")]
Host = Annotated[
    str, typer.Option(help="Address on which the page is served. 0.0.0.0: all of this machine. Others need --people.")
]
People = Annotated[
    str | None,
    typer.Option(
        help="File with one name per line. Each person gets a secret link, and nobody else can open the page."
    ),
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(help="Another host (NAME:PORT) under which the page may be opened or shown in a frame. Repeatable."),
]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16. auto: fp32 on a CPU, else what the GPU has.")]
SETTINGS_OF_PAIRS = ("pairs", "columns", "media_dir", "output_dir", "overwrite", "resume")
"""Settings of a training run that the page chooses."""
BUNDLED_PAIRS, HELD_OUT = "shapes-faithfulness", "shapes-held-out"


@contextlib.contextmanager
def _end_quietly() -> Iterator[None]:
    """Context manager in which SIGTERM and Ctrl-C, the usual end of a page, print nothing."""
    try:
        yield
    except TrainingInterrupted as stop:
        raise SystemExit(stop.code) from None


def _serving(
    host: str, port: int | None, people: str | None, allow_host: list[str] | None, *, host_key: bool = False
) -> Serving:
    """Return where and to whom a page is served. A page that other machines can reach needs a file of people."""
    serving = Serving(host, port, allow_host or (), str(Path(people).absolute()) if people else None, host_key)
    serving.check()
    return serving


@demo.command("label")
def demo_label(
    pairs: Annotated[
        str,
        typer.Option(
            help="Pairs of images or responses to label: a Parquet file, a dataset on the hub, a bundled dataset, or a folder "
            "with one subfolder of images per model."
        ),
    ] = BUNDLED_PAIRS,
    votes: Annotated[str, typer.Option(help="SQLite file. Each vote is saved at once.")] = "labels.sqlite",
    models: Annotated[
        str | None,
        typer.Option(help="MODEL,MODEL+ADAPTER,...: generate fresh images with these models and label them."),
    ] = None,
    samples_dir: Annotated[str, typer.Option(help="Folder for the fresh images.")] = "samples",
    train: Annotated[
        str | None,
        typer.Option(
            help="Settings of a training run: a file or a preset. The host can then train on the votes on the page."
        ),
    ] = None,
    train_dir: Annotated[
        str | None, typer.Option(help="Folder of the trainings. Default: that of the votes, with -training at its end.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Prompts of the fresh images. Default: shapes-held-out, or with --train those of your pairs."
        ),
    ] = None,
    max_prompts: Annotated[int, typer.Option(help="Largest number of prompts, spread over the categories.")] = 50,
    num_inference_steps: Annotated[int, typer.Option(help="Denoising steps per fresh image.")] = 15,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance of the fresh images.")] = 1.5,
    overwrite: Overwrite = False,
    host: Host = "127.0.0.1",
    port: Port = None,
    people: People = None,
    allow_host: AllowHost = None,
) -> None:
    """Label pairs of images or responses blindly.

    The page hides which model made what. Several people can vote at once, by keyboard. It is served to this machine,
    or with --people to those who have a link.
    """
    serving = _serving(host, port, people, allow_host, host_key=train is not None)
    from dpo_mm.pages.server import load_page

    if models:
        from dpo_mm.labels.fresh_samples import generate_samples

        if pairs != BUNDLED_PAIRS:
            raise ValueError("--pairs and --models exclude each other. The folder for fresh images is --samples-dir")
        pairs = samples_dir
        with suppress_library_output():
            generate_samples(
                models.split(","),
                prompts or HELD_OUT,
                samples_dir,
                max_prompts=max_prompts,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                overwrite=overwrite,
            )
    plan = None
    if train:
        from dpo_mm.labels.export import absolute_source
        from dpo_mm.labels.vote_training import TrainingPlan

        own = HELD_OUT if pairs == BUNDLED_PAIRS else None
        plan = TrainingPlan(
            votes=str(Path(votes).absolute()),
            pairs=absolute_source(pairs),
            settings=_settings_of_training(train),
            working_folder=str(Path.cwd()),
            prompts=absolute_source(prompts) if prompts else own,
            max_prompts=max_prompts,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
    with _end_quietly():
        load_page("label").run(pairs, votes, plan=plan, train_dir=train_dir, serving=serving)


def _settings_of_training(file: str) -> dict[str, Any]:
    """Return the settings of a training run on votes. Raise ValueError if one is not valid or has no effect."""
    from dpo_mm.cli.command_settings import command_settings
    from dpo_mm.config import TrainConfig
    from dpo_mm.config.config_parsing import config_from_mapping

    values = command_settings(TrainConfig, file, "train", [])
    config = config_from_mapping(TrainConfig, {"pairs": BUNDLED_PAIRS, **values, "output_dir": "run"}, source=file)
    if config.adapter_result == "stacked":
        raise ValueError(
            f"{file}: adapter_result is stacked, and the page compares one adapter with its base. Set continued"
        )
    return {name: value for name, value in values.items() if name not in SETTINGS_OF_PAIRS}


@demo.command("images")
def demo_images(
    model: Annotated[str, typer.Option(help="Base model: a folder, a hub id, or a bundled model.")] = "shapes-sd",
    adapter: Annotated[
        str | None, typer.Option(help="Tuned adapter or denoiser. Default for the bundled model: its own.")
    ] = None,
    judges: Annotated[
        str | None, typer.Option(help="Names of judges, or module:function, separated by commas.")
    ] = None,
    comparison: Annotated[
        str | None, typer.Option(help="Folder of a saved comparison. Its images are shown too, with filters.")
    ] = None,
    precision: Precision = "auto",
    host: Host = "127.0.0.1",
    port: Port = None,
    people: People = None,
    allow_host: AllowHost = None,
) -> None:
    """Generate images with base and tuned model.

    Both use the same prompt and seed. The page is served to this machine, or with --people to those who have a link.
    """
    serving = _serving(host, port, people, allow_host)
    from dpo_mm.judges.working_folder import import_from_working_folder
    from dpo_mm.pages.server import load_page

    import_from_working_folder(judges or ())
    with _end_quietly(), suppress_library_output():
        load_page("compare_images").run(
            model,
            adapter,
            judges,
            comparison,
            precision=resolve_precision(precision),
            serving=serving,
        )


@demo.command("captions")
def demo_captions(
    model: Annotated[
        str | None, typer.Option(help="Base model: a folder or a hub id. Default: the bundled captioner and OCR model.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="Tuned adapter or model.")] = None,
    questions: Annotated[
        str | None, typer.Option(help="Questions to offer as examples: a synthetic dataset, Parquet or JSON lines.")
    ] = None,
    judge: Annotated[
        str, typer.Option(help="Judge that marks mistakes, for examples with a ground truth.")
    ] = "degeneration",
    max_new_tokens: Annotated[int, typer.Option(help="Largest number of tokens per response.")] = 256,
    precision: Precision = "auto",
    host: Host = "127.0.0.1",
    port: Port = None,
    people: People = None,
    allow_host: AllowHost = None,
) -> None:
    """Respond to a question with base and tuned model.

    Both responses are shown next to the image. The page is served to this machine, or with --people to those who have a link.
    """
    serving = _serving(host, port, people, allow_host)
    from dpo_mm.judges.working_folder import import_from_working_folder
    from dpo_mm.pages.server import load_page

    import_from_working_folder(judge)
    with _end_quietly(), suppress_library_output():
        load_page("compare_captions").run(
            model,
            adapter,
            questions,
            judge,
            max_new_tokens=max_new_tokens,
            precision=resolve_precision(precision),
            serving=serving,
        )
