"""Two rounds of a bundled task in each modality, interrupted between and inside rounds."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from dpo_mm import rounds
from dpo_mm.config import MineConfig
from dpo_mm.mining.mine_result import MineResult
from dpo_mm.recipe import Recipe, read_recipe, run_recipe
from dpo_mm.training.trainer import PreferenceTrainer
from tests import forked

TINY_TEXT = {
    "rounds": "2",
    "mine.max_questions": "16",
    "responses_per_question": "2",
    "steps": "2",
    "train.batch_size": "2",
    "warmup_steps": "1",
    "log_every": "1",
    "compare.max_questions": "4",
    "max_new_tokens": "12",
}


def captioner(folder: str) -> Recipe:
    return read_recipe("captioner", "quickstart", {"output_dir": folder, **TINY_TEXT})


def always_pass(result: Any, *, rounds: int) -> Any:
    return sys.modules["dpo_mm.rounds"].Decision(True, f"{result.verdict}, passed by the test")


def killed_captioner() -> None:
    """Run the rounds and kill this process in the second step of round 2's training."""
    losses: list[int] = []
    compute_loss = PreferenceTrainer.compute_loss

    def compute_or_kill(self: PreferenceTrainer, *arguments: Any, **options: Any) -> Any:
        losses.append(1)
        if self.config.output_dir.endswith("adapter-2") and len(losses) > 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return compute_loss(self, *arguments, **options)

    PreferenceTrainer.compute_loss = compute_or_kill  # type: ignore[method-assign]
    rounds.decide = always_pass
    run_recipe(captioner(sys.argv[1]), command="c")


def written(folder: Path) -> dict[str, int]:
    """Time of the last change of each weight and Parquet file."""
    files = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".parquet")]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files if "checkpoint" not in str(path)}


@pytest.mark.slow
def test_rounds_of_responses_continue_after_a_kill_inside_a_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    forked.run(str(folder), call=killed_captioner)
    before = written(folder)
    assert "mined-2/pairs.parquet" in before and "adapter-1/adapter_model.safetensors" in before
    assert "adapter-2/adapter_model.safetensors" not in before
    monkeypatch.setattr(rounds, "decide", always_pass)
    run_recipe(captioner(str(folder)), command="c")
    assert {name: time for name, time in written(folder).items() if name in before} == before
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["best_round"] == 2 and [point["pairs"] > 0 for point in metrics["rounds"]] == [True, True]
    assert all(point["tokens"]["after"] > 0 and point["log_probs"] for point in metrics["rounds"])
    start = json.loads((folder / "adapter-2" / "dpo_mm.json").read_text())
    assert start["adapter"] == str(folder / "adapter-1")
    questions = [set(ids_of(folder / name / "answers.jsonl")) for name in ("compared-1", "compared-2", "final")]
    assert all(len(each) == 4 for each in questions) and len(set().union(*questions)) == 12


def ids_of(path: Path) -> list[str]:
    return [json.loads(line)["question"] for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_rounds_of_images_continue_between_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    short = {"output_dir": str(folder), "steps": "2", "train.batch_size": "2", "warmup_steps": "1", "max_prompts": "3"}
    plain = read_recipe("faithfulness", "quickstart", {**short, "images_per_prompt": "2", "num_inference_steps": "2"})
    mining = MineConfig(
        "shapes-sd",
        "shapes-train",
        "-",
        "aesthetic",
        images_per_prompt=2,
        max_prompts=4,
        num_inference_steps=2,
        guidance_scale=1.5,
    )
    recipe = dataclasses.replace(plain, mine=mining, rounds=2)
    monkeypatch.setattr(rounds, "decide", always_pass)
    mine = rounds.mine

    def interrupt(config: Any) -> MineResult:
        if config.output_dir.endswith("mined-2"):
            raise KeyboardInterrupt
        return mine(config)

    monkeypatch.setattr(rounds, "mine", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, command="c")
    before = written(folder)
    assert "adapter-1/pytorch_lora_weights.safetensors" in before
    monkeypatch.setattr(rounds, "mine", mine)
    run_recipe(recipe, command="c")
    assert {name: time for name, time in written(folder).items() if name in before} == before
    points = json.loads((folder / "metrics.json").read_text())["rounds"]
    assert all(point["diversity"]["after"] > 0 and point["tokens"] is None for point in points)
    seeds = [seeds_of(folder / name / "pictures" / "manifest.jsonl") for name in ("compared-1", "compared-2", "final")]
    assert len(set().union(*seeds)) == sum(map(len, seeds)) > 0


def seeds_of(path: Path) -> set[tuple[str, int]]:
    rows = map(json.loads, path.read_text().splitlines())
    return {(row["prompt"], row["seed"]) for row in rows}
