"""What can be wrong with a set of image pairs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from dpo_mm.data.schema import PREFERENCES
from dpo_mm.doctor.checks import CHECKS, Finding, examples, share
from dpo_mm.doctor.dataset_statistics import STRONG, DatasetStatistics, digest, plain, shortcut
from dpo_mm.doctor.duplicates import alike, near, repeated
from dpo_mm.doctor.image_features import FEATURES, Look, look
from dpo_mm.doctor.loading import LoadedDataset, Row, batches
from dpo_mm.doctor.shortcuts import LEAST, told_by, told_by_regression
from dpo_mm.progress import progress_bar

SHORTCUTS = {
    "resolution-shortcut": ("resolution", "aspect"),
    "format-shortcut": ("png", "jpeg", "webp"),
    "file-size-shortcut": ("bytes",),
    "look-shortcut": ("brightness", "contrast", "saturation"),
}
KEPT = ("features", "digest", "hash", "thumb")
NAMES = {"features": "features", "hash": "hashes"}


def collect_statistics(opened: LoadedDataset, prompts: set[int], pictures: set[int]) -> DatasetStatistics:
    """Everything that is kept of a set. prompts, pictures: digests of the held-out set's."""
    seen = DatasetStatistics()
    with ThreadPoolExecutor() as pool, progress_bar("looking at pairs", opened.rows) as advance:
        for rows in batches(opened):
            looks = pool.map(look, [row[column] for row in rows for column in ("image_a", "image_b")])
            for row, sides in zip(rows, _by_two(looks), strict=True):
                _row(seen, row, sides, prompts, pictures)
            seen.pack()
            advance(len(rows))
    return seen


def _by_two(looks: Iterator[Look | str]) -> Iterator[tuple[Look | str, Look | str]]:
    return zip(looks, looks, strict=True)


def _row(
    seen: DatasetStatistics, row: Row, sides: tuple[Look | str, Look | str], prompts: set[int], pictures: set[int]
) -> None:
    seen.common(row)
    preference, prompt = row["preference"], row["prompt"] or ""
    seen.counts["preference"][str(preference)] += 1
    name = digest(plain(prompt))
    seen.uncertain += preference in ("tie", "both_bad") or any(
        row.get(column) is not None for column in ("p_a", "votes_a", "score_a")
    )
    if preference not in PREFERENCES:
        seen.note("labels-unknown", row, repr(preference))
    if not prompt.strip():
        seen.note("empty-prompts", row)
    elif name in prompts:
        seen.note("held-out-prompts", row, prompt)
    against = _against(row)
    if against:
        seen.note("labels-against-evidence", row, against)
    broken = [f"image_{side} does not decode ({why})" for side, why in zip("ab", sides) if isinstance(why, str)]
    if broken:
        seen.note("pictures-broken", row, "; ".join(broken))
    _looked(seen, row, name, [side for side in sides if not isinstance(side, str)], pictures)


def _looked(seen: DatasetStatistics, row: Row, name: int, sides: list[Look], pictures: set[int]) -> None:
    """A row's pictures, as far as they decode."""
    for side in sides:
        seen.counts["format"][side.format] += 1
        seen.counts["size"]["{} x {}".format(*side.size)] += 1
    if any(side.digest in pictures for side in sides):
        seen.note("held-out-pictures", row)
    if len(sides) < 2:
        return
    if sides[0].digest == sides[1].digest:
        seen.note("identical-sides", row)
    if row["preference"] in ("a", "b"):
        first = 0 if row["preference"] == "a" else 1
        both = (sides[first], sides[1 - first])
        models = [row.get("model_a"), row.get("model_b")]
        values: dict[str, Any] = {
            NAMES.get(kept, f"{kept}s"): np.stack([np.asarray(getattr(side, kept), _kind(kept)) for side in both])
            for kept in KEPT
        }
        values |= {"prompts": np.int64(name), "groups": np.int64(digest(row.get("group_id") or name))}
        seen.pair(row, models[first], models[1 - first], **values)


def _kind(kept: str) -> Any:
    return {"features": np.float32, "thumb": np.uint8}.get(kept, np.uint64)


def _against(row: Row) -> str:
    """What of a row's own evidence speaks against its label, in words; a tie is no win."""
    if row["preference"] not in ("a", "b"):
        return ""
    sign = 1 if row["preference"] == "a" else -1
    p, a, b = row.get("p_a"), row.get("votes_a"), row.get("votes_b")
    if p is not None and sign * (p - 0.5) <= 0:
        return f"{row['preference']} is called the winner, p_a is {p:g}"
    if a is not None and b is not None and a + b > 0 and sign * (a - b) <= 0:
        return f"{row['preference']} is called the winner, votes are {a} to {b}"
    a, b = row.get("score_a"), row.get("score_b")
    if a is not None and b is not None and sign * (a - b) < 0:
        return f"{row['preference']} is called the winner, scores are {a:g} and {b:g}"
    return ""


def run_checks(seen: DatasetStatistics) -> list[Finding]:
    """Findings of the whole set."""
    if not seen.ids:
        return []
    features, digests = seen.column("features"), seen.column("digests")
    prompts, groups = seen.column("prompts"), seen.column("groups")
    hashes, thumbs = seen.column("hashes"), seen.column("thumbs")
    halves = (digests >> np.uint64(1)).astype(np.int64)
    found = repeated(prompts, halves[:, 0], halves[:, 1], seen.ids)
    found += near(hashes, thumbs, digests, seen.ids)
    same = alike(hashes[:, 0], hashes[:, 1], thumbs[:, 0], thumbs[:, 1]) & (digests[:, 0] != digests[:, 1])
    if same.any():
        rows = np.flatnonzero(same)
        what = share(len(rows), len(seen.ids))
        severity = CHECKS["near-identical-sides"].severity
        found.append(
            Finding("near-identical-sides", severity, len(rows), len(seen.ids), what, examples(seen.ids, rows))
        )
    return found + shortcuts(features[:, 0] - features[:, 1], groups, seen.ids)


def shortcuts(differences: np.ndarray, groups: np.ndarray, ids: list[str]) -> list[Finding]:
    """Which trivial features tell the winner. differences: winner less loser, (pairs, len(FEATURES))."""
    found: list[Finding] = []
    for check, names in SHORTCUTS.items():
        told = [(told_by(differences[:, FEATURES.index(name)], groups), name) for name in names]
        best, name = max(told, key=lambda one: (one[0].sure, one[0].accuracy))
        found += shortcut(check, name, best, differences[:, FEATURES.index(name)], ids)
    return found + regression(differences, groups, ids, FEATURES, FEATURES[: FEATURES.index("brightness")])


def regression(
    differences: np.ndarray, groups: np.ndarray, ids: list[str], names: tuple[str, ...], hard: tuple[str, ...]
) -> list[Finding]:
    """The finding that all features together tell the winner on pairs they were not fitted on.

    hard: those that no taste explains; an error where they alone tell most winners, else a warning.
    """
    told, weights, predicted = told_by_regression(differences, groups)
    if not told.sure or told.accuracy < LEAST or told.share < 0.5:
        return []
    alone = told_by_regression(differences[:, [names.index(name) for name in hard]], groups)[0]
    heavy = [names[n] for n in np.argsort(-np.abs(weights))[:3] if abs(weights[n]) > 0.05]
    what = f"{', '.join(heavy)} tell {told.accuracy:.0%} of the winners of {len(ids):,} pairs, held out (chance 50 %)"
    severity = "error" if alone.sure and alone.accuracy >= STRONG else "warning"
    rows = np.argsort(-predicted, kind="stable")
    return [Finding("trivial-features", severity, len(ids), len(ids), what, examples(ids, rows))]
