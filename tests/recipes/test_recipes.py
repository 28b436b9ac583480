"""Every recipe runs as a script with few steps, together with its SFT baseline.

Those with bundled pairs train on a few of them. tests/end_to_end/test_quickstart.py trains on all pairs of one.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from dpo_mm.assets import resolve_asset
from dpo_mm.recipe import read_recipe
from tests import forked

ROOT = Path(__file__).parents[2]
SHORT_TRAINING = ["--steps", "2", "--train.batch-size", "4", "--baseline", "sft"]
SHORT_IMAGE_RUN = [
    *("--max-prompts", "4", "--images-per-prompt", "2"),
    *("--num-inference-steps", "2", "--scales", "0.5"),
]
SHORT_TEXT_RUN = [
    *("--mine.max-questions", "12", "--mine.responses-per-question", "3"),
    *("--compare.max-questions", "4", "--max-new-tokens", "60"),
]
RECIPES = {
    "aesthetic": ([*SHORT_IMAGE_RUN, "--eval-fraction", "0.01"], "aesthetic", "pytorch_lora_weights.safetensors"),
    "captioner": (SHORT_TEXT_RUN, "chair_i", "adapter_model.safetensors"),
    "editing": (
        [*SHORT_IMAGE_RUN, "--mine.judges", "aesthetic", "--mine.guards", "aesthetic"],
        "edit_followed",
        "pytorch_lora_weights.safetensors",
    ),
    "faithfulness": (SHORT_IMAGE_RUN, "faithfulness", "pytorch_lora_weights.safetensors"),
    "ocr": ([*SHORT_TEXT_RUN, "--mine.judges", "cer"], "degeneration", "adapter_model.safetensors"),
    "custom_judge": (
        ["--mine.max-questions", "40", "--compare.max-questions", "8"],
        "custom_judge:right",
        "adapter_model.safetensors",
    ),
}
BUNDLED_PAIRS = {"aesthetic": "shapes-aesthetic", "faithfulness": "shapes-faithfulness"}
"""Names of the bundled pairs that a recipe trains on."""


def test_every_recipe_has_a_test() -> None:
    assert sorted(script.stem for script in (ROOT / "recipes").glob("*.py")) == sorted(RECIPES)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_writes_both_adapters_and_a_report(name: str, tmp_path: Path) -> None:
    short_run, judge, adapter = RECIPES[name]
    command = [str(ROOT / "recipes" / f"{name}.py"), *SHORT_TRAINING, *short_run]
    if name in BUNDLED_PAIRS:
        pairs = read_recipe(name, "shapes" if name == "aesthetic" else "quickstart", {}).train.pairs
        assert pairs == BUNDLED_PAIRS[name]
        rows = Dataset.from_parquet(resolve_asset(pairs))
        rows.select(range(48)).to_parquet(tmp_path / "pairs.parquet")  # type: ignore[union-attr]
        command += ["--pairs", str(tmp_path / "pairs.parquet")]
    out = tmp_path / "out"
    forked.run(*command, "--output-dir", str(out), call=forked.script, cwd=ROOT, check=True)
    metrics = json.loads((out / "metrics.json").read_text())
    assert [comparison["judge"] for comparison in metrics["comparisons"] if comparison["headline"]] == [judge]
    assert any(comparison["models"] == ["sft", "tuned"] for comparison in metrics["comparisons"])
    assert (out / "adapter" / adapter).exists() and (out / "adapter-sft" / adapter).exists()
    assert (out / "report.html").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_reports_a_wrong_setting_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation that it catches: a script that ends in a traceback."""
    script = str(ROOT / "recipes" / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [script, "--stepz", "2"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    error = capsys.readouterr().err
    assert end.value.code == 2 and "'stepz' is not a setting; did you mean 'steps'?" in error
    assert error.count("\n") == 1 and error.startswith("error: ") and not list(tmp_path.iterdir())
