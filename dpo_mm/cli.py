"""The command line: dpo-mm quickstart | train | verify | mine | compare | demo | label."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True}
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan (rows, steps, memory, effective beta) and stop.")
]


def main() -> None:
    """Run a command; whatever the user can mend is one line on standard error, with exit status 2."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("DPO_MM_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def flags(arguments: list[str]) -> dict[str, str]:
    """`--key value`, `--key=value` and a bare `--key` (true) as a mapping, dashes as underscores.

    Raises ValueError for anything else.
    """
    values: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise ValueError(f"{argument!r} is not a flag; expected --key value")
        key, equals, value = argument[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        values[key.replace("-", "_")] = value
    return values


def command_line() -> str:
    return shlex.join(["dpo-mm", *sys.argv[1:]])


@contextmanager
def quietly() -> Iterator[None]:
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


def _section(path: str | None, name: str, given: dict[str, str]) -> dict[str, Any]:
    """A command's settings: its section of a recipe, or the whole of a flat file, with the flags on top."""
    from dpo_mm.config import read

    values = read(path) if path else {}
    return {**values.get(name, values), **given}


def _print(rows: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key, value in rows.items():
        table.add_row(key, value)
    Console().print(table, highlight=False, markup=False)


@app.command()
def quickstart(
    task: Annotated[
        str,
        typer.Option(
            help="images: a generator that follows its prompt; captioner: one that stops inventing; ocr: a reader that stops looping."
        ),
    ] = "images",
    output_dir: Annotated[str, typer.Option(help="Where the adapter and the report go.")] = "runs/quickstart",
    baseline: Annotated[str | None, typer.Option(help="sft: also train SFT on the same chosen pictures.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of training and sampling.")] = 0,
) -> None:
    """Tune a shipped model, compare it with its base, write a report."""
    from dpo_mm.config import CompareAnswersConfig
    from dpo_mm.recipe import read_recipe, run

    tasks = {"images": ("faithfulness", "shapes"), "captioner": ("captioner", "shapes"), "ocr": ("ocr", "pages")}
    if task not in tasks:
        from dpo_mm.config import nearest

        raise ValueError(f"task {task!r} is unknown; {nearest(task, tasks)}")
    given = {"output_dir": output_dir, "seed": str(seed), **({"baseline": baseline} if baseline else {})}
    with quietly():
        recipe = read_recipe(*tasks[task], given)
        run(recipe, command=command_line())
    config = recipe.compare
    again = f"dpo-mm compare --model {config.model} --adapter {config.adapter} --output-dir {output_dir}-again"
    if isinstance(config, CompareAnswersConfig):
        print(f"Next, sampled instead of greedy: {again} --questions {config.questions} --temperature 1")
    else:
        sampling = f"--sampling-steps {config.sampling_steps} --guidance {config.guidance:g} --seed {seed + 1}"
        print(f"Next, on other seeds: {again} {sampling}")


@app.command(context_settings=FLAGS)
def train(context: typer.Context, config: str, dry_run: DryRun = False) -> None:
    """Train as CONFIG.yaml says; any setting can be given as --key value."""
    from dpo_mm.config import TrainConfig, build

    settings = build(TrainConfig, _section(config, "train", flags(context.args)), where=config)
    with quietly():
        from dpo_mm.trainer import Stopped, plan, train

        if dry_run:
            _print(plan(settings))
            return
        try:
            trained = train(settings)
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(143)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    _print(trained.settings)
    print(f"Trained: {trained.folder}")
    print(
        f"Next: dpo-mm compare --model {settings.model} --adapter {trained.folder} --output-dir {trained.folder}-compared"
    )


@app.command(context_settings=FLAGS)
def verify(context: typer.Context, config: str) -> None:
    """Check CONFIG.yaml on this machine with a few steps: repeats itself, resumes to the same bits, files come back."""
    import tempfile

    from dpo_mm.config import TrainConfig, build

    values = {"output_dir": "", **_section(config, "train", flags(context.args))}
    settings = build(TrainConfig, values, where=config)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="dpo-mm-verify-") as folder, quietly():
        from dpo_mm.verify import verify

        for check in verify(settings, Path(folder)):
            failed += not check.passed
            print(f"{'pass' if check.passed else 'FAIL'}  {check.name}: {check.seen}", flush=True)
    if failed:
        sys.exit(1)


def _of_its_kind(context: typer.Context, name: str, pictures: type[Any], answers: type[Any]) -> Any:
    """The settings of a command that takes image generators and vision-language models, told apart by the model.

    A file of settings may come first: click would take the first flag for it, were it an argument of the command.
    """
    from dpo_mm.config import build
    from dpo_mm.policies.protocol import LANGUAGE, family_of
    from dpo_mm.shipped import locate

    config = context.args[0] if context.args and not context.args[0].startswith("--") else None
    values = _section(config, name, flags(context.args[1:] if config else context.args))
    language = "questions" in values or (
        "model" in values
        and "prompts" not in values
        and family_of(locate(values["model"]), revision=values.get("revision")) == LANGUAGE
    )
    return build(answers if language else pictures, values, where=config or "flags")


@app.command(context_settings=FLAGS)
def mine(context: typer.Context) -> None:
    """Pairs from a model's own pictures (best against worst) or its own wrong answers: mine [FILE.yaml] --key value ..."""
    from dpo_mm.config import MineAnswersConfig, MineConfig

    settings = _of_its_kind(context, "mine", MineConfig, MineAnswersConfig)
    with quietly():
        from dpo_mm.recipe import mine
        from dpo_mm.trainer import Stopped

        try:
            path = mine(settings)
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(143)
    print(f"Mined: {path}\nNext: dpo-mm train CONFIG.yaml --pairs {path}")


@app.command(context_settings=FLAGS)
def compare(context: typer.Context) -> None:
    """Base and tuned on the same seeds or questions, judged, with a report: compare [FILE.yaml] --key value ..."""
    from dpo_mm.config import CompareAnswersConfig, CompareConfig

    settings = _of_its_kind(context, "compare", CompareConfig, CompareAnswersConfig)
    with quietly():
        from dpo_mm.recipe import compare, show

        show(compare(settings, title="Base and tuned", command=command_line()))


demo = typer.Typer(no_args_is_help=True, help="Pages for the browser, served to this machine alone.")
app.add_typer(demo, name="demo")
label = typer.Typer(no_args_is_help=True, help="Votes that people cast on pairs.")
app.add_typer(label, name="label")
Port = Annotated[int | None, typer.Option(help="Port on 127.0.0.1; the first free one from 7860 unless given.")]


@demo.command("label")
def demo_label(
    pairs: Annotated[str, typer.Option(help="Parquet, a hub set, a shipped one, or a folder.")] = "shapes-faithfulness",
    votes: Annotated[str, typer.Option(help="SQLite file that the votes go to as they are cast.")] = "labels.sqlite",
    port: Port = None,
) -> None:
    """Label pairs blind, by keyboard, several people at once."""
    from dpo_mm.pages import load_page

    load_page("label").run(pairs, votes, port=port)


@demo.command("images")
def demo_images(
    model: Annotated[str, typer.Option(help="Folder, hub id or shipped model.")] = "shapes-sd",
    adapter: Annotated[
        str | None, typer.Option(help="Tuned adapter or denoiser; the shipped model has its own.")
    ] = None,
    judges: Annotated[str | None, typer.Option(help="Names or module:function, with commas.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    port: Port = None,
) -> None:
    """Draw base and tuned from the same seed, side by side."""
    from dpo_mm.pages import load_page

    with quietly():
        load_page("compare_images").run(model, adapter, judges, precision=precision, port=port)


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
    from dpo_mm.pages import load_page

    with quietly():
        load_page("compare_captions").run(
            model, adapter, questions, judge, max_new_tokens=max_new_tokens, precision=precision, port=port
        )


@label.command("export")
def label_export(
    votes: Annotated[str, typer.Argument(help="SQLite file of the votes.")],
    output: Annotated[str, typer.Option(help="Parquet file to write.")] = "labels.parquet",
    pairs: Annotated[str | None, typer.Option(help="The set that was labelled, where it has moved.")] = None,
) -> None:
    """Write the votes as preference rows."""
    from datasets import disable_progress_bars

    from dpo_mm.labels.export import export

    disable_progress_bars()
    _print(export(votes, output, pairs=pairs))
    print(f"Exported: {output}\nNext: dpo-mm train CONFIG.yaml --pairs {output}")
