"""The README's first command, from a wheel in an empty folder, at its real settings."""

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

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as its wheel installs it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (made,) = folder.glob("*.whl")
    site = folder / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site), str(made)]
    subprocess.run(install, check=True, capture_output=True)
    return site


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    empty = tmp_path_factory.mktemp("empty")
    environment = {**os.environ, "PYTHONPATH": str(wheel), "HF_HUB_OFFLINE": "1", "DPO_MM_CACHE": str(empty / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "dpo_mm", "quickstart"], cwd=empty, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Verdict: better" in done.stdout and "runs/quickstart/report.html" in done.stdout
    assert "Next, on other seeds: dpo-mm compare" in done.stdout
    return empty / "runs" / "quickstart"


def test_it_finds_a_real_improvement(run: Path) -> None:
    kept = json.loads((run / "metrics.json").read_text())
    (headline,) = [one for one in kept["comparisons"] if one["headline"]]
    assert headline["judge"] == "faithfulness" and headline["verdict"] == "better"
    assert headline["low"] > 0 and headline["difference"] == pytest.approx(headline["tuned"] - headline["base"])
    assert 0.35 <= headline["base"] <= 0.65
    diversity = next(one for one in kept["comparisons"] if one["judge"] == "pixels")
    assert diversity["tuned"] >= 0.9 * diversity["base"]
    assert kept["control"]["verdict"] == "no evidence"


def test_it_writes_what_it_promises(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names >= {"adapter", "report.html", "metrics.json", "contact_sheet.png"}
    page = (run / "report.html").read_text()
    assert "dpo-mm quickstart" in page and "data:image/png;base64," in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script" not in page


def test_the_stock_library_draws_the_tuned_policys_pixels(run: Path) -> None:
    config = read_recipe("faithfulness", "shapes", {}).compare
    plan = sampling_plan(config).first(1)
    prompts, seeds = list(plan.prompts[:8]), plan.seeds[:8]
    policy = load_policy("shapes-sd")
    policy.load_adapter(run / "adapter")
    ours = next(policy.sample(prompts, seeds, steps=15, guidance=1.5, batch_size=8))
    pipe = StableDiffusionPipeline.from_pretrained(resolve_asset("shapes-sd"), dtype=torch.float32)
    pipe.load_lora_weights(str(run / "adapter"))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    stock = pipe(prompts, num_inference_steps=15, guidance_scale=1.5, generator=generators).images
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(ours, stock, strict=True))
