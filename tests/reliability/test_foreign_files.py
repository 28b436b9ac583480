"""Every command over files that it did not make, over its own finished result, and with --overwrite."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dpo_mm.cli.main import main
from dpo_mm.labels.store import VoteStore
from tests.reliability import commands
from tests.reliability.test_outputs import contents

Run = Callable[..., tuple[int, str]]
NAMES = tuple(commands.commands(Path("inputs"), Path("out")))
FILE_OUTPUTS = ("judge", "relabel", "label export", "doctor")
CHANGED = {
    "import": ["--max-rows", "3"],
    "mine images": ["--seed", "1"],
    "mine responses": ["--max-new-tokens", "2"],
    "relabel": ["--tie", "0.1"],
    "train images": ["--seed", "1"],
    "train responses": ["--seed", "1"],
    "compare images": ["--seed", "1"],
    "compare responses": ["--max-new-tokens", "2"],
    "label export": ["--format", "argilla"],
}
"""Flags of another result."""
RESULTS = {
    "import": "part-00000.parquet",
    "mine images": "pairs.parquet",
    "mine responses": "pairs.parquet",
    "train images": "pytorch_lora_weights.safetensors",
    "train responses": "adapter_model.safetensors",
    "compare images": "report.html",
    "compare responses": "metrics.json",
}


def darkness(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    return [-score for score in commands.brightness(images, prompts)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    commands.write_inputs(folder)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process and return its exit status and standard error."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["dpo-mm", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), capsys.readouterr().err

    return run


def output_of(name: str, command: Sequence[str]) -> Path:
    """Output folder or file of a command."""
    flag = "--output" if name in FILE_OUTPUTS else "--output-dir"
    return Path(command[-1] if name == "import" else command[command.index(flag) + 1])


def refused(run: Run, folders: Sequence[Path], *arguments: str) -> str:
    """Run a command that must be refused in one line, without a change of any file. Return the line."""
    before = [contents(folder) for folder in folders]
    status, error = run(*arguments)
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in error, error[-2000:]
    assert [contents(folder) for folder in folders] == before
    return lines[0]


def test_every_command_with_an_output_is_covered() -> None:
    assert len(NAMES) == 11 and {*CHANGED, "judge", "doctor"} == {*NAMES} == {*RESULTS, *FILE_OUTPUTS}


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
@pytest.mark.parametrize("name", NAMES)
def test_foreign_files_are_refused_and_unchanged(
    name: str, overwrite: bool, inputs: Path, tmp_path: Path, run: Run
) -> None:
    """Catches a command that writes over, next to or instead of files of the user."""
    command = commands.commands(inputs, tmp_path)[name]
    output = output_of(name, command)
    files = [output, output.with_suffix(".json")] if name in FILE_OUTPUTS else []
    folder_files = ("README.md", "report.html", "unet/config.json", "checkpoint-5/model.bin", "shard-00000.parquet")
    for path in files or [output / file for file in folder_files]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("of the user")
    line = refused(run, (inputs, tmp_path), *command, *["--overwrite"] * overwrite)
    assert "dpo-mm did not make" in line or "is not an import folder" in line


@pytest.mark.parametrize(
    ("name", "flag", "value"),
    [
        ("train images", "--output-dir", "sd"),
        ("train images", "--output-dir", "sd/unet"),
        ("train responses", "--output-dir", "llama"),
        ("mine images", "--output-dir", "sd"),
        ("mine responses", "--output-dir", "llama"),
        ("compare images", "--output-dir", "sd"),
        ("relabel", "--output", "pairs.parquet"),
        ("judge", "--output", "pairs.parquet"),
        ("doctor", "--output", "pairs.parquet"),
        ("label export", "--output", "votes.sqlite"),
        ("label export", "--output", "pairs.parquet"),
    ],
)
def test_output_that_is_an_input_is_refused(
    name: str, flag: str, value: str, inputs: Path, tmp_path: Path, run: Run
) -> None:
    """Catches a base model, a dataset or votes that are lost."""
    command = commands.commands(inputs, tmp_path)[name]
    command[command.index(flag) + 1] = str(inputs / value)
    for more in ([], ["--overwrite"]):
        assert "input of the command" in refused(run, (inputs, tmp_path), *command, *more)


def test_quickstart_and_fresh_images_into_foreign_folders_are_refused(inputs: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "report.html").write_text("of the user")
    (tmp_path / "a.png").write_text("of the user")
    models = f"{inputs / 'sd'},shapes-sd"
    for command in (
        ("quickstart", "--output-dir", str(tmp_path)),
        ("demo", "label", "--models", models, "--samples-dir", str(tmp_path), "--prompts", str(inputs / "prompts.txt")),
    ):
        assert "dpo-mm did not make" in refused(run, (inputs, tmp_path), *command)


@pytest.mark.parametrize("tables", ["notes (id INTEGER, text TEXT)", "votes (id INTEGER PRIMARY KEY, topic TEXT)"])
def test_votes_into_a_database_of_another_program_are_refused(
    tables: str, inputs: Path, tmp_path: Path, run: Run
) -> None:
    """Catches tables that are added to it, also if it has a table of the same name."""
    with contextlib.closing(sqlite3.connect(tmp_path / "other.sqlite")) as database:
        database.execute(f"CREATE TABLE {tables}")
        database.commit()
    (tmp_path / "text.sqlite").write_text("no database")
    for name in ("other.sqlite", "text.sqlite"):
        votes = str(tmp_path / name)
        before = contents(tmp_path)
        with pytest.raises(ValueError, match="Choose another file for --votes"):
            VoteStore(votes, ["row-0"], source="pairs.parquet")  # as the page does
        assert contents(tmp_path) == before
        refused(run, (inputs, tmp_path), "label", "ratings", votes, "--pairs", str(inputs / "pairs.parquet"))


def _run_again(name: str, inputs: Path, tmp_path: Path, run: Run) -> None:
    """The finished result is printed again, and another is refused, or replaces it if every file is unchanged."""
    command = commands.commands(inputs, tmp_path)[name]
    output = output_of(name, command)
    other = [*command, *CHANGED.get(name, [])]
    if name == "judge":
        other[1] = "tests.reliability.test_foreign_files:darkness"
    if name == "doctor":
        other += ["--held-out", str(inputs / "prompts.txt")]
    first, error = run(*command)
    assert first in (0, 1), error[-2000:]
    notes = tmp_path / "notes.txt" if name in FILE_OUTPUTS else output / "notes.txt"
    notes.write_text("of the user")
    before = contents(tmp_path)
    assert run(*command)[0] == first and contents(tmp_path) == before
    assert "--overwrite" in refused(run, (inputs, tmp_path), *other)
    result = output if name in FILE_OUTPUTS else output / RESULTS[name]
    content = result.read_bytes()
    result.write_bytes(b"edited by the user")
    for arguments in (command, other, [*other, "--overwrite"]):
        if name == "import" and arguments == command:  # its shards are not read again
            continue
        refused(run, (inputs, tmp_path), *arguments)
    result.write_bytes(content)
    status, error = run(*other, "--overwrite")
    assert status in (0, 1) and result.read_bytes() != content, error[-2000:]
    assert notes.read_text() == "of the user"


@pytest.mark.parametrize("name", [name for name in NAMES if name in FILE_OUTPUTS or name == "import"])
def test_second_run_changes_nothing(name: str, inputs: Path, tmp_path: Path, run: Run) -> None:
    _run_again(name, inputs, tmp_path, run)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in FILE_OUTPUTS and name != "import"])
def test_second_run_of_a_model_changes_nothing(name: str, inputs: Path, tmp_path: Path, run: Run) -> None:
    _run_again(name, inputs, tmp_path, run)
