"""Checks of datasets of image pairs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dpo_mm.data.schema import PREFERENCES
from dpo_mm.doctor.checks import CHECKS, Finding, first_examples, row_count_text
from dpo_mm.doctor.dataset_statistics import ERROR_ACCURACY, DatasetStatistics, digest, plain_text, shortcut_finding
from dpo_mm.doctor.duplicates import exact_duplicates, look_alike, near_duplicates
from dpo_mm.doctor.image_features import FEATURES, ImageFeatures, extract_features
from dpo_mm.doctor.loading import LoadedDataset, Row, batches
from dpo_mm.doctor.shortcuts import MIN_ACCURACY, run_regression_test, run_sign_test
from dpo_mm.errors import name_row
from dpo_mm.printing.progress import progress_bar

SHORTCUTS = {
    "resolution-shortcut": ("resolution", "aspect"),
    "format-shortcut": ("png", "jpeg", "webp"),
    "file-size-shortcut": ("bytes",),
    "colour-shortcut": ("brightness", "contrast", "saturation"),
}


def collect_statistics(
    dataset: LoadedDataset, held_out_prompts: set[int], held_out_images: set[int]
) -> DatasetStatistics:
    """Read all rows once and collect their statistics.

    Args:
        held_out_prompts, held_out_images: digests of the held-out dataset.
    """
    statistics = DatasetStatistics()
    with ThreadPoolExecutor() as pool, progress_bar("checking pairs", dataset.num_rows) as advance:
        for rows in batches(dataset):
            features = pool.map(extract_features, [row[column] for row in rows for column in ("image_a", "image_b")])
            for row, pair in zip(rows, _in_pairs(features), strict=True):
                with name_row(f"{dataset.name}, row {row['id']}", "Fix the row, or remove it"):
                    _add_row(statistics, row, pair, held_out_prompts, held_out_images)
            statistics.pack()
            advance(len(rows))
    return statistics


def _in_pairs(
    features: Iterator[ImageFeatures | str],
) -> Iterator[tuple[ImageFeatures | str, ImageFeatures | str]]:
    return zip(features, features, strict=True)


def _add_row(
    statistics: DatasetStatistics,
    row: Row,
    pair: tuple[ImageFeatures | str, ImageFeatures | str],
    held_out_prompts: set[int],
    held_out_images: set[int],
) -> None:
    statistics.add_row(row)
    preference, prompt = row["preference"], row["prompt"] or ""
    prompt_digest = digest(plain_text(prompt))
    statistics.num_uncertain += preference in ("tie", "both_bad") or any(
        row.get(column) is not None for column in ("p_a", "votes_a", "score_a")
    )
    if preference not in PREFERENCES:
        statistics.add_problem("labels-unknown", row, repr(preference))
    if not prompt.strip():
        statistics.add_problem("empty-prompts", row)
    elif prompt_digest in held_out_prompts:
        statistics.add_problem("held-out-prompts", row, prompt)
    contradiction = _label_contradiction(row)
    if contradiction:
        statistics.add_problem("labels-against-evidence", row, contradiction)
    present = [letter for letter in "ab" if row[f"image_{letter}"] is not None]
    if len(present) == 1:
        statistics.add_one_sided(row["id"], liked=present[0] == preference)
    else:
        statistics.counts["preference"][str(preference)] += 1
    if not present:
        statistics.add_problem("undecodable-images", row, "it has no image")
    reasons = [
        f"image_{letter} does not decode ({image})"
        for letter, image in zip("ab", pair, strict=True)
        if letter in present and isinstance(image, str)
    ]
    if reasons:
        statistics.add_problem("undecodable-images", row, ". ".join(reasons))
    images = [image for image in pair if not isinstance(image, str)]
    _add_images(statistics, row, prompt_digest, images, held_out_images)


def _add_images(
    statistics: DatasetStatistics,
    row: Row,
    prompt_digest: int,
    images: list[ImageFeatures],
    held_out_images: set[int],
) -> None:
    """Add the images of a row that decode, and the pair if both decode and one is the winner."""
    for image in images:
        statistics.counts["format"][image.format] += 1
        statistics.counts["size"]["{} x {}".format(*image.size)] += 1
    if any(image.digest in held_out_images for image in images):
        statistics.add_problem("held-out-images", row)
    if len(images) < 2:
        return
    if images[0].digest == images[1].digest:
        statistics.add_problem("identical-sides", row)
    if row["preference"] in ("a", "b"):
        models = [row.get("model_a"), row.get("model_b")]
        if row["preference"] == "b":
            images, models = images[::-1], models[::-1]
        statistics.add_pair(
            row,
            *models,
            features=np.stack([image.features for image in images]),
            digests=np.array([image.digest for image in images], dtype=np.uint64),
            hashes=np.array([image.hash for image in images], dtype=np.uint64),
            thumbnails=np.stack([image.thumbnail for image in images]),
            prompts=np.int64(prompt_digest),
            groups=np.int64(digest(row.get("group_id") or prompt_digest)),
        )


def _label_contradiction(row: Row) -> str:
    """Return the votes, probability or scores that contradict the label, or "". Tied votes contradict a win."""
    if row["preference"] not in ("a", "b"):
        return ""
    sign = 1 if row["preference"] == "a" else -1
    label = f"the label is {row['preference']}, but"
    p, a, b = row.get("p_a"), row.get("votes_a"), row.get("votes_b")
    if p is not None and sign * (p - 0.5) <= 0:
        return f"{label} p_a is {p:g}"
    if row.get("given_preference") is not None:  # relabelled: the votes are about the label before
        return ""
    if a is not None and b is not None and a + b > 0 and sign * (a - b) <= 0:
        return f"{label} the votes are {a} to {b}"
    a, b = row.get("score_a"), row.get("score_b")
    if a is not None and b is not None and sign * (a - b) < 0:
        return f"{label} the scores are {a:g} and {b:g}"
    return ""


def run_checks(statistics: DatasetStatistics) -> list[Finding]:
    """Check the dataset as a whole: duplicates, near duplicates and shortcuts."""
    ids = statistics.ids
    if not ids:
        return []
    features, digests = statistics.column("features"), statistics.column("digests")
    prompts, groups = statistics.column("prompts"), statistics.column("groups")
    hashes, thumbnails = statistics.column("hashes"), statistics.column("thumbnails")
    signed_digests = (digests >> np.uint64(1)).astype(np.int64)
    findings = exact_duplicates(prompts, signed_digests[:, 0], signed_digests[:, 1], ids)
    findings += near_duplicates(hashes, thumbnails, digests, ids)
    same = look_alike(hashes[:, 0], hashes[:, 1], thumbnails[:, 0], thumbnails[:, 1])
    same &= digests[:, 0] != digests[:, 1]
    if same.any():
        rows = np.flatnonzero(same)
        severity, summary = CHECKS["near-identical-sides"].severity, row_count_text(len(rows), len(ids))
        examples = first_examples(ids, rows)
        findings.append(Finding("near-identical-sides", severity, len(rows), len(ids), summary, examples))
    return findings + check_shortcuts(features[:, 0] - features[:, 1], groups, ids)


def check_shortcuts(differences: np.ndarray, groups: np.ndarray, ids: list[str]) -> list[Finding]:
    """Check which trivial features predict the winner.

    Args:
        differences: features of the winner less those of the loser, (pairs, len(FEATURES)).
        groups: group (prompt) of each pair, (pairs,).
        ids: ids of the pairs.
    """
    findings: list[Finding] = []
    for check, names in SHORTCUTS.items():
        tests = [(run_sign_test(differences[:, FEATURES.index(name)], groups), name) for name in names]
        test, name = max(tests, key=lambda pair: (pair[0].significant, pair[0].accuracy))
        findings += shortcut_finding(check, name, test, differences[:, FEATURES.index(name)], ids)
    file_features = FEATURES[: FEATURES.index("brightness")]
    return findings + regression_finding(differences, groups, ids, FEATURES, file_features)


def regression_finding(
    differences: np.ndarray, groups: np.ndarray, ids: list[str], names: tuple[str, ...], artefacts: tuple[str, ...]
) -> list[Finding]:
    """Return a finding if all features together predict the winner of pairs that the regression was not fitted on.

    Args:
        differences: features of the winner less those of the loser, (pairs, features).
        groups: group (prompt) of each pair, (pairs,).
        ids: ids of the pairs.
        names: names of the features.
        artefacts: names of the features that taste does not explain. If these predict most winners without the others,
            the finding is an error, otherwise a warning.
    """
    test, weights, scores = run_regression_test(differences, groups)
    if not test.significant or test.accuracy < MIN_ACCURACY or test.fraction_more < 0.5:
        return []
    artefact_test = run_regression_test(differences[:, [names.index(name) for name in artefacts]], groups).test
    strongest = [names[n] for n in np.argsort(-np.abs(weights))[:3] if abs(weights[n]) > 0.05]
    summary = (
        f"{', '.join(strongest)} predict {test.accuracy:.0%} of the winners of {len(ids):,} pairs, "
        "cross-validated (chance 50 %)"
    )
    severity = "error" if artefact_test.significant and artefact_test.accuracy >= ERROR_ACCURACY else "warning"
    rows = np.argsort(-scores, kind="stable")
    return [Finding("trivial-features", severity, len(ids), len(ids), summary, first_examples(ids, rows))]
