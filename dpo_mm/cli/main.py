"""The command line: quickstart | import | doctor | relabel | train | verify | mine | judge | compare | demo | label."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_mm.cli import demo, label
from dpo_mm.cli.terminal import print_rows, suppress_library_output
from dpo_mm.resumable import exit_cleanly_on_sigterm

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.add_typer(demo.demo, name="demo")
app.add_typer(label.label, name="label")
FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True}
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan (rows, steps, memory, effective beta) and stop.")
]


def main() -> None:
    """Run a command; whatever the user can mend is one line on standard error, with exit status 2."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        with exit_cleanly_on_sigterm():  # but training, which saves first, and mining of answers, which ends its shard
            app()
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("DPO_MM_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def parse_overrides(arguments: list[str]) -> dict[str, str]:
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


def _command_settings(path: str | None, name: str, given: dict[str, str]) -> dict[str, Any]:
    """A command's settings: its section of a recipe, or the whole of a flat file, with the flags on top."""
    from dpo_mm.config import read_yaml

    values = read_yaml(path) if path else {}
    return {**values.get(name, values), **given}


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
    from dpo_mm.config import CompareResponsesConfig
    from dpo_mm.recipe import read_recipe, run_recipe

    tasks = {"images": ("faithfulness", "shapes"), "captioner": ("captioner", "shapes"), "ocr": ("ocr", "pages")}
    if task not in tasks:
        from dpo_mm.errors import did_you_mean

        raise ValueError(f"task {task!r} is unknown; {did_you_mean(task, tasks)}")
    given = {"output_dir": output_dir, "seed": str(seed), **({"baseline": baseline} if baseline else {})}
    with suppress_library_output():
        recipe = read_recipe(*tasks[task], given)
        run_recipe(recipe, command=command_line())
    config = recipe.compare
    again = f"dpo-mm compare --model {config.model} --adapter {config.adapter} --output-dir {output_dir}-again"
    if isinstance(config, CompareResponsesConfig):
        print(f"Next, sampled instead of greedy: {again} --questions {config.questions} --temperature 1")
    else:
        sampling = f"--num-inference-steps {config.num_inference_steps} --guidance-scale {config.guidance_scale:g} --seed {seed + 1}"
        print(f"Next, on other seeds: {again} {sampling}")


@app.command("import")
def import_(
    source: Annotated[
        str, typer.Argument(help="Dataset or file format, such as pickapic. The name 'list' prints all names.")
    ],
    path: Annotated[str, typer.Argument(help="A folder, a file, a hub id, or hub for the set's own place there.")],
    output: Annotated[str, typer.Argument(help="Folder of Parquet to write; one that was cut is gone on with.")],
    split: Annotated[str, typer.Option(help="The set's split.")] = "train",
    axis: Annotated[str | None, typer.Option(help="What was judged, where the set says it for several axes.")] = None,
    min_score_gap: Annotated[float | None, typer.Option(help="Leave out pairs that are less apart, ties too.")] = None,
    max_rows: Annotated[int | None, typer.Option(help="Rows to write, at most.")] = None,
    license: Annotated[str | None, typer.Option(help="The set's licence, where its source names none.")] = None,
) -> None:
    """Bring a preference set into the form that train takes, streamed; ties, votes, scores and licences are kept."""
    from datasets import disable_progress_bars

    from dpo_mm.sources.importing import import_set

    disable_progress_bars()
    found = import_set(
        source, path, output, split=split, axis=axis, min_score_gap=min_score_gap, limit=max_rows, license=license
    )
    counted = {name: f"{count:,}" for name, count in sorted(found.preferences.items())}
    left_out = {
        f"left out: {reason}": f"{count:,} (the first: {found.examples[reason]})"
        for reason, count in found.left_out.items()
    }
    print_rows({"rows": f"{found.rows:,} in {found.shards} files", **counted, **left_out})
    place = shlex.quote(output)
    print(f"Imported: {output}\nNext: dpo-mm doctor {place} && dpo-mm train CONFIG.yaml --pairs {place}")


@app.command()
def doctor(
    pairs: Annotated[str, typer.Argument(help="Parquet, a folder of it, a hub set, or a shipped one.")],
    held_out: Annotated[str | None, typer.Option(help="A set, or a list of prompts, that must not be in it.")] = None,
    output: Annotated[str | None, typer.Option(help="HTML file to write as well.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 for warnings too.")] = False,
) -> None:
    """Look for what is wrong with a preference set. Exit status: 0 no errors, 1 errors found, 2 it can't be read."""
    from datasets import disable_progress_bars
    from rich.console import Console

    from dpo_mm.doctor import examine
    from dpo_mm.doctor.doctor_report import terminal, write_report
    from dpo_mm.sources import SOURCES

    disable_progress_bars()
    uncertain = frozenset(name for name, source in SOURCES.items() if source.uncertain)
    diagnosis = examine(pairs, held_out=held_out, uncertain=uncertain)
    Console().print(terminal(diagnosis), highlight=False, markup=False)
    if output:
        print(f"Report: {write_report(Path(output), diagnosis, command=command_line())}")
    if diagnosis.failed(strict=strict):
        sys.exit(1)


@app.command(context_settings=FLAGS)
def train(context: typer.Context, config: str, dry_run: DryRun = False) -> None:
    """Train as CONFIG.yaml says; any setting can be given as --key value."""
    from dpo_mm.config import TrainConfig, config_from_mapping

    settings = config_from_mapping(
        TrainConfig, _command_settings(config, "train", parse_overrides(context.args)), where=config
    )
    with suppress_library_output():
        from dpo_mm.errors import TrainingInterrupted
        from dpo_mm.training import run

        if dry_run:
            print_rows(run.dry_run(settings))
            return
        try:
            trained = run.train(settings)
        except TrainingInterrupted as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(143)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    print_rows(trained.settings)
    print(f"Trained: {trained.folder}")
    print(
        f"Next: dpo-mm compare --model {settings.model} --adapter {trained.folder} --output-dir {trained.folder}-compared"
    )


@app.command(context_settings=FLAGS)
def verify(context: typer.Context, config: str) -> None:
    """Check CONFIG.yaml on this machine with a few steps: repeats itself, resumes to the same bits, files come back."""
    import tempfile

    from dpo_mm.config import TrainConfig, config_from_mapping

    values = {"output_dir": "", **_command_settings(config, "train", parse_overrides(context.args))}
    settings = config_from_mapping(TrainConfig, values, where=config)
    with tempfile.TemporaryDirectory(prefix="dpo-mm-verify-") as folder, suppress_library_output():
        from dpo_mm.training.verify import verify

        if _print_checks(verify(settings, Path(folder))):
            sys.exit(1)


def _print_checks(checks: Iterable[Any]) -> int:
    """Checks, a line each as they are done; how many failed. One that says nothing (None) is no failure."""
    failed = 0
    for check in checks:
        failed += check.passed is False
        word = {True: "pass", False: "FAIL", None: "    "}[check.passed]
        print(f"{word}  {check.name}: {check.observed}", flush=True)
    return failed


def _image_or_vlm_config(context: typer.Context, name: str, pictures: type[Any], answers: type[Any]) -> Any:
    """The settings of a command that takes image generators and vision-language models, told apart by the model.

    A file of settings may come first: click would take the first flag for it, were it an argument of the command.
    """
    from dpo_mm.assets import resolve_asset
    from dpo_mm.config import config_from_mapping
    from dpo_mm.policies.families import VLM_POLICY, policy_path_for

    config = context.args[0] if context.args and not context.args[0].startswith("--") else None
    values = _command_settings(config, name, parse_overrides(context.args[1:] if config else context.args))
    language = "questions" in values or (
        "model" in values
        and "prompts" not in values
        and policy_path_for(resolve_asset(values["model"]), revision=values.get("revision")) == VLM_POLICY
    )
    return config_from_mapping(answers if language else pictures, values, where=config or "flags")


@app.command(context_settings=FLAGS)
def mine(context: typer.Context) -> None:
    """Pairs from a model's own pictures (best against worst) or its own wrong answers: mine [FILE.yaml] --key value ..."""
    from dpo_mm.config import MineConfig, MineResponsesConfig

    settings = _image_or_vlm_config(context, "mine", MineConfig, MineResponsesConfig)
    with suppress_library_output():
        from dpo_mm.errors import TrainingInterrupted
        from dpo_mm.recipe import mine

        try:
            path = mine(settings)
        except TrainingInterrupted as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(143)
    print(f"Mined: {path}\nNext: dpo-mm train CONFIG.yaml --pairs {path}")


@app.command()
def judge(
    judge: Annotated[str, typer.Argument(help="A name, a name with its model (NAME:MODEL@WHERE), or module:function.")],
    images: Annotated[str | None, typer.Option(help="Folder of pictures, or a preference set.")] = None,
    output: Annotated[
        str, typer.Option(help="Parquet file to write; the judge's card goes beside it.")
    ] = "scores.parquet",
    prompts: Annotated[str | None, typer.Option(help="A prompt a line, in the order of the pictures' names.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU where there is one.")] = None,
    self_test: Annotated[bool, typer.Option("--self-test", help="Check the judge itself and stop.")] = False,
    reference_image: Annotated[
        str | None, typer.Option(help="With --self-test: CLIP.png of github.com/openai/CLIP.")
    ] = None,
) -> None:
    """Score pictures, or check that a judge is the one it is named after."""
    from dpo_mm.config import JudgeConfig

    if device:
        os.environ["DPO_MM_DEVICE"] = device
    if not self_test and not images:
        raise ValueError("images missing; give --images FOLDER or --images SET, or --self-test")
    with suppress_library_output():
        if self_test:
            from dpo_mm.judges.self_test import self_test as checks

            if _print_checks(checks(judge, reference_image)):
                sys.exit(1)
            return
        from dpo_mm.judges.scoring import score

        found = score(JudgeConfig(judge, str(images), output, prompts))
    if found:
        broken = f", {found.broken} without a score (column error says why)" * bool(found.broken)
        print(f"Scored: {found.path} ({found.scored} pictures, mean {found.mean:.4f}{broken})")


@app.command(context_settings=FLAGS)
def relabel(context: typer.Context, pairs: str) -> None:
    """New labels of a set's pairs by several judges: relabel SET --judges a,b,c --output FILE.parquet --key value ..."""
    from dpo_mm.config import RelabelConfig, config_from_mapping

    settings = config_from_mapping(RelabelConfig, {"pairs": pairs, **parse_overrides(context.args)}, where="flags")
    with suppress_library_output():
        from dpo_mm.judges.relabel import relabel

        done = relabel(settings)
    if done:
        print_rows({key: str(value) for key, value in done.summary.items() if isinstance(value, int)})
        print(f"Relabelled: {done.path}\nNext: dpo-mm train CONFIG.yaml --pairs {done.path} --objective soft")


@app.command(context_settings=FLAGS)
def compare(context: typer.Context) -> None:
    """Base and tuned on the same seeds or questions, judged, with a report: compare [FILE.yaml] --key value ..."""
    from dpo_mm.config import CompareConfig, CompareResponsesConfig

    settings = _image_or_vlm_config(context, "compare", CompareConfig, CompareResponsesConfig)
    with suppress_library_output():
        from dpo_mm.recipe import compare, print_result

        print_result(compare(settings, command=command_line()))
