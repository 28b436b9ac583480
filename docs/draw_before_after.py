"""Draw docs/before_after.png from the images of the study of drawings.

python -m tests.bench.drawings OUT base "dpo, sft term" --seeds 0 --work runs/drawings
python docs/draw_before_after.py runs/drawings

The selection is a rule, so that the image can be drawn again. What it leaves out was decided after a look at the images, so
that a reader can check every mark. That makes it easier than the whole comparison:

1. The prompts come in the order of the comparison, and each shows its first seed, failures included.
2. The first four of each category are drawn, in turns.
3. Prompts with teapots are left out, which the model draws so badly that their marks look arbitrary, and so is the category
   of three kinds of things, whose marks depend on small details.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from dpo_mm.evaluation.contact_sheet import Example, contact_sheet
from dpo_mm.worlds import drawing_prompts

BASE, TUNED = "base-seed0", "dpo-sft-term-seed0"
PER_CATEGORY = 4
LEFT_OUT = "three kinds"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def examples(folder: Path) -> list[Example]:
    """The images that the rule selects, base and tuned, with their marks."""
    scores = {(row["sha256"], row["prompt"]): row["score"] for row in read(folder / "scores.jsonl")}
    first: dict[str, dict[str, dict[str, Any]]] = {BASE: {}, TUNED: {}}
    for row in read(folder / "manifest.jsonl"):
        first.setdefault(row["file"].partition("/")[0], {}).setdefault(row["prompt"], row)
    groups: dict[str, list[str]] = {}
    for prompt in first[BASE]:
        if drawing_prompts.parse(prompt).category != LEFT_OUT and "teapot" not in prompt:
            groups.setdefault(drawing_prompts.parse(prompt).category, []).append(prompt)
    assert len(groups) == len(drawing_prompts.CATEGORIES) - 1
    turns = itertools.zip_longest(*(prompts[:PER_CATEGORY] for prompts in groups.values()))
    shown = []
    for prompt in (prompt for turn in turns for prompt in turn if prompt):
        rows = [first[label][prompt] for label in (BASE, TUNED)]
        assert rows[0]["seed"] == rows[1]["seed"]
        images = [Image.open(folder / row["file"]) for row in rows]
        marks = [scores[row["sha256"], prompt] for row in rows]
        shown.append(Example(prompt, drawing_prompts.parse(prompt).category, *images, *marks, rows[0]["seed"]))
    return shown


if __name__ == "__main__":
    selected = examples(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/drawings") / "images")
    contact_sheet(selected).save(Path(__file__).parent / "before_after.png", optimize=True)
    for side in ("base", "tuned"):
        right = sum(getattr(one, f"{side}_score") for one in selected)
        print(f"{side}: {right:.0f} of {len(selected)} right")
