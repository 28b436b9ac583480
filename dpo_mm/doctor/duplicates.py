"""Copies within a set: the same pair again, the same pair with the other winner, and pairs that look the same."""

from __future__ import annotations

from collections import Counter

import numpy as np

from dpo_mm.doctor.checks import CHECKS, SHOWN, Finding, examples, share

ALIKE_BITS, ALIKE_LIGHT = 3, 3.0
"""Two pictures look the same: bits of 64 that differ, and mean difference of their 4x4 thumbnails, of 255."""
NEIGHBOURS = 8


def repeated(prompts: np.ndarray, winners: np.ndarray, losers: np.ndarray, ids: list[str]) -> list[Finding]:
    """Findings of the same pair again, and of its contradiction. All are digests of decided pairs, (pairs,)."""
    low, high = np.minimum(winners, losers), np.maximum(winners, losers)
    _, pair = np.unique(np.stack([prompts, low, high], 1), axis=0, return_inverse=True)
    pair = pair.reshape(-1)
    forward = winners == low
    count = np.bincount(pair)
    won = np.bincount(pair, weights=forward)
    against = (won > 0) & (won < count) & (low != high)[np.unique(pair, return_index=True)[1]]
    found = []
    if against.any():
        rows = np.flatnonzero(against[pair])
        rows = rows[np.argsort(pair[rows], kind="stable")]
        what = f"{share(len(rows), len(pair))} of {int(against.sum()):,} pair{'s' if against.sum() > 1 else ''}"
        found.append(_finding("contradictory-labels", len(rows), len(pair), what, examples(ids, rows)))
    first = np.zeros(len(pair), dtype=bool)
    first[np.unique(np.stack([pair, forward], 1), axis=0, return_index=True)[1]] = True
    again = np.flatnonzero(~first)
    if len(again):
        what = f"{share(len(again), len(pair))} repeat another"
        found.append(_finding("duplicate-pairs", len(again), len(pair), what, examples(ids, again)))
    return found


def repeated_ids(ids: list[str]) -> list[Finding]:
    """A finding of ids that stand for several pairs."""
    counts = Counter(ids) if len(set(ids)) < len(ids) else Counter()
    rows = [n for n, name in enumerate(ids) if counts[name] > 1]
    return (
        [_finding("ids-repeated", len(rows), len(ids), share(len(rows), len(ids)), examples(ids, rows))] if rows else []
    )


def _finding(check: str, count: int, total: int, what: str, rows: tuple[tuple[str, str], ...]) -> Finding:
    return Finding(check, CHECKS[check].severity, count, total, what, rows)


def alike(hash_a: np.ndarray, hash_b: np.ndarray, thumb_a: np.ndarray, thumb_b: np.ndarray) -> np.ndarray:
    """Whether two pictures look the same, (pairs,) of bool; hashes (pairs,), thumbs (pairs, 48)."""
    bits = np.bitwise_count(hash_a ^ hash_b)
    light = np.abs(thumb_a.astype(np.int16) - thumb_b.astype(np.int16)).mean(1)
    return (bits <= ALIKE_BITS) & (light <= ALIKE_LIGHT)


def near(hashes: np.ndarray, thumbs: np.ndarray, exact: np.ndarray, ids: list[str]) -> list[Finding]:
    """A finding of pairs that look like another one and are not the same.

    hashes: of winners and losers, (pairs, 2). thumbs: (pairs, 2, 48). exact: digests, (pairs, 2). Two hashes that
    differ in at most 3 bits agree in one of 4 stretches of 16; within a stretch, sorted, each is held against the next 8.
    """
    touched, shown = np.zeros(len(ids), dtype=bool), set()
    for stretch in range(4):
        key = (hashes[:, 0] >> np.uint64(16 * stretch)) & np.uint64(0xFFFF)
        order = np.lexsort((hashes[:, 1], hashes[:, 0], key))
        for step in range(1, NEIGHBOURS + 1):
            one, other = order[:-step], order[step:]
            close = key[one] == key[other]
            for side in range(2):
                close &= alike(hashes[one, side], hashes[other, side], thumbs[one, side], thumbs[other, side])
            close &= (exact[one] != exact[other]).any(1)
            touched[one[close]] = touched[other[close]] = True
            shown |= {(max(pair), min(pair)) for pair in zip(one[close][:SHOWN], other[close][:SHOWN], strict=True)}
    if not shown:
        return []
    rows, likes = zip(*sorted(shown), strict=True)
    count = int(touched.sum())
    words = [f"like {ids[row]}" for row in likes]
    what = f"{share(count, len(ids))} look like another one"
    return [_finding("near-duplicate-pairs", count, len(ids), what, examples(ids, rows, words))]
