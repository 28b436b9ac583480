"""An adapter's card: readable by the hub, inert whatever names it holds, results replaced and never doubled."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from dpo_mm.assets import data_folder
from dpo_mm.config import TrainConfig
from dpo_mm.evaluation.statistics import Comparison
from dpo_mm.training.model_card import add_results, write_card
from dpo_mm.training.run import train
from tests import forked


def one(metric: str, tuned: float) -> Comparison:
    return Comparison(
        metric=metric, judge="cer", headline=True, base=0.5, tuned=tuned, difference=tuned - 0.5, low=-0.3, high=-0.1,
        n=10, verdict="better", wins=8, ties=1, losses=1, p=0.01, clusters=10,
    )  # fmt: skip


def test_model_card_has_front_matter_and_tables(tmp_path: Path) -> None:
    config = TrainConfig(model="some/reader", pairs="p.parquet", output_dir=str(tmp_path))
    path = write_card(config, {"objective": "dpo", "pairs": "p|<script>alert(1)</script>\n# title"}, text=True)
    front, _, body = path.read_text().removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(front) == {
        "base_model": "some/reader",
        "library_name": "peft",
        "tags": ["dpo", "preference-optimization", "lora"],
    }
    assert "<script>" not in body and "\n# title" not in body and "p\\|&lt;script>" in body
    assert f'PeftModel.from_pretrained(model, "{tmp_path.name}")' in body


def test_model_card_replaces_earlier_results(tmp_path: Path) -> None:
    config = TrainConfig(model="some/reader", pairs="p.parquet", output_dir=str(tmp_path))
    write_card(config, {"objective": "dpo"}, text=True)
    for tuned in (0.4, 0.3):
        found = [
            one("character error rate", tuned),
            dataclasses.replace(one("SFT's error rate", 0.9), models=("base", "sft")),
        ]
        path = add_results(tmp_path, found, verdict="better", command="dpo-mm compare")
    assert path is not None
    card = path.read_text()
    assert card.count("## Compared") == 1 and "| 0.3 |" in card and "| 0.4 |" not in card and "SFT" not in card
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_folder_without_model_card_is_unchanged(tmp_path: Path) -> None:
    assert add_results(tmp_path, [one("x", 0.1)], verdict="better", command="") is None
    assert list(tmp_path.iterdir()) == []


def test_code_in_the_card_finds_a_model_with_a_relative_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The card's code runs in the folder above the adapter, which is not that of the training."""
    (tmp_path / "models" / "own").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(model="models/own", pairs="p", output_dir="runs/tuned")
    card = write_card(config, {"family": "VisionLanguage"}, text=True, into=tmp_path).read_text()
    assert f'from_pretrained("{tmp_path}/models/own")' in card and "The path of the model is the one at" in card


def run_code_of(card: Path, folder: Path) -> str:
    """Run the Python of a card as its reader would: in the folder above, with dpo-mm out of reach."""
    (code,) = re.findall(r"```python\n(.*?)\n```", card.read_text(), re.DOTALL)
    assert "dpo_mm" not in code
    script = folder / "card.py"
    script.write_text("import sys; sys.modules['dpo_mm'] = None\n" + code)
    forked.run(str(script), call=forked.script, cwd=folder, check=True)
    return code


@pytest.mark.slow
@pytest.mark.parametrize("base", ["tiny", "shapes-sd"])
def test_code_in_the_image_model_card_generates(
    base: str, tiny_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundled base has its weights in half precision and a name that diffusers does not know. The other has a relative path."""
    bundled = base != "tiny"
    monkeypatch.chdir(Path(tiny_model).parent)
    train(
        TrainConfig(
            model=base if bundled else Path(tiny_model).name, pairs=pairs,
            output_dir=str(tmp_path / "adapter"), steps=1, batch_size=2,
        )
    )  # fmt: skip
    code = run_code_of(tmp_path / "adapter" / "README.md", tmp_path)
    assert "load_lora_weights" in code and "dtype=torch.float32" in code
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == ((64, 64) if bundled else (32, 32)) and len(image.getcolors(10**6) or []) > 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "family"), [("page-reader", "VisionLanguage"), ("sums-writer", "VisionLanguage, Qwen2ForCausalLM")]
)
def test_code_in_the_text_model_card_loads_the_adapter(base: str, family: str, tmp_path: Path) -> None:
    full = family.endswith("CausalLM")
    folder = tmp_path / "tuned"
    shutil.copytree(data_folder() / "models" / (base if full else f"{base}-tuned"), folder)
    config = TrainConfig(model=base, pairs="p", output_dir=str(folder), tuning="full" if full else "lora")
    code = run_code_of(write_card(config, {"family": family}, text=True), tmp_path)
    assert ("AutoModelForCausalLM" in code) == full and ("PeftModel" in code) != full
