"""The recipe of the README's first command with a fifth of its steps, from a wheel in an empty folder.

The whole command takes minutes. It is run by hand, and its result is in docs/benchmarks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from dpo_mm.assets import resolve_asset
from dpo_mm.evaluation.compare_images import sampling_plan
from dpo_mm.policies.families import load_policy
from dpo_mm.recipe import read_recipe
from tests.end_to_end import beside_bars
from tests.wheels import build_wheel

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the package as its wheel installs it."""
    site = tmp_path_factory.mktemp("wheel") / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site)]
    subprocess.run([*pip, str(build_wheel(tmp_path_factory))], check=True, capture_output=True)
    return site


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    empty = tmp_path_factory.mktemp("empty")
    environment = {**os.environ, "PYTHONPATH": str(wheel), "HF_HUB_OFFLINE": "1", "DPO_MM_CACHE": str(empty / "cache")}
    short = (
        "--steps",
        "60",
        "--eval-fraction",
        "0.3",
        "--compare.max-prompts",
        "16",
        "--compare.images-per-prompt",
        "2",
    )
    command = [sys.executable, "-m", "dpo_mm", "recipe", "faithfulness-quickstart", *short]
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert beside_bars(done.stderr) == []
    assert "Verdict: " in done.stdout and "runs/quickstart/report.html" in done.stdout
    return empty / "runs" / "quickstart"


def test_recipe_learns_to_prefer_the_chosen_images_of_held_out_pairs(run: Path) -> None:
    """It prefers 62 % of about 200. A policy that learned nothing prefers 50 %, with a loss of ln 2."""
    last = json.loads((run / "adapter" / "training_log.json").read_text())["history"][-1]
    assert last["eval_rewards/accuracies"] > 0.57 and last["eval_loss"] < 0.68 and last["eval_rewards/margins"] > 0.1


def test_recipe_compares_base_and_tuned_without_loss(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    (primary,) = [comparison for comparison in metrics["comparisons"] if comparison["headline"]]
    assert primary["judge"] == "faithfulness" and primary["verdict"] != "worse"
    assert primary["difference"] == pytest.approx(primary["tuned"] - primary["base"])
    assert 0.25 <= primary["base"] <= 0.65 and primary["tuned"] > primary["base"]
    diversity = next(comparison for comparison in metrics["comparisons"] if comparison["judge"] == "pixels")
    assert diversity["tuned"] >= 0.9 * diversity["base"]
    assert metrics["control"]["verdict"] == "no evidence"


def test_recipe_writes_its_files_and_a_self_contained_report(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names >= {"adapter", "report.html", "metrics.json", "contact_sheet.png"}
    page = (run / "report.html").read_text()
    assert "dpo-mm recipe faithfulness-quickstart" in page and "data:image/png;base64," in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script" not in page


def test_upstream_library_generates_the_tuned_policys_pixels(run: Path) -> None:
    config = read_recipe("faithfulness", "quickstart", {}).compare
    plan = sampling_plan(config).first(1)
    prompts, seeds = list(plan.prompts[:8]), plan.seeds[:8]
    policy = load_policy("shapes-sd")
    policy.load_adapter(run / "adapter")
    ours = next(policy.sample(prompts, seeds, steps=15, guidance=1.5, batch_size=8))
    pipe = StableDiffusionPipeline.from_pretrained(resolve_asset("shapes-sd"), dtype=torch.float32)
    pipe.load_lora_weights(str(run / "adapter"))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    upstream = pipe(prompts, num_inference_steps=15, guidance_scale=1.5, generator=generators).images
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(ours, upstream, strict=True))
