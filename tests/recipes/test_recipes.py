"""Every recipe runs as a script, cut short, with the cheap baseline beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import forked

ROOT = Path(__file__).parents[2]
PICTURES = ["--max-prompts", "4", "--images-per-prompt", "2", "--num-inference-steps", "3", "--scales", "0.5"]
ANSWERS = [
    "--mine.max-questions",
    "24",
    "--mine.responses-per-question",
    "3",
    "--compare.max-questions",
    "6",
    "--max-new-tokens",
    "60",
]
RECIPES = {
    "aesthetic": (PICTURES, "aesthetic", "pytorch_lora_weights.safetensors"),
    "captioner": (ANSWERS, "chair_i", "adapter_model.safetensors"),
    "faithfulness": (PICTURES, "faithfulness", "pytorch_lora_weights.safetensors"),
    "ocr": ([*ANSWERS, "--mine.judges", "cer"], "degeneration", "adapter_model.safetensors"),
    "custom_judge": (
        ["--mine.max-questions", "40", "--compare.max-questions", "8"],
        "custom_judge:right",
        "adapter_model.safetensors",
    ),
}


def test_every_recipe_is_tried() -> None:
    assert sorted(script.stem for script in (ROOT / "recipes").glob("*.py")) == sorted(RECIPES)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs(name: str, tmp_path: Path) -> None:
    short, judge, adapter = RECIPES[name]
    command = [str(ROOT / "recipes" / f"{name}.py"), "--steps", "2", "--baseline", "sft", *short]
    forked.run(*command, "--output-dir", str(tmp_path), call=forked.script, cwd=ROOT, check=True)
    kept = json.loads((tmp_path / "metrics.json").read_text())
    assert [one["judge"] for one in kept["comparisons"] if one["headline"]] == [judge]
    assert any(one["models"] == ["sft", "tuned"] for one in kept["comparisons"])
    assert (tmp_path / "adapter" / adapter).exists() and (tmp_path / "adapter-sft" / adapter).exists()
    assert (tmp_path / "report.html").exists()
