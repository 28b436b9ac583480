"""Commands of `dpo-mm`, except for `demo` and `label`, which have their own files."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_mm import __version__
from dpo_mm.cli import demo, label, presets
from dpo_mm.cli.command_settings import (
    SETTINGS_AS_FLAGS,
    image_or_vlm_config,
    parse_overrides,
    train_config,
    train_settings,
)
from dpo_mm.cli.export_run import export
from dpo_mm.cli.label import Overwrite
from dpo_mm.cli.next_command import after_mining, after_quickstart, after_training
from dpo_mm.cli.runs import runs
from dpo_mm.cli.settings_help import SettingsCommand, commented_config
from dpo_mm.cli.terminal import report_command, run_as_command, say, suppress_library_output
from dpo_mm.errors import TrainingInterrupted, did_you_mean
from dpo_mm.printing.printed_text import print_rows, quoted
from dpo_mm.process.process_rank import process_rank

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
app.add_typer(demo.demo, name="demo")
app.add_typer(label.label, name="label")
Pairs = Annotated[
    str,
    typer.Argument(
        help="Pairs in any form that train takes: Parquet, folders better/ and worse/, CSV, JSON lines, a dataset on the hub, or a "
        "bundled one."
    ),
]
Columns = Annotated[
    str | None, typer.Option(help="Columns to rename, theirs=ours, separated by commas. For example caption=prompt.")
]
MediaDir = Annotated[
    str | None, typer.Option(help="Folder of the images that rows name. Default: the folder of the dataset.")
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the plan (rows, steps, memory, disk, effective beta) and exit."),
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print all settings as commented YAML, with those of CONFIG, and exit.")
]
ConfigFile = Annotated[
    str | None,
    typer.Argument(
        metavar="CONFIG",
        help="YAML file of settings or of a whole recipe, or the name of a preset.",
        autocompletion=presets.preset_names,
    ),
]


def _print_version(requested: bool) -> None:
    if requested:
        print(f"dpo-mm {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Preference optimisation for image generators and vision-language models."""


def main() -> None:
    """Run a command of `dpo-mm`."""
    with run_as_command():
        app(prog_name="dpo-mm")  # also as python -m dpo_mm, whose words the shells cannot complete


@app.command()
def quickstart(
    task: Annotated[
        str,
        typer.Option(
            help="images: an image generator learns to follow its prompt. drawings: the same with drawings that people "
            "recognise. captioner: a captioner stops hallucinating objects. ocr: an OCR model stops repeating itself."
        ),
    ] = "images",
    output_dir: Annotated[str, typer.Option(help="Folder for the adapter and the report.")] = "runs/quickstart",
    baseline: Annotated[str | None, typer.Option(help="sft: also train an SFT baseline on the chosen side.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of training and sampling.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Tune a bundled model and report the effect.

    The tuned model is compared with its base on held-out prompts or questions.
    """
    from dpo_mm.recipe import read_recipe, run_recipe

    tasks = {
        "images": ("faithfulness", "quickstart"),
        "drawings": ("faithfulness", "drawings"),
        "captioner": ("captioner", "quickstart"),
        "ocr": ("ocr", "quickstart"),
    }
    if task not in tasks:
        raise ValueError(f"task {task!r} is unknown; {did_you_mean(task, tasks)}")
    flags = {"output_dir": output_dir, "seed": str(seed), "overwrite": str(overwrite)}
    flags |= {"baseline": baseline} if baseline else {}
    recipe = read_recipe(*tasks[task], flags)
    with suppress_library_output(training=True):
        run_recipe(recipe, command=report_command())
    say(after_quickstart(recipe.compare, output_dir, seed))


presets.add_commands(app)


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="Name of a dataset or file format, for example pickapic. The name 'list' prints all names."
        ),
    ],
    path: Annotated[
        str, typer.Argument(help="A folder, a file, a hub id, or 'hub' for the dataset's usual place on the hub.")
    ] = "",
    output: Annotated[str, typer.Argument(help="Output folder for Parquet files. An interrupted import resumes.")] = "",
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "train",
    axis: Annotated[
        str | None, typer.Option(help="Preference axis to import, for datasets with several (for example aesthetic).")
    ] = None,
    min_score_gap: Annotated[
        float | None, typer.Option(help="Drop pairs whose scores differ by less than this, ties included.")
    ] = None,
    max_rows: Annotated[int | None, typer.Option(help="Largest number of rows to write.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the dataset, if its source names none.")] = None,
    columns: Columns = None,
    media_dir: MediaDir = None,
    overwrite: Overwrite = False,
) -> None:
    """Convert a preference dataset to rows that train.

    Rows are streamed. Ties, votes, scores and licences stay in the rows.
    """
    from datasets import disable_progress_bars

    from dpo_mm.config.config_parsing import parse_columns
    from dpo_mm.sources import SOURCES
    from dpo_mm.sources.importing import import_set

    if source == "list":
        print_rows({name: f"{'single' if one.one_sided else 'pairs of'} {one.kind}" for name, one in SOURCES.items()})
        return
    if not path or not output:
        raise ValueError(f"import {source}: PATH or OUTPUT is missing. Expected: dpo-mm import {source} PATH OUTPUT")
    disable_progress_bars()
    result = import_set(
        source, path, output, split=split, axis=axis, min_score_gap=min_score_gap, limit=max_rows, license=license,
        columns=parse_columns(columns), media_dir=media_dir, overwrite=overwrite,
    )  # fmt: skip
    preferences = {name: f"{count:,}" for name, count in sorted(result.preferences.items())}
    left_out = {
        f"left out: {reason}": f"{count:,} (the first: {result.examples[reason]})"
        for reason, count in result.left_out.items()
    }
    print_rows({"rows": f"{result.rows:,} in {result.shards} files", **preferences, **left_out})
    folder = quoted(output)
    say(f"Imported: {output}\nNext: dpo-mm doctor {folder} && dpo-mm train CONFIG.yaml --pairs {folder}")


@app.command()
def doctor(
    pairs: Pairs,
    held_out: Annotated[
        str | None, typer.Option(help="Dataset or list of prompts that must have nothing in common with PAIRS.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="HTML file to write in addition.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 for warnings too.")] = False,
    columns: Columns = None,
    media_dir: MediaDir = None,
    overwrite: Overwrite = False,
) -> None:
    """Check a preference dataset for mistakes.

    The exit status is 0 without errors, 1 with errors, and 2 if the dataset cannot be read.
    """
    from datasets import disable_progress_bars
    from rich.console import Console

    from dpo_mm.config.config_parsing import parse_columns
    from dpo_mm.doctor import examine
    from dpo_mm.doctor.doctor_report import terminal_report, write_report
    from dpo_mm.files.output_files import output_files, write_file
    from dpo_mm.sources import SOURCES
    from dpo_mm.sources.local_pairs import local_pairs

    disable_progress_bars()
    uncertain = frozenset(name for name, source in SOURCES.items() if source.uncertain)
    with output_files([Path(output)], inputs=[pairs, held_out]) if output else contextlib.nullcontext():
        local = local_pairs(pairs, columns=parse_columns(columns), media_dir=media_dir)
        diagnosis = examine(pairs, held_out=held_out, uncertain=uncertain, local=local)
        Console().print(terminal_report(diagnosis), highlight=False, markup=False)
        if output:
            with write_file(Path(output), overwrite=overwrite) as temporary:
                write_report(temporary, diagnosis, command=report_command())
            print(f"Report: {output}")
    if diagnosis.failed(strict=strict):
        sys.exit(1)


@app.command(cls=SettingsCommand, context_settings=SETTINGS_AS_FLAGS)
def train(
    context: typer.Context,
    config: ConfigFile = None,
    dry_run: DryRun = False,
    vram: Annotated[
        float | None,
        typer.Option(
            help="With --dry-run: memory in GB of the GPU that the run must fit. By default that of the GPU at hand. "
            "precision auto is then bf16."
        ),
    ] = None,
    print_config: PrintConfig = False,
) -> None:
    """Train a model on preference pairs.

    Every setting is a flag too and overrides the file: --learning-rate 1e-5 sets learning_rate.
    """
    if print_config:
        print(commented_config(train_settings(context, config)), end="")
        return
    if vram is not None and not dry_run:
        raise ValueError("vram belongs to --dry-run. Add it, or remove --vram")
    card = {} if vram is None else {"vram": vram}
    settings = train_config(context, config, **({"precision": "bf16"} if card else {}))
    with suppress_library_output(training=True):
        from dpo_mm.training import run

        if dry_run:
            print_rows(run.dry_run(settings, **card))
            return
        result = run.train(settings, show_plan=print_rows)
    if not process_rank().is_first:
        return
    say(f"Trained: {result.folder}")
    say(after_training(settings, result.folder))


@app.command(cls=SettingsCommand, context_settings=SETTINGS_AS_FLAGS)
def verify(context: typer.Context, config: ConfigFile = None) -> None:
    """Check a training config with a few steps.

    A short run on this machine must repeat itself, resume to the same bits, and load again from its files. Every setting
    of train is a flag too.
    """
    import tempfile

    settings = train_config(context, config, output_dir="")
    with tempfile.TemporaryDirectory(prefix="dpo-mm-verify-") as folder, suppress_library_output(training=True):
        from dpo_mm.training.verify import verify

        try:
            failed = _print_checks(verify(settings, Path(folder)))
        except TrainingInterrupted as interruption:
            interruption.saved = ""  # its folder is temporary
            raise
    if failed:
        sys.exit(1)


def _print_checks(checks: Iterable[Any]) -> int:
    """Print one line per check when it is done, and return the number of failures."""
    failed = 0
    for check in checks:
        failed += check.passed is False
        word = {True: "pass", False: "FAIL", None: "    "}[check.passed]
        say(f"{word}  {check.name}: {check.observed}")
    return failed


@app.command(cls=SettingsCommand, context_settings=SETTINGS_AS_FLAGS)
def mine(context: typer.Context, config: ConfigFile = None) -> None:
    """Build preference pairs from a model's own outputs.

    Images: the best against the worst by a judge. Responses: a failure against a better response. Every setting is a flag,
    for example --seed 1.
    """
    from dpo_mm.config import MineConfig, MineResponsesConfig

    settings = image_or_vlm_config(context, config, "mine", MineConfig, MineResponsesConfig)
    with suppress_library_output():
        from dpo_mm.recipe import mine

        mined = mine(settings)
    if Path(settings.output_dir, "pairs.parquet").exists():  # else another process writes it
        say(f"Mined: {mined.path}\n{after_mining(settings, mined.path, config)}")


@app.command()
def judge(
    judge: Annotated[
        str,
        typer.Argument(
            help="Name of a judge, a name with its model (NAME:MODEL@WHERE), or module:function. The name 'list' prints all names."
        ),
    ],
    images: Annotated[str | None, typer.Option(help="Folder of images, or a preference dataset.")] = None,
    output: Annotated[
        str, typer.Option(help="Parquet file for the scores. The judge's card is written next to it, as JSON.")
    ] = "scores.parquet",
    prompts: Annotated[
        str | None, typer.Option(help="Text file with one prompt per line, in the order of the images' names.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. Default: the GPU if there is one.")] = None,
    self_test: Annotated[bool, typer.Option("--self-test", help="Verify the judge and exit.")] = False,
    reference_image: Annotated[
        str | None, typer.Option(help="For --self-test: the file CLIP.png of github.com/openai/CLIP.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Score images with a judge, or verify the judge.

    --self-test checks its files, that scores repeat, and that images score higher with their own captions.
    """
    from dpo_mm.config import JudgeConfig
    from dpo_mm.judges.table import JUDGES
    from dpo_mm.judges.working_folder import import_from_working_folder

    if judge == "list":
        return print_rows({name: f"{one.metric} ({one.better})" for name, one in JUDGES.items()})
    import_from_working_folder(judge)
    if device:
        os.environ["DPO_MM_DEVICE"] = device
    if not self_test and not images:
        raise ValueError("images missing. Give --images FOLDER or --images DATASET, or --self-test")
    with suppress_library_output():
        if self_test:
            from dpo_mm.judges.self_test import self_test as run_checks

            if _print_checks(run_checks(judge, reference_image)):
                sys.exit(1)
            return
        from dpo_mm.judges.scoring import score

        result = score(JudgeConfig(judge, str(images), output, prompts, overwrite=overwrite))
    if result:
        broken = f", {result.broken} without a score (the reason is in the column error)" * bool(result.broken)
        say(f"Scored: {result.path} ({result.scored} images, mean {result.mean:.4f}{broken})")


@app.command(cls=SettingsCommand, context_settings=SETTINGS_AS_FLAGS)
def relabel(context: typer.Context, pairs: Pairs) -> None:
    """Label the pairs of a dataset again with judges.

    Settings are flags: --judges a,b,c --output relabelled.parquet. The old labels stay in the rows.
    """
    from dpo_mm.config import RelabelConfig
    from dpo_mm.config.config_parsing import config_from_mapping
    from dpo_mm.judges.working_folder import import_from_working_folder

    settings = config_from_mapping(RelabelConfig, {"pairs": pairs, **parse_overrides(context.args)}, source="flags")
    import_from_working_folder(settings)
    with suppress_library_output():
        from dpo_mm.judges.relabel import relabel

        result = relabel(settings)
    if result:
        print_rows({key: str(value) for key, value in result.summary.items() if isinstance(value, int)})
        say(f"Relabelled: {result.path}\nNext: dpo-mm train CONFIG.yaml --pairs {quoted(result.path)} --objective soft")


@app.command(cls=SettingsCommand, context_settings=SETTINGS_AS_FLAGS)
def compare(context: typer.Context, config: ConfigFile = None) -> None:
    """Compare base and tuned model and write a report.

    Both generate from the same held-out prompts and seeds, or respond to the same questions. Judges score the outputs.
    Every setting is a flag, for example --seed 1.
    """
    from dpo_mm.config import CompareConfig, CompareResponsesConfig

    settings = image_or_vlm_config(context, config, "compare", CompareConfig, CompareResponsesConfig)
    with suppress_library_output():
        from dpo_mm.evaluation.tables import print_result
        from dpo_mm.recipe import compare

        print_result(compare(settings, command=report_command()))


app.command()(export)
app.command()(runs)
