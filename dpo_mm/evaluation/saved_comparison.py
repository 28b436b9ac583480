"""Images of a finished comparison, base next to tuned, for a page that shows them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_mm.assets import BUNDLED
from dpo_mm.data.prompts import category
from dpo_mm.data.row_paths import read_regular_file, resolve_inside
from dpo_mm.errors import name_row
from dpo_mm.evaluation.image_store import FOLDER, MANIFEST, read_manifest, read_scores, source_file
from dpo_mm.judges import better_of, parse_judge_name

OUTCOMES = ("all", "better", "worse", "the same")


@dataclass(frozen=True)
class ImagePair:
    """Base's and tuned's image of one prompt and seed.

    Args:
        prompt, category, seed: of both images.
        base, tuned: image files.
        sources: files of the images to edit, None for one that is not in the folder.
        scores: by judge, (base, tuned).
        frames: frames of base and of tuned, which are clips. 1 for images.
    """

    prompt: str
    category: str
    seed: int
    base: Path
    tuned: Path
    scores: Mapping[str, tuple[float, float]]
    sources: tuple[Path | None, ...] = ()
    frames: int = 1

    def gain(self, judge: str) -> float:
        """Return by how much the tuned image is better by a judge, in its unit. 0 unless both images have a score."""
        if judge not in self.scores:
            return 0.0
        base, tuned = self.scores[judge]
        return base - tuned if better_of(judge) == "lower" else tuned - base


@dataclass(frozen=True)
class SavedComparison:
    """Images of a finished comparison.

    Args:
        pairs: in the order in which they were generated.
        judges: the primary metric's judge first.
        settings: settings of the comparison, as printed in its report.
    """

    pairs: tuple[ImagePair, ...]
    judges: tuple[str, ...]
    settings: Mapping[str, str]

    def categories(self) -> list[str]:
        """Return the names of all categories, sorted."""
        return sorted({pair.category for pair in self.pairs})

    def select(
        self, judge: str, *, category: str = "all", outcome: str = "all", by_change: bool = False
    ) -> list[ImagePair]:
        """Select pairs by category and outcome.

        Args:
            judge: decides the outcome.
            category: name of a category, or "all".
            outcome: one of `OUTCOMES`, for the tuned image.
            by_change: sort by the size of the change, the largest first.
        """
        tests = {"all": lambda gain: True, "better": lambda gain: gain > 0, "worse": lambda gain: gain < 0}
        matches = tests.get(outcome, lambda gain: gain == 0)
        pairs = [pair for pair in self.pairs if category in ("all", pair.category) and matches(pair.gain(judge))]
        return sorted(pairs, key=lambda pair: -abs(pair.gain(judge))) if by_change else pairs


def load_comparison(folder: str | Path, *, judges: Sequence[str] | None = None) -> SavedComparison:
    """Load the images and scores that `compare` wrote into a folder.

    The folder may come from somebody else, so a judge of it is used only if it is built in or named by the user: others
    would be imported. Files outside the folder are refused.

    Args:
        folder: the folder.
        judges: judges that the user named. Scores by judges that are neither built in nor among them are left out. None: they
            are refused.

    Raises:
        ValueError: if the folder contains no images of base and tuned, is damaged, or has scores by another judge.
    """
    folder = Path(folder).absolute()
    images, metrics = folder / FOLDER, folder / "metrics.json"
    if not (images / MANIFEST).is_file() or not metrics.is_file():
        raise ValueError(
            f"{folder}: no images of a finished comparison. Expected metrics.json and {FOLDER}/{MANIFEST}, which "
            "`dpo-mm compare` writes with --save-images true."
        )
    scores = {
        (row["sha256"], row["prompt"], row["judge"], *row.get("sources", ())): row["score"]
        for row in read_scores(images)
    }
    with name_row(str(metrics), "Run the comparison again"):
        report = json.loads(read_regular_file(metrics))
        primary = [str(row["judge"]) for row in report["comparisons"] if row["headline"]]
        settings = {str(name): str(value) for name, value in report.get("settings", {}).items()}
    names = tuple(dict.fromkeys([*primary, *(judge for _, _, judge, *_ in scores)]))
    unknown = [name for name in names if parse_judge_name(name) is None and name not in (judges or ())]
    if unknown and judges is None:
        raise ValueError(
            f"{folder} has scores by the judge {unknown[0]!r}, which is not built in, so its code would run. If you trust it, "
            f"pass --judges {unknown[0]}. If not, pass the names of other judges, for example --judges aesthetic"
        )
    names = tuple(name for name in names if name not in unknown)
    rows: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {"base": {}, "tuned": {}}
    for row in read_manifest(images):
        model = row["file"].partition("/")[0]
        if model in rows:
            rows[model][row["prompt"], row["seed"], *row.get("sources", ())] = row
    pairs = [(row, rows["tuned"][key]) for key, row in rows["base"].items() if key in rows["tuned"]]
    if not pairs:
        raise ValueError(
            f"{images}: no prompt has an image of base and tuned. The comparison may be incomplete: run it again."
        )
    image_pairs = tuple(_image_pair(images, base, tuned, names, scores) for base, tuned in pairs)
    judged = {name for pair in image_pairs for name in pair.scores}  # others scored only images of side sets
    return SavedComparison(image_pairs, tuple(name for name in names if name in judged.union(primary)), settings)


def _image_pair(
    folder: Path, base: Mapping[str, Any], tuned: Mapping[str, Any], judges: Sequence[str], scores: Mapping[Any, float]
) -> ImagePair:
    """Build the pair of two rows of the manifest."""
    prompt = base["prompt"]
    pair_scores: dict[str, tuple[float, float]] = {}
    for judge in judges:
        before, after = (scores.get((row["sha256"], prompt, judge, *row.get("sources", ()))) for row in (base, tuned))
        if before is not None and after is not None:
            pair_scores[judge] = (before, after)
    files = resolve_inside(base["file"], folder), resolve_inside(tuned["file"], folder)
    sources = tuple(source_file(folder, name) for name in base.get("sources", ()))
    return ImagePair(prompt, category(prompt), base["seed"], *files, pair_scores, sources, base.get("frames", 1))


def bundled_models(saved: SavedComparison, folder: str, *, default: str) -> tuple[str, str | None]:
    """Return the model and the adapter of a saved comparison, None for no adapter.

    Args:
        saved: the comparison.
        folder: its folder, for the error.
        default: model of a comparison that names none.

    Raises:
        ValueError: if one is not bundled. The folder may come from somebody else, so it does not choose what is opened.
    """
    model, adapter = saved.settings.get("model", default), saved.settings.get("adapter", "none")
    if model not in BUNDLED or adapter not in (*BUNDLED, "none"):
        raise ValueError(
            f"{folder} compares the model {model!r} with {adapter!r}. The folder may come from somebody else, so they are opened "
            f"only if you name them: --model {shlex.quote(model)} --adapter {shlex.quote(adapter)}"
        )
    return model, None if adapter == "none" else adapter
