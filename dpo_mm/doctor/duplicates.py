"""Duplicates within a dataset: repeated pairs, pairs with opposite winners, and pairs of images that look the same."""

from __future__ import annotations

from collections import Counter

import numpy as np

from dpo_mm.doctor.checks import CHECKS, MAX_EXAMPLES, Finding, first_examples, row_count_text

MAX_HASH_BITS, MAX_THUMBNAIL_DIFFERENCE = 3, 3.0
"""Limits within which two images look the same: differing bits of 64, and mean difference of 4x4 thumbnails, of 255."""
NEIGHBOURS = 8


def exact_duplicates(prompts: np.ndarray, winners: np.ndarray, losers: np.ndarray, ids: list[str]) -> list[Finding]:
    """Find pairs that occur more than once, with the same winner or with opposite winners.

    Args:
        prompts, winners, losers: digests of the pairs that have a winner, (pairs,) each.
        ids: ids of the pairs.
    """
    low, high = np.minimum(winners, losers), np.maximum(winners, losers)
    _, pair = np.unique(np.stack([prompts, low, high], 1), axis=0, return_inverse=True)
    pair = pair.reshape(-1)
    forward = winners == low
    count = np.bincount(pair)
    forward_count = np.bincount(pair, weights=forward)
    different = (low != high)[np.unique(pair, return_index=True)[1]]
    contradictory = (forward_count > 0) & (forward_count < count) & different
    findings = []
    if contradictory.any():
        rows = np.flatnonzero(contradictory[pair])
        rows = rows[np.argsort(pair[rows], kind="stable")]
        num_pairs = int(contradictory.sum())
        summary = f"{row_count_text(len(rows), len(pair))} of {num_pairs:,} pair{'s' if num_pairs > 1 else ''}"
        findings.append(_finding("contradictory-labels", len(rows), len(pair), summary, first_examples(ids, rows)))
    is_first = np.zeros(len(pair), dtype=bool)
    is_first[np.unique(np.stack([pair, forward], 1), axis=0, return_index=True)[1]] = True
    copies = np.flatnonzero(~is_first)
    if len(copies):
        summary = f"{row_count_text(len(copies), len(pair))} repeat another row"
        findings.append(_finding("duplicate-pairs", len(copies), len(pair), summary, first_examples(ids, copies)))
    return findings


def repeated_ids(ids: list[str]) -> list[Finding]:
    """Find ids that several rows share."""
    counts = Counter(ids) if len(set(ids)) < len(ids) else Counter()
    rows = [n for n, row_id in enumerate(ids) if counts[row_id] > 1]
    if not rows:
        return []
    summary = row_count_text(len(rows), len(ids))
    return [_finding("ids-repeated", len(rows), len(ids), summary, first_examples(ids, rows))]


def _finding(check: str, count: int, total: int, summary: str, examples: tuple[tuple[str, str], ...]) -> Finding:
    return Finding(check, CHECKS[check].severity, count, total, summary, examples)


def look_alike(
    hashes_a: np.ndarray, hashes_b: np.ndarray, thumbnails_a: np.ndarray, thumbnails_b: np.ndarray
) -> np.ndarray:
    """Return which images look the same, (images,) of bool.

    Args:
        hashes_a, hashes_b: perceptual hashes, (images,) of uint64.
        thumbnails_a, thumbnails_b: thumbnails, (images, 48), 0 to 255.
    """
    bits = np.bitwise_count(hashes_a ^ hashes_b)
    difference = np.abs(thumbnails_a.astype(np.int16) - thumbnails_b.astype(np.int16)).mean(1)
    return (bits <= MAX_HASH_BITS) & (difference <= MAX_THUMBNAIL_DIFFERENCE)


def near_duplicates(hashes: np.ndarray, thumbnails: np.ndarray, digests: np.ndarray, ids: list[str]) -> list[Finding]:
    """Find pairs whose images look like those of another pair without being identical.

    Two hashes that differ in at most 3 bits agree in at least one of 4 blocks of 16 bits. The pairs are sorted by each
    block in turn, and each pair is compared with the next 8.

    Args:
        hashes: perceptual hashes of winner and loser, (pairs, 2).
        thumbnails: thumbnails of winner and loser, (pairs, 2, 48).
        digests: digests of the pixels of winner and loser, (pairs, 2).
        ids: ids of the pairs.
    """
    is_near, matches = np.zeros(len(ids), dtype=bool), set()
    for block in range(4):
        key = (hashes[:, 0] >> np.uint64(16 * block)) & np.uint64(0xFFFF)
        order = np.lexsort((hashes[:, 1], hashes[:, 0], key))
        keys, sorted_hashes = key[order], hashes[order].T.copy()
        for step in range(1, NEIGHBOURS + 1):
            close = keys[:-step] == keys[step:]
            for side in sorted_hashes:
                close &= np.bitwise_count(side[:-step] ^ side[step:]) <= MAX_HASH_BITS
            first = np.flatnonzero(close)
            left, right = order[first], order[first + step]
            close = (digests[left] != digests[right]).any(1)
            for n in range(2):
                close &= look_alike(hashes[left, n], hashes[right, n], thumbnails[left, n], thumbnails[right, n])
            left, right = left[close], right[close]
            is_near[left] = is_near[right] = True
            examples = zip(left[:MAX_EXAMPLES], right[:MAX_EXAMPLES], strict=True)
            matches |= {(max(match), min(match)) for match in examples}
    if not matches:
        return []
    rows, originals = zip(*sorted(matches), strict=True)
    count = int(is_near.sum())
    comments = [f"like {ids[row]}" for row in originals]
    summary = f"{row_count_text(count, len(ids))} look like another row"
    return [_finding("near-duplicate-pairs", count, len(ids), summary, first_examples(ids, rows, comments))]
