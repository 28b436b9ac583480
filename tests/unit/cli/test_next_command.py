"""Every command that a command prints as the next one runs."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from dpo_mm.cli.main import app
from dpo_mm.cli.next_command import HELD_OUT, after_mining, after_quickstart
from dpo_mm.config import CompareConfig, CompareResponsesConfig, MineConfig, MineResponsesConfig
from tests.reliability.commands import JUDGE, commands, write_inputs

QUICK = {
    "images": "--num-inference-steps 1 --images-per-prompt 1 --max-prompts 2",
    "responses": "--max-new-tokens 3 --max-questions 2",
}
"""Flags that make a comparison short."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    settings = {"output_dir": "trained", "steps": 1, "batch_size": 2, "eval_fraction": 0, "lora_rank": 2}
    (folder / "CONFIG.yaml").write_text(yaml.safe_dump({**settings, "model": str(folder / "sd")}))
    return folder


def next_commands(arguments: list[str]) -> list[str]:
    """Run a command, and return the commands that it prints as the next ones."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.exception
    (line,) = re.findall(r"^Next.*?: (dpo-mm .*)$", result.output, re.MULTILINE)
    return line.split(" && ")


def run(command: str, more: str = "") -> None:
    program, *arguments = shlex.split(command)
    result = CliRunner().invoke(app, [*arguments, *more.split()])
    assert program == "dpo-mm" and result.exit_code == 0, (command, result.exception)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["import", "mine images", "relabel", "label export"])
def test_rows_train_by_the_printed_command(
    name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(inputs / "CONFIG.yaml", tmp_path)
    for command in next_commands(commands(inputs, tmp_path)[name]):
        run(command)
    assert (tmp_path / "trained" / "complete.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "responses"])
def test_trained_models_are_compared_by_the_printed_command(
    kind: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words in capitals are the user's own files and judge."""
    (command,) = next_commands([*commands(inputs, tmp_path)[f"train {kind}"]])
    assert "--prompts PROMPTS.txt --judges JUDGE" in command or "--questions QUESTIONS.jsonl" in command
    shutil.copy(inputs / "prompts.txt", tmp_path / "PROMPTS.txt")
    shutil.copy(inputs / "questions.jsonl", tmp_path / "QUESTIONS.jsonl")
    monkeypatch.chdir(tmp_path)
    run(command.replace("JUDGE", JUDGE), QUICK[kind])
    assert list(tmp_path.glob("*-compared/report.html"))


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(HELD_OUT))
def test_bundled_models_are_compared_on_their_own_held_out_set(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches shapes for the model of drawings, and judges that do not go with the set."""
    kind = "responses" if "--questions" in HELD_OUT[model] else "images"
    run(f"dpo-mm compare --model {model} --output-dir {tmp_path / 'out'} {HELD_OUT[model]}", QUICK[kind])
    assert (tmp_path / "out" / "report.html").is_file()


def test_quickstart_names_its_own_prompts_and_judges() -> None:
    """Catches the judge of shapes for the quickstart with drawings."""
    drawings: Any = CompareConfig(
        "drawings-sd", "out", adapter="a b", prompts="drawings-held-out", judges=("drawings_faithfulness",)
    )
    line = after_quickstart(drawings, "runs/one", 3)
    assert "--adapter 'a b'" in line and "--prompts drawings-held-out" in line and "--seed 4" in line
    assert "--judges drawings_faithfulness --output-dir runs/one-again" in line
    text = CompareResponsesConfig("page-reader", "out", "pages-held-out", judges=("cer", "num_tokens"))
    assert "--judges cer,num_tokens" in after_quickstart(text, "runs/two", 0)


@pytest.mark.parametrize(("adapter", "end"), [(None, ""), ("my lora", " --adapter 'my lora'")])
def test_pairs_of_an_adapter_train_that_adapter(adapter: str | None, end: str) -> None:
    mined = MineConfig("m", "p", "mined", "j", adapter=adapter)
    line = after_mining(mined, Path("mined/pairs.parquet"))
    assert line == f"Next: dpo-mm train CONFIG.yaml --pairs mined/pairs.parquet{end}"


@pytest.mark.parametrize(
    ("model", "end"), [("HuggingFaceTB/SmolVLM-Instruct", ""), ("my model", " --model 'my model'")]
)
def test_pairs_of_a_preset_train_with_it(model: str, end: str) -> None:
    line = after_mining(
        MineResponsesConfig(model, "q", "mined", judges="cer"), Path("mined/pairs.parquet"), "ocr-smolvlm"
    )
    assert line == f"Next: dpo-mm train ocr-smolvlm --pairs mined/pairs.parquet{end}"


def test_name_of_a_served_model_is_no_model_to_train() -> None:
    mined = MineResponsesConfig("vlm", "q", "mined", judges="cer", server="http://127.0.0.1:8000/v1", served="vlm")
    assert after_mining(mined, Path("p"), "ocr-smolvlm") == "Next: dpo-mm train ocr-smolvlm --pairs p"


def test_file_without_a_training_is_not_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: m")
    mined = MineConfig("m", "p", "mined", "j")
    assert "train CONFIG.yaml --pairs" in after_mining(mined, Path("pairs.parquet"), str(file))
