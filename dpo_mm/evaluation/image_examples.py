"""Images that a report shows: some of every category, and those that changed most."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from dpo_mm.data.clips import clip_preview
from dpo_mm.evaluation.contact_sheet import Example, MostChanged
from dpo_mm.evaluation.image_sampling import ScoredImages
from dpo_mm.judges import better_of


def examples(base: ScoredImages, tuned: ScoredImages, judge: str, *, count: int) -> list[Example]:
    """Choose example images by the plan's order, one of each category in turn, never the best ones."""
    rows_by_category: dict[str, list[int]] = {}
    for row in range(0, len(base.images), base.plan.samples):
        rows_by_category.setdefault(str(base.plan.category_per_image[row]), []).append(row)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*rows_by_category.values()))
    rows = [row for row in turns if row is not None][:count]
    return [_example(base, tuned, judge, row) for row in rows]


def most_changed(base: ScoredImages, tuned: ScoredImages, judge: str, *, count: int) -> MostChanged:
    """Choose the images that improved most and those that got worse most, at most one per prompt.

    Args:
        base, tuned: scored images of the same plan.
        judge: its scores decide, in its better direction. Of equal changes, the first in the plan's order come first.
        count: images each way, at most.

    Returns:
        Improved and worsened examples. Images whose score did not change are in neither.
    """
    sign = -1.0 if better_of(judge) == "lower" else 1.0
    change = sign * (np.asarray(tuned.scores[judge], float) - np.asarray(base.scores[judge], float))
    rows = [_largest_per_prompt(way * change, base.plan.items.tolist())[:count] for way in (1, -1)]
    improved, worsened = ([_example(base, tuned, judge, row) for row in chosen] for chosen in rows)
    return MostChanged(tuple(improved), tuple(worsened))


def _largest_per_prompt(change: np.ndarray, prompts: Sequence[str]) -> list[int]:
    """Return the rows with a change above 0, the largest first, one per prompt."""
    rows: dict[str, int] = {}
    for row in np.argsort(-change, kind="stable"):
        if change[row] > 0:
            rows.setdefault(prompts[row], int(row))
    return list(rows.values())


def _example(base: ScoredImages, tuned: ScoredImages, judge: str, row: int) -> Example:
    """Return the images of a row of the plan."""
    return Example(
        prompt=base.plan.prompts[row],
        category=str(base.plan.category_per_image[row]),
        base=clip_preview(base.images[row], base.frames),
        tuned=clip_preview(tuned.images[row], tuned.frames),
        base_score=float(base.scores[judge][row]),
        tuned_score=float(tuned.scores[judge][row]),
        seed=base.plan.seeds[row],
        sources=tuple(base.plan.sources[row]) if base.plan.sources else (),
        is_clip=base.frames > 1,
    )
