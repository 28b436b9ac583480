"""Draw docs/before_after.png from the images that `dpo-mm quickstart` saved.

dpo-mm quickstart && python docs/draw_before_after.py [runs/quickstart]

The selection is a rule, so that the image can be drawn again. What it leaves out, and four per category, was decided after
a look at the contact sheet, so that every mark can be checked and failures show. It is easier than the whole comparison:

1. The prompts come in the order of the comparison, and each shows its first seed.
2. The first four of each category are drawn, in turns. Two categories are left out because a reader cannot check their
   marks by eye: single objects (big or small by a rule in pixels) and counting (the judge can misread small, blurred shapes).
3. Prompts with orange are left out, because it is hard to tell from red and yellow in a small image.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from dpo_mm.data.prompts import category
from dpo_mm.evaluation.contact_sheet import Example, contact_sheet

LEFT_OUT = ("single object", "counting")
PER_CATEGORY = 4


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def examples(folder: Path) -> list[Example]:
    """The images that the rule selects, base and tuned, with their marks."""
    scores = {
        (row["sha256"], row["prompt"]): row["score"]
        for row in read(folder / "scores.jsonl")
        if row["judge"] == "faithfulness"
    }
    first: dict[str, dict[str, dict[str, Any]]] = {"base": {}, "tuned": {}}
    for row in read(folder / "manifest.jsonl"):
        first.setdefault(row["file"].partition("/")[0], {}).setdefault(row["prompt"], row)
    groups: dict[str, list[str]] = {}
    for prompt in first["base"]:
        if category(prompt) not in LEFT_OUT and "orange" not in prompt:
            groups.setdefault(category(prompt), []).append(prompt)
    assert len(groups) == 4, f"expected four categories, got {sorted(groups)}"
    turns = itertools.zip_longest(*(prompts[:PER_CATEGORY] for prompts in groups.values()))
    chosen = [prompt for turn in turns for prompt in turn if prompt]
    shown = []
    for prompt in chosen:
        base, tuned = first["base"][prompt], first["tuned"][prompt]
        assert base["seed"] == tuned["seed"]
        images = [Image.open(folder / row["file"]) for row in (base, tuned)]
        marks = [scores[row["sha256"], prompt] for row in (base, tuned)]
        shown.append(Example(prompt, category(prompt), *images, *marks, base["seed"]))
    return shown


if __name__ == "__main__":
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
    pictures = next(folder for folder in (run / "images", run / "pictures") if folder.is_dir())
    selected = examples(pictures)
    contact_sheet(selected).save(Path(__file__).parent / "before_after.png", optimize=True)
    for side in ("base", "tuned"):
        right = sum(getattr(one, f"{side}_score") for one in selected)
        print(f"{side}: {right:.0f} of {len(selected)} right")
