from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from dpo_mm.cli.command_settings import parse_overrides
from dpo_mm.cli.main import app, main
from dpo_mm.cli.terminal import run_as_command
from dpo_mm.sources import SOURCES
from tests import forked


def commands(words: tuple[str, ...] = (), command: Any = None) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words that run it, groups included."""
    command = command or typer.main.get_command(app)
    yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands((*words, name), inner)


def help_text(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("COLUMNS", "TERMINAL_WIDTH"):
        monkeypatch.setenv(name, "80")
    result = CliRunner().invoke(app, [*words, "--help"], prog_name="dpo-mm", env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    return result.output


def test_help_at_80_columns_has_no_cut_line(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [words for words, _ in commands()]
    assert len(names) == 22
    for words in names:
        text = help_text(words, monkeypatch)
        assert "…" not in text.replace(",...", "") and "..." not in text.replace(",...", "").replace("[ARGS]...", "")
        assert max(map(len, text.splitlines())) <= 80


def test_command_summaries_are_one_short_line(monkeypatch: pytest.MonkeyPatch) -> None:
    overview = help_text((), monkeypatch)
    for words, command in commands():
        summary = (command.help or "").split("\n")[0]
        assert summary.endswith(".") and (len(summary) <= 50 or not words), (words, summary)
        if len(words) == 1:
            assert f"  {words[0]:<10}  {summary}\n" in overview


@pytest.mark.parametrize("name", ["mine", "compare"])
def test_mine_and_compare_help_show_the_optional_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = help_text((name,), monkeypatch)
    usage, _, rest = text.partition("\n")
    assert usage.startswith(f"Usage: dpo-mm {name} [OPTIONS] [") and "CONFIG" in usage
    assert "Arguments:\n" in rest and "YAML file of settings" in rest


@pytest.mark.parametrize("name", ["mine", "compare"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "m", "--prompts=p", "--seed", "3"], {"model": "m", "prompts": "p", "seed": 3}),
        (["--prompts", "p", "--seed", "3"], {"model": "in file", "prompts": "p", "seed": 3}),
        ([], {"model": "in file", "prompts": "in file", "seed": 1}),
    ],
)
def test_mine_and_compare_read_the_file_and_the_flags(
    name: str, arguments: list[str], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{name}: {{model: in file, prompts: in file, judges: j, output_dir: o, seed: 1}}\n")
    configs: list[Any] = []
    monkeypatch.setattr(f"dpo_mm.recipe.{name}", lambda config, **_: configs.append(config))
    monkeypatch.setattr("dpo_mm.evaluation.tables.print_result", lambda result: None)
    first = [] if arguments[:1] == ["--model"] else [str(file)]
    flags = [*arguments, "--judges", "j", "--output-dir", "o"] if not first else arguments
    result = CliRunner().invoke(app, [name, *first, *flags])
    assert result.exit_code == 0, result.output
    (config,) = configs
    assert {key: getattr(config, key) for key in expected} == expected


def test_version_is_printed_without_heavy_imports() -> None:
    code = (
        "import sys; sys.argv = ['dpo-mm', '--version']\n"
        "from dpo_mm.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as stop: print(stop.code)\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'diffusers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "dpo-mm 0.1.0\n0\n[]\n", done.stderr


def test_train_reads_a_trainer_name_in_the_file_and_overrides_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("train: {model: m, pairs: p, output_dir: o, steps: 3, optim: adafactor}\n")
    configs: list[Any] = []
    monkeypatch.setattr("dpo_mm.training.run.dry_run", lambda config: configs.append(config) or {})
    result = CliRunner().invoke(app, ["train", str(file), "--dry-run", "--max-steps", "7"])
    assert result.exit_code == 0, result.output
    assert (configs[0].steps, configs[0].optimizer) == (7, "adafactor")


def test_parse_overrides_reads_flags_with_and_without_values() -> None:
    assert parse_overrides(["--learning-rate", "1e-4", "--compare.seed=3"]) == {
        "learning_rate": "1e-4",
        "compare.seed": "3",
    }
    with pytest.raises(ValueError, match="'x' is not a flag"):
        parse_overrides(["x"])
    assert parse_overrides(["--resume", "--steps", "-1"]) == {"resume": "true", "steps": "-1"}


def test_main_user_error_is_one_line_with_status_2(
    tiny_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"train:\n  model: {tiny_model}\n  pairs: {pairs}\n  output_dir: {tmp_path}/out\n")
    for arguments, message in (
        (
            ["train", str(recipe), "--learning-rat", "1"],
            f"{recipe} and flags: 'learning_rat' is not a setting; did you mean 'learning_rate'",
        ),
        (["import", "pickapic"], "Expected: dpo-mm import pickapic PATH OUTPUT"),
        (["train", str(recipe), "--beta", "0"], "beta must be above 0"),
        (["train", str(tmp_path / "none.yaml")], "no such file"),
    ):
        monkeypatch.setattr(sys, "argv", ["dpo-mm", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        printed = capsys.readouterr()
        assert (exit_.value.code, printed.out) == (2, "")
        assert message in printed.err and printed.err.startswith("error: ") and printed.err.count("\n") == 1


def test_import_list_prints_every_source() -> None:
    result = CliRunner().invoke(app, ["import", "list"])
    assert result.exit_code == 0 and {line.split()[0] for line in result.output.splitlines()} == set(SOURCES)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_script_of_the_completion_is_for_the_installed_command(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches the name `python -m dpo_mm`, with which no shell reads the script."""
    monkeypatch.setattr(sys, "argv", ["/site-packages/dpo_mm/__main__.py"])
    monkeypatch.setenv("_DPO_MM_COMPLETE", f"source_{shell}")
    with pytest.raises(SystemExit):
        main()
    script = capsys.readouterr().out
    assert "_DPO_MM_COMPLETE=complete_" in script and "python" not in script


def test_python_m_dpo_mm_is_the_command(tmp_path: Path) -> None:
    """One error in a new process has the exit status and the line of the function above."""
    command = [sys.executable, "-m", "dpo_mm", "train", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "no such file" in done.stderr


@pytest.mark.slow
def test_train_dry_run_prints_the_plan_and_writes_nothing(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_model}\npairs: {pairs}\noutput_dir: {tmp_path}/out\n")
    done = forked.run("train", str(recipe), "--steps", "7", "--dry-run", check=True)
    assert "effective beta" in done.stdout and "7 of 4 x 1 pairs" in done.stdout and "reduction" in done.stdout
    assert not (tmp_path / "out").exists()


def test_demo_label_models_generate_into_samples_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    page = type("Page", (), {"run": lambda self, *arguments, **options: calls.append(arguments)})()
    monkeypatch.setattr(
        "dpo_mm.labels.fresh_samples.generate_samples", lambda *arguments, **options: calls.append(arguments)
    )
    monkeypatch.setattr("dpo_mm.pages.server.load_page", lambda name: page)
    result = CliRunner().invoke(app, ["demo", "label", "--models", "m,m+a", "--samples-dir", "s"])
    assert result.exit_code == 0, result.output
    assert calls == [(["m", "m+a"], "shapes-held-out", "s"), ("s", "labels.sqlite")]
    result = CliRunner().invoke(app, ["demo", "label", "--models", "m,m+a", "--pairs", "p"])
    assert "--pairs and --models exclude each other" in str(result.exception)


def test_run_as_command_sets_variables_that_are_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation that it catches: the user's own value is replaced."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with run_as_command():
        assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with run_as_command():
        assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize("task", ["images", "drawings", "captioner", "ocr"])
def test_quickstart_runs_the_recipe_of_each_task(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes: list[Any] = []
    monkeypatch.setattr("dpo_mm.recipe.run_recipe", lambda recipe, command: recipes.append(recipe))
    result = CliRunner().invoke(app, ["quickstart", "--task", task, "--output-dir", "out", "--seed", "3"])
    assert result.exit_code == 0 and "Next, " in result.output
    (recipe,) = recipes
    models = {"images": "shapes-sd", "drawings": "drawings-sd", "captioner": "shapes-captioner", "ocr": "page-reader"}
    assert (recipe.train.model, recipe.train.seed, recipe.train.output_dir) == (models[task], 3, "out/adapter")
