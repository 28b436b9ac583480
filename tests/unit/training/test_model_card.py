"""An adapter's card: readable by the hub, inert whatever names it holds, results replaced and never doubled."""

from __future__ import annotations

from pathlib import Path

import yaml

from dpo_mm.config import TrainConfig
from dpo_mm.evaluation.statistics import Comparison
from dpo_mm.training.model_card import add_results, write_card


def one(metric: str, tuned: float) -> Comparison:
    return Comparison(
        metric=metric, judge="cer", headline=True, base=0.5, tuned=tuned, difference=tuned - 0.5, low=-0.3, high=-0.1,
        n=10, verdict="better", wins=8, ties=1, losses=1, p=0.01, clusters=10,
    )  # fmt: skip


def test_the_card_is_front_matter_and_tables(tmp_path: Path) -> None:
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


def test_results_are_replaced(tmp_path: Path) -> None:
    config = TrainConfig(model="some/reader", pairs="p.parquet", output_dir=str(tmp_path))
    write_card(config, {"objective": "dpo"}, text=True)
    for tuned in (0.4, 0.3):
        found = [one("character error rate", tuned), one("character error rate (SFT on the chosen)", 0.9)]
        path = add_results(tmp_path, found, verdict="better", command="dpo-mm compare")
    assert path is not None
    card = path.read_text()
    assert card.count("## Compared") == 1 and "| 0.3 |" in card and "| 0.4 |" not in card and "SFT" not in card
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_a_folder_without_a_card_is_left_alone(tmp_path: Path) -> None:
    assert add_results(tmp_path, [one("x", 0.1)], verdict="better", command="") is None
    assert list(tmp_path.iterdir()) == []
