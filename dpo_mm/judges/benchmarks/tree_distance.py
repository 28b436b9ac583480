"""Edit distance of two ordered trees, with unit costs to insert and delete a node.

The algorithm is that of Zhang and Shasha 1989 (SIAM J. Comput. 18(6)). Each row of its table is one numpy operation, and the
distance of a leaf to a tree is written down directly, because tables have many leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True)
class Node(Generic[T]):
    """A node of a tree: its label and its children in order."""

    label: T
    children: list[Node[T]] = field(default_factory=list)


def tree_distance(a: Node[T], b: Node[T], rename: Callable[[T, T], float]) -> float:
    """Smallest cost that turns one tree into the other.

    Args:
        a, b: the trees.
        rename: cost to change one label into another, in [0, 1].
    """
    labels, first = _postorder(a)
    other_labels, other_first = _postorder(b)
    costs = np.array([[rename(one, two) for two in other_labels] for one in labels], dtype=float)
    distances = np.zeros_like(costs)
    _fill_leaves(distances, costs, first, other_first)
    _fill_leaves(distances.T, costs.T, other_first, first)
    for i in _inner_roots(first):
        for j in _inner_roots(other_first):
            _fill_subtrees(distances, costs, i, j, first, other_first)
    return float(distances[-1, -1])


def _postorder(root: Node[T]) -> tuple[list[T], list[int]]:
    """Return the labels in postorder, and the index of the first node of each subtree."""
    labels: list[T] = []
    first: list[int] = []

    def visit(node: Node[T]) -> None:
        start = len(labels)
        for child in node.children:
            visit(child)
        labels.append(node.label)
        first.append(start)

    visit(root)
    return labels, first


def _inner_roots(first: Sequence[int]) -> list[int]:
    """Return the last node, and so the root, of each set of subtrees with the same first node. Leaves are left out."""
    last = {start: index for index, start in enumerate(first)}
    return sorted(index for start, index in last.items() if index != start)


def _fill_leaves(distances: np.ndarray, costs: np.ndarray, first: Sequence[int], other_first: Sequence[int]) -> None:
    """Distance of each leaf to each subtree: all its nodes are inserted, except for the one that costs least to rename."""
    leaves = [index for index, start in enumerate(first) if index == start]
    for j, start in enumerate(other_first):
        distances[leaves, j] = costs[leaves, start : j + 1].min(axis=1) + (j - start)


def _fill_subtrees(
    distances: np.ndarray,
    costs: np.ndarray,
    i: int,
    j: int,
    first: Sequence[int],
    other_first: Sequence[int],
) -> None:
    """Distances of the subtrees that begin with the first nodes of subtree i and of subtree j."""
    top, left = first[i], other_first[j]
    columns = np.arange(j - left + 2)
    forest = np.zeros((i - top + 2, len(columns)))
    forest[0] = columns
    starts = np.array(other_first[left : j + 1])
    is_tree = starts == left
    for row, x in enumerate(range(top, i + 1), start=1):
        inserted_rest = forest[first[x] - top, starts - left] + distances[x, left : j + 1]
        if first[x] == top:
            renamed = forest[row - 1, :-1] + costs[x, left : j + 1]
            inserted_rest = np.where(is_tree, renamed, inserted_rest)
        best = np.concatenate([[float(row)], np.minimum(forest[row - 1, 1:] + 1, inserted_rest)])
        # An insertion adds 1 per column: min over k <= n of best[k] + n - k.
        forest[row] = np.minimum.accumulate(best - columns) + columns
        if first[x] == top:
            distances[x, left : j + 1][is_tree] = forest[row, 1:][is_tree]
