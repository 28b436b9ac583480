"""Pair the blocks of a page with the paragraphs of a response, by edit distance (`quick_match`).

1. Paragraphs that follow each other are joined if they resemble a block better together.
2. Blocks and paragraphs are paired with the least sum of distances. Pairs above MAX_DISTANCE are dissolved.
3. Blocks without a pair join a paragraph that contains something similar.
4. Blocks and paragraphs that are left are paired, whatever their distance.

Source: github.com/opendatalab/OmniDocBench (Apache-2.0), utils/match_quick.py.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from scipy.optimize import linear_sum_assignment

SIMILAR = 0.25
"""Distance below which a block and a paragraph do not take part when paragraphs are joined."""
MAX_PART_DISTANCE = 0.6
"""Distance to a part of the block up to which a paragraph is joined."""
MAX_DISTANCE = 0.7
MAX_CONTAINED_DISTANCE = 0.4
MAX_COMPARED = 30_000_000
"""Comparisons of a text with parts of another per page."""
Numbers = tuple[int, ...]


class Pair(NamedTuple):
    """Numbers of blocks, and of the paragraphs paired with them, if any."""

    blocks: Numbers
    paragraphs: Numbers


class Run(NamedTuple):
    """Paragraphs that follow each other, and their distance to a block."""

    paragraphs: Numbers
    distance: float


class TooManyComparisons(Exception):
    """The paragraphs of a page would be compared with parts of blocks more than MAX_COMPARED times."""


class PartDistances:
    """Distances of texts to parts of others. Each is computed once per page, and counted as often as the published code computes it."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str, float], float] = {}
        self.compared = 0

    def __call__(self, part: str, whole: str, limit: float) -> float:
        """`part_distance` of two texts. It is infinite if the first is empty or longer than the second."""
        if not part or len(part) > len(whole):
            return float("inf")
        self.compared += len(whole) - len(part) + 1
        if self.compared > MAX_COMPARED:
            raise TooManyComparisons
        if (part, whole, limit) not in self.known:
            self.known[part, whole, limit] = part_distance(part, whole, limit)
        return self.known[part, whole, limit]


def pair_texts(blocks: Sequence[str], paragraphs: Sequence[str]) -> list[Pair]:
    """Pair blocks with paragraphs. Each block is in one pair. Paragraphs without a block are left out.

    If that takes too many comparisons, paragraphs are neither joined nor searched for blocks in them: only steps 2 and 4 are done. The published
    code gives up after 30 seconds instead.

    Args:
        blocks, paragraphs: texts, none of them empty.
    """
    distances = PartDistances()
    try:
        runs = _runs(blocks, paragraphs, distances)
        groups = _groups(blocks, paragraphs, runs)
        _add_contained(groups, blocks, paragraphs, distances)
    except TooManyComparisons:
        groups = _groups(blocks, paragraphs, [(n,) for n in range(len(paragraphs))])
    pairs = [Pair(tuple(sorted(group)), run) for run, group in groups.items() if group]
    # The order of Python's sets decides between equal distances in the published code, so these are sets too.
    blocks_left = [*set(range(len(blocks))) - {block for group in groups.values() for block in group}]
    paragraphs_left = [*set(range(len(paragraphs))) - {paragraph for run in groups for paragraph in run}]
    left = distance_matrix([blocks[n] for n in blocks_left], [paragraphs[n] for n in paragraphs_left])
    for row, column in zip(*linear_sum_assignment(left), strict=True):
        pairs.append(Pair((blocks_left[row],), (paragraphs_left[column],)))
    paired = {block for pair in pairs for block in pair.blocks}
    return pairs + [Pair((block,), ()) for block in range(len(blocks)) if block not in paired]


def distance(one: str, other: str) -> float:
    """Edit distance, divided by the length of the longer text. It is 0 if both are empty."""
    return Levenshtein.distance(one, other) / max(len(one), len(other), 1)


def distance_matrix(rows: Sequence[str], columns: Sequence[str]) -> NDArray[np.float64]:
    """Distances of texts, (rows, columns)."""
    distances = np.zeros((len(rows), len(columns)))
    for n, row in enumerate(rows):
        distances[n] = [distance(row, column) for column in columns]
    return distances


def part_distance(part: str, whole: str, limit: float) -> float:
    """Distance of a text to the most similar part of another that is as long.

    The distances to parts that begin n characters apart differ by 2 n at most. So most of them need not be computed.

    Args:
        part, whole: texts, `part` is neither empty nor the longer one.
        limit: largest distance of interest, in [0, 1].

    Returns:
        The distance. Above the limit it may be too small, but not below the limit.
    """
    if part in whole:
        return 0.0
    length, start, last = len(part), 0, len(whole) - len(part)
    least = int(limit * length) + 2
    while start <= last:
        changed = Levenshtein.distance(whole[start : start + length], part)
        if changed < least:
            least = changed
        start += (changed - least) // 2 + 1
    return least / length


def _groups(blocks: Sequence[str], paragraphs: Sequence[str], runs: Sequence[Numbers]) -> dict[Numbers, list[int]]:
    """Blocks by the paragraphs that they are paired with, with the least sum of distances."""
    distances = distance_matrix(blocks, [" ".join(paragraphs[n] for n in run) for run in runs])
    pairs = zip(*linear_sum_assignment(distances), strict=True)
    return {runs[run]: [int(block)] for block, run in pairs if distances[block, run] <= MAX_DISTANCE}


def _add_contained(
    groups: dict[Numbers, list[int]], blocks: Sequence[str], paragraphs: Sequence[str], distances: PartDistances
) -> None:
    """Add blocks without a pair to the group of the first paragraph that contains something similar."""
    left = sorted({*range(len(blocks))} - {block for group in groups.values() for block in group})
    taken: set[int] = set()
    for n, paragraph in enumerate(paragraphs):
        contained = [
            block
            for block in left
            if distances(blocks[block], paragraph, MAX_CONTAINED_DISTANCE) < MAX_CONTAINED_DISTANCE
        ]
        if contained:  # a paragraph whose blocks are all taken counts as paired
            groups.setdefault((n,), []).extend(block for block in contained if block not in taken)
            taken.update(contained)


def _runs(blocks: Sequence[str], paragraphs: Sequence[str], distances: PartDistances) -> list[Numbers]:
    """Paragraphs, with those joined that are better together."""
    similar = distance_matrix(blocks, paragraphs) < SIMILAR
    settled = {n for n in range(len(paragraphs)) if similar[:, n].any()}
    free = [n for n in range(len(paragraphs)) if n not in settled]
    candidates = []
    for number, block in enumerate(blocks):
        if free and not similar[number].any():
            runs = [_run(block, paragraphs, start, settled, distances) for start in free]
            candidates.append(min(runs, key=lambda run: run.distance))
    chosen = {run[0]: run for run in _without_overlap(candidates)}
    joined = {n for run in chosen.values() for n in run[1:]}
    return [chosen.get(n, (n,)) for n in range(len(paragraphs)) if n not in joined]


def _run(block: str, paragraphs: Sequence[str], start: int, settled: Set[int], distances: PartDistances) -> Run:
    """Join paragraphs from a start on for as long as they resemble the block better and are not longer."""
    end, text = start + 1, paragraphs[start]
    nearest = distance(block, text)
    while end < len(paragraphs) and end not in settled:
        longer = f"{text} {paragraphs[end]}"
        further = distance(block, longer)
        if further > nearest or any(
            distances(part, block, MAX_PART_DISTANCE) > MAX_PART_DISTANCE for part in paragraphs[start:end]
        ):
            break
        if distances(paragraphs[end], block, MAX_PART_DISTANCE) >= MAX_PART_DISTANCE:
            break
        end, text, nearest = end + 1, longer, further
        if len(text) > len(block):
            break
    return Run(tuple(range(start, end)), nearest)


def _without_overlap(candidates: Sequence[Run]) -> list[Numbers]:
    """Choose runs that have no paragraph in common: in each cluster of overlapping runs the selection with the least mean distance."""
    clusters: list[list[Run]] = []
    for run in sorted(candidates, key=lambda run: run.paragraphs[0]):
        if clusters and any(_overlap(run, other) for other in clusters[-1]):
            clusters[-1].append(run)
        else:
            clusters.append([run])
    return [run for cluster in clusters for run in _best_selection(cluster)]


def _overlap(one: Run, other: Run) -> bool:
    return not {*one.paragraphs}.isdisjoint(other.paragraphs)


def _best_selection(cluster: Sequence[Run]) -> list[Numbers]:
    """Extend selections run by run. A run that fits into none starts a new one."""
    selections: list[dict[Numbers, float]] = []
    for run in cluster:
        fits = False
        for selection in selections:
            if run.paragraphs in selection:
                fits = True
                selection[run.paragraphs] = min(run.distance, selection[run.paragraphs])
            elif all({*run.paragraphs}.isdisjoint(other) for other in selection):
                fits = True
                selection[run.paragraphs] = run.distance
        if not fits:
            selections.append({run.paragraphs: run.distance})
    best = min(selections, key=lambda selection: sum(selection.values()) / len(selection))
    return list(best)
