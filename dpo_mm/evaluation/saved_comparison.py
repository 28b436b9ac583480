"""The pictures of a finished comparison, base beside tuned, for a page that shows them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_mm.data.prompts import category
from dpo_mm.evaluation.image_store import FOLDER, MANIFEST, SCORES, read_lines
from dpo_mm.judges import better_of

OUTCOMES = ("all", "better", "worse", "the same")


@dataclass(frozen=True)
class ImagePair:
    """Base's and tuned's picture of one prompt from one seed. scores: by judge, (base, tuned)."""

    prompt: str
    category: str
    seed: int
    base: Path
    tuned: Path
    scores: Mapping[str, tuple[float, float]]

    def gain(self, judge: str) -> float:
        """How much better the tuned one is by a judge, in its unit; 0 where it was not asked of both."""
        base, tuned = self.scores.get(judge, (0.0, 0.0))
        return base - tuned if better_of(judge) == "lower" else tuned - base


@dataclass(frozen=True)
class SavedComparison:
    """A comparison's pictures in the order they were drawn, its judges, the headline's first, and what it compared."""

    pairs: tuple[ImagePair, ...]
    judges: tuple[str, ...]
    settings: Mapping[str, str]

    def categories(self) -> list[str]:
        return sorted({one.category for one in self.pairs})

    def chosen(self, judge: str, *, of: str = "all", outcome: str = "all", by_change: bool = False) -> list[ImagePair]:
        """Those of a category ("all": of each) and outcome by a judge; by_change: the largest change first."""
        wanted = {"all": lambda gain: True, "better": lambda gain: gain > 0, "worse": lambda gain: gain < 0}
        keep = wanted.get(outcome, lambda gain: gain == 0)
        found = [one for one in self.pairs if of in ("all", one.category) and keep(one.gain(judge))]
        return sorted(found, key=lambda one: -abs(one.gain(judge))) if by_change else found


def load_comparison(folder: str | Path) -> SavedComparison:
    """A comparison's folder as `compare` left it. Raises ValueError where it holds no pictures of base and tuned."""
    folder = Path(folder).absolute()
    pictures, metrics = folder / FOLDER, folder / "metrics.json"
    if not (pictures / MANIFEST).is_file() or not metrics.is_file():
        raise ValueError(
            f"{folder}: no pictures of a finished comparison; expected metrics.json and {FOLDER}/{MANIFEST}, which "
            "`dpo-mm compare` writes with --save-images true"
        )
    said = {(row["sha256"], row["prompt"], row["judge"]): row["score"] for row in read_lines(pictures / SCORES)}
    known = json.loads(metrics.read_text())
    headline = [row["judge"] for row in known["comparisons"] if row["headline"]]
    judges = tuple(dict.fromkeys([*headline, *(judge for _, _, judge in said)]))
    sides: dict[str, dict[tuple[str, int], dict[str, Any]]] = {"base": {}, "tuned": {}}
    for row in read_lines(pictures / MANIFEST):
        side = row["file"].partition("/")[0]
        if side in sides:
            sides[side][row["prompt"], row["seed"]] = row
    pairs = [(row, sides["tuned"][key]) for key, row in sides["base"].items() if key in sides["tuned"]]
    if not pairs:
        raise ValueError(f"{pictures}: no prompt was drawn by base and tuned; did the comparison end?")
    twins = tuple(_twins(pictures, base, tuned, judges, said) for base, tuned in pairs)
    return SavedComparison(twins, judges, known.get("settings", {}))


def _twins(
    pictures: Path, base: Mapping[str, Any], tuned: Mapping[str, Any], judges: Sequence[str], said: Mapping[Any, float]
) -> ImagePair:
    prompt = base["prompt"]
    asked = {judge: [said.get((row["sha256"], prompt, judge)) for row in (base, tuned)] for judge in judges}
    scores = {judge: (both[0], both[1]) for judge, both in asked.items() if both[0] is not None and both[1] is not None}
    return ImagePair(prompt, category(prompt), base["seed"], pictures / base["file"], pictures / tuned["file"], scores)
