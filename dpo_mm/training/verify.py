"""Verify that a recipe trains correctly on this machine: runs repeat, resume to the same bits, and files load again."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from dpo_mm.config import TrainConfig
from dpo_mm.training.builders import build_policy
from dpo_mm.training.run import TrainResult, train

STEPS, CUT = 4, 2
"""Steps of the short runs, and the step after which one of them is interrupted."""
SHORT: dict[str, Any] = {
    "steps": STEPS, "num_train_epochs": None, "save_every": CUT, "save_total_limit": 2, "log_every": 1, "resume": False, "overwrite": False,
    "eval_every": 0, "eval_fraction": 0.0, "metric_for_best_model": None, "early_stopping_patience": 0,
    "sample_prompts": None, "sample_questions": None, "sample_steps": 0, "sample_judges": (),
    "report_to": (), "run_name": None, "logging_dir": None,
}  # fmt: skip
"""Settings of the short runs. The last weights are compared, so they have no evaluation, samples or trackers."""


class CheckResult(NamedTuple):
    """Name of a check, whether it passed, and what was observed."""

    name: str
    passed: bool
    observed: str


def verify(config: TrainConfig, folder: Path) -> Iterator[CheckResult]:
    """Run a recipe for a few steps on its own model and pairs, in an empty folder, and yield each check's result.

    Raises:
        ValueError: as `train`.
    """
    short = dataclasses.replace(config, **SHORT)
    run = lambda name, **more: train(dataclasses.replace(short, output_dir=str(folder / name), **more))
    whole = run("whole")
    yield _numbers(whole)
    yield _starts_at_the_reference(whole)
    yield _same("the same run again gives the same weights", whole.folder, run("again").folder)
    shutil.copytree(whole.folder / f"checkpoint-{CUT}", folder / "cut" / f"checkpoint-{CUT}")
    cut = run("cut", resume=True)
    yield _same(f"cut after step {CUT} and resumed, it gives the same weights", whole.folder, cut.folder)
    policy = build_policy(short)
    policy.free_encoders()
    policy.prepare(short)
    policy.load_weights(whole.folder)
    (folder / "back").mkdir()
    policy.save(folder / "back")
    yield _same("what was saved is loaded and saved to the same weights", whole.folder, folder / "back")


def _numbers(trained: TrainResult) -> CheckResult:
    losses = [entry["loss"] for entry in trained.history if "loss" in entry]
    skipped = max((entry.get("skipped_steps", 0) for entry in trained.history), default=0)
    finite = all(map(math.isfinite, losses)) and not skipped
    shown = ", ".join(f"{loss:.4g}" for loss in losses)
    return CheckResult(
        "every step has a finite loss and gradient", finite, f"losses {shown}; {skipped:g} steps left out"
    )


def _starts_at_the_reference(trained: TrainResult) -> CheckResult:
    """Check that the first step's margin is 0, so that training starts at the reference."""
    first = next((entry["rewards/margins"] for entry in trained.history if "rewards/margins" in entry), None)
    if first is None:
        return CheckResult("training starts at its reference", True, "no reference in this objective")
    return CheckResult("training starts at its reference", abs(first) < 1e-4, f"the first step's margin is {first:.3g}")


def _same(name: str, one: Path, other: Path) -> CheckResult:
    """Compare the tensors of two folders bit for bit."""
    ours, theirs = _tensors(one), _tensors(other)
    if ours.keys() != theirs.keys() or not ours:
        odd = sorted(ours.keys() ^ theirs.keys())
        return CheckResult(name, False, f"{odd[0]} is in one of them alone" if odd else f"{one} holds no weights")
    apart = {key: (ours[key].float() - theirs[key].float()).abs().max().item() for key in ours}
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    if not different:
        return CheckResult(name, True, f"{len(ours)} tensors, bit for bit")
    return CheckResult(
        name, False, f"{len(different)} of {len(ours)} tensors differ, by {max(apart.values()):.3g} at most"
    )


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = [
        path for path in sorted(folder.rglob("*.safetensors")) if "checkpoint-" not in str(path.relative_to(folder))
    ]
    return {f"{path.relative_to(folder)}: {key}": value for path in files for key, value in load_file(path).items()}
