"""`dpo-mm runs` lists what runs wrote, and names damaged files in one line each."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dpo_mm.cli.main import app
from dpo_mm.cli.run_list import list_runs
from dpo_mm.config import TrainConfig, as_dict


def write_run(folder: Path, *, step: int | None = 8, **settings: Any) -> Path:
    """A run's files. step None: unfinished, with a checkpoint at step 4."""
    folder.mkdir(parents=True)
    config = as_dict(TrainConfig("shapes-sd", "shapes-faithfulness", str(folder), steps=8, **settings))
    (folder / "dpo_mm.json").write_text(json.dumps({"kind": "a training run", **config, "measured_beta": None}))
    if step is None:
        (folder / "checkpoint-4").mkdir()
        (folder / "checkpoint-4" / "dpo_mm.json").write_text("{}")
        return folder
    (folder / "training_log.json").write_text(json.dumps({"history": [{"step": step, "loss": 0.5}], "summary": {}}))
    (folder / "complete.json").write_text("{}")
    return folder


def write_comparison(
    folder: Path, adapter: Path, *, difference: float = 0.1, verdict: str = "better", time: int = 0
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps({"kind": "a comparison", "adapter": str(adapter)}))
    row = {"headline": True, "metric": "faithfulness", "difference": difference, "low": 0.05, "high": 0.15}
    metrics = {"verdict": verdict, "comparisons": [{**row, "headline": False, "difference": 9.0}, row]}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    os.utime(folder / "metrics.json", (time, time))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two finished runs, of which one is inside its comparison as in a recipe, and an unfinished one."""
    write_run(tmp_path / "recipe" / "adapter", beta=500.0)
    write_comparison(tmp_path / "recipe", Path("elsewhere/recipe/adapter"))  # the folder was moved
    plain = write_run(tmp_path / "plain", beta=2000.0, seed=1)
    write_comparison(tmp_path / "compared", plain, verdict="no evidence", time=100)
    write_comparison(tmp_path / "again", plain, verdict="worse", difference=-0.2, time=200)
    write_run(tmp_path / "cut", step=None, beta=500.0)
    return tmp_path


def output(*words: str) -> str:
    result = CliRunner().invoke(app, ["runs", *words], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    return result.output


def test_table_has_the_settings_that_differ_and_the_newest_verdict(folder: Path) -> None:
    """Catches equal settings as columns, another row than the primary, a checkpoint as a run, and an older comparison."""
    head, names, *rows = output(str(folder)).splitlines()
    assert head == "model: shapes-sd, objective: sigmoid"
    assert names.split() == [
        "run",
        "beta",
        "seed",
        "steps",
        "done",
        "verdict",
        "difference",
        "(95",
        "%",
        "interval)",
        "date",
    ]
    cut, plain, recipe = ([cell for cell in row.split("  ") if cell] for row in rows)
    assert [cell.strip() for cell in cut[:5]] == ["cut", "500", "0", "unfinished, 4 of 8", "not compared"]
    assert [cell.strip() for cell in plain[:6]] == [
        "plain",
        "2000",
        "1",
        "8",
        "worse",
        "faithfulness -0.200 (+0.050 to +0.150)",
    ]
    assert [cell.strip() for cell in recipe[:5]] == ["recipe/adapter", "500", "0", "8", "better"]


def test_json_has_every_setting_and_all_comparisons(folder: Path) -> None:
    content = json.loads(output(str(folder), "--json"))
    runs = {run["folder"]: run for run in content["runs"]}
    assert list(runs) == ["cut", "plain", "recipe/adapter"] and content["damaged"] == []
    assert [one["verdict"] for one in runs["plain"]["comparisons"]] == ["worse", "no evidence"]
    assert runs["plain"]["settings"]["learning_rate"] == 1e-4 and not runs["cut"]["finished"]


def test_damaged_files_are_named_and_the_rest_is_listed(folder: Path) -> None:
    """Catches a file that ends the command, or that is left out silently."""
    (folder / "cut" / "dpo_mm.json").write_text("{")
    (folder / "again" / "metrics.json").write_text(json.dumps({"verdict": "better", "comparisons": []}))
    (folder / "recipe" / "adapter" / "training_log.json").write_bytes(b"\xff")
    (folder / "other").mkdir()
    (folder / "other" / "dpo_mm.json").write_text('{"kind": "something else"}')
    found = list_runs(folder)
    assert [run.folder for run in found.runs] == ["plain"] and found.runs[0].comparisons[0].verdict == "no evidence"
    again, cut, log = sorted(found.damaged)
    assert f"{folder / 'again'}: an entry" in again and f"{folder / 'cut' / 'dpo_mm.json'}: not readable" in cut
    assert "training_log.json: not readable" in log
    assert output(str(folder)).count("warning: ") == 3


def test_hostile_names_do_not_reach_the_terminal(tmp_path: Path) -> None:
    plain = write_run(tmp_path / "a", lora_targets=("\x1b]0;[red]x",))
    write_run(tmp_path / "b")
    write_comparison(tmp_path / "c", plain, verdict="\x1b[31m[bold]")
    text = output(str(tmp_path))
    assert "\x1b" not in text and "[bold]" in text and "[red]x" in text


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no training run in or below it"):
        list_runs(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        list_runs(tmp_path / "missing")


def test_run_in_a_folder_named_like_a_part_of_a_run_is_listed(tmp_path: Path) -> None:
    """It catches runs that are left out because their folder's name begins like one inside a run."""
    names = ["best-of-three", "logs", "samples-of-cats"]
    for name in names:
        write_run(tmp_path / name)
    assert [run.folder for run in list_runs(tmp_path).runs] == names


def test_finished_run_without_a_logged_step_has_its_steps(tmp_path: Path) -> None:
    (write_run(tmp_path / "short") / "training_log.json").write_text(json.dumps({"history": [], "summary": {}}))
    assert [run.progress for run in list_runs(tmp_path).runs] == ["8"]


def test_setting_that_an_earlier_version_did_not_have_is_its_default(tmp_path: Path) -> None:
    write_run(tmp_path / "new")
    record = write_run(tmp_path / "old") / "dpo_mm.json"
    settings = json.loads(record.read_text())
    del settings["proportion_empty_prompts"]
    record.write_text(json.dumps(settings))
    assert list_runs(tmp_path).differing() == []
