"""Images of a finished comparison, loaded for the page that shows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpo_mm.evaluation.image_store import ImageStore
from dpo_mm.evaluation.saved_comparison import load_comparison
from tests.conftest import noise_image

PROMPTS = ("a red circle", "two blue squares", "a photo of <b>a dog</b>")
SCORES = {"a red circle": (0.0, 1.0), "two blue squares": (1.0, 0.0), "a photo of <b>a dog</b>": (1.0, 1.0)}


def finished_run(folder: Path) -> Path:
    """Write what `compare` writes: images of base, tuned and another scale, and scores of two judges."""
    store = ImageStore(folder / "pictures")
    for side, scale in (("base", 0.0), ("tuned", 1.0), ("scale-0.5", 0.5)):
        drawn = [(prompt, n, noise_image(10 * n + int(4 * scale), 64)) for n, prompt in enumerate(PROMPTS)]
        store.add({"weights": side, "scale": scale}, drawn, label=side)
    for row in list(store.rows.values()):
        place = {"base": 0, "tuned": 1}.get(row["file"].split("/")[0])
        if place is not None:
            store.add_scores("aesthetic", "b", [(row["sha256"], row["prompt"], 0.25 + place / 10)])
            store.add_scores("faithfulness", "a", [(row["sha256"], row["prompt"], SCORES[row["prompt"]][place])])
    rows = [{"judge": "aesthetic", "headline": False}, {"judge": "faithfulness", "headline": True}]
    settings = {"model": "shapes-sd", "adapter": "none"}
    (folder / "metrics.json").write_text(json.dumps({"comparisons": rows, "settings": settings}))
    return folder


def test_load_comparison_pairs_base_and_tuned(tmp_path: Path) -> None:
    found = load_comparison(finished_run(tmp_path))
    assert found.judges == ("faithfulness", "aesthetic"), "the primary judge comes first"
    assert [one.prompt for one in found.pairs] == list(PROMPTS) and [one.seed for one in found.pairs] == [0, 1, 2]
    assert found.pairs[0].base.read_bytes() != found.pairs[0].tuned.read_bytes()
    assert found.pairs[0].scores == {"faithfulness": (0.0, 1.0), "aesthetic": (0.25, 0.35)}
    assert found.categories() == ["all", "colours", "counting"]


def test_filters_select_by_category_outcome_and_change(tmp_path: Path) -> None:
    found = load_comparison(finished_run(tmp_path))
    of = lambda **more: [PROMPTS.index(one.prompt) for one in found.select("faithfulness", **more)]
    assert of() == [0, 1, 2]
    assert of(outcome="better") == [0] and of(outcome="worse") == [1] and of(outcome="the same") == [2]
    assert of(category=found.pairs[1].category) == [1]
    assert sorted(of(by_change=True)[:2]) == [0, 1] and of(by_change=True)[2] == 2


def test_gain_of_lower_is_better_score_is_positive_when_it_falls(tmp_path: Path) -> None:
    from dataclasses import replace

    one = replace(load_comparison(finished_run(tmp_path)).pairs[0], scores={"cer": (0.5, 0.2)})
    assert one.gain("cer") == pytest.approx(0.3) and one.gain("wer") == 0
    assert one.gain("") == 0, "a comparison may have no judge"


def test_folder_without_comparison_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no images of a finished comparison\. Expected metrics\.json and pictures/"):
        load_comparison(tmp_path)
    folder = finished_run(tmp_path)
    kept = [line for line in (folder / "pictures/manifest.jsonl").read_text().splitlines() if '"tuned/' not in line]
    (folder / "pictures/manifest.jsonl").write_text("\n".join(kept) + "\n")
    with pytest.raises(ValueError, match="no prompt has an image of base and tuned"):
        load_comparison(folder)
