"""Checks of a preference dataset before training.

`examine` reads the dataset once and stores a few hundred bytes per pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dpo_mm.assets import resolve_asset
from dpo_mm.data.prompts import is_prompt_list, read_prompts
from dpo_mm.data.schema import prompt_images
from dpo_mm.doctor import image_checks, response_checks
from dpo_mm.doctor.checks import CHECKS, PAIR_CHECKS, SHORTCUT_CHECKS, Finding, sort_by_severity
from dpo_mm.doctor.dataset_statistics import (
    DatasetStatistics,
    check_missing_votes,
    check_models,
    digest,
    plain_text,
)
from dpo_mm.doctor.duplicates import repeated_ids
from dpo_mm.doctor.image_features import ImageFeatures, extract_features
from dpo_mm.doctor.loading import batches, load_dataset
from dpo_mm.doctor.shortcuts import MIN_GROUPS
from dpo_mm.printing.progress import progress_bar
from dpo_mm.sources.local_pairs import LocalPairs, local_pairs

CHECKS_OF_KIND = {"images": image_checks, "responses": response_checks}


@dataclass(frozen=True)
class Diagnosis:
    """Result of all checks of a dataset.

    Args:
        name: the dataset, as passed to `examine`.
        kind: images or responses.
        rows: number of rows.
        findings: failed checks, errors first.
        facts: properties of the dataset, as text.
        passed: keys of the checks without a finding.
        path: the dataset in the row schema, see `load_dataset`.
    """

    name: str
    kind: str
    rows: int
    findings: tuple[Finding, ...]
    facts: dict[str, str]
    passed: tuple[str, ...]
    path: str | None = None

    def failed(self, *, strict: bool = False) -> bool:
        """Return True if a finding is an error, or with strict also if one is a warning."""
        severities = ("error", "warning") if strict else ("error",)
        return any(finding.severity in severities for finding in self.findings)


def examine(
    name: str, *, held_out: str | None = None, uncertain: frozenset[str] = frozenset(), local: LocalPairs | None = None
) -> Diagnosis:
    """Check every row of a dataset, and the dataset as a whole.

    Args:
        name: the dataset, as `load_dataset` takes it.
        held_out: another dataset, or a text file with one prompt per line, that must not overlap with it.
        uncertain: names of sources that publish ties, votes or scores.
        local: the dataset in the row schema. None: as `local_pairs` finds it.

    Raises:
        ValueError: if the dataset cannot be read. The error names it.
    """
    local = local or local_pairs(name)
    dataset = load_dataset(name, path=local.path)
    held_out_prompts, held_out_images = held_out_digests(held_out) if held_out else (set(), set())
    checks = CHECKS_OF_KIND[dataset.kind]
    statistics = checks.collect_statistics(dataset, held_out_prompts, held_out_images)
    findings = statistics.problems.findings(statistics.num_rows)
    findings += (
        checks.run_checks(statistics)
        + check_models(statistics)
        + repeated_ids([*statistics.ids, *statistics.one_sided_ids])
    )
    if dataset.kind == "images" or set(statistics.counts["source"]) & uncertain:
        findings += check_missing_votes(statistics, set(uncertain))
    failed = {finding.check for finding in findings}
    skipped = set() if held_out else {"held-out-prompts", "held-out-images"}
    skipped |= set() if statistics.ids else PAIR_CHECKS
    prompts = len(set(statistics.column("groups"))) if statistics.ids else 0
    too_few = 0 < prompts < MIN_GROUPS
    skipped |= SHORTCUT_CHECKS if too_few else set()
    passed = [check for check, spec in CHECKS.items() if dataset.kind in spec.kinds and check not in failed | skipped]
    facts = {**({"taken for": local.about} if local.about else {}), **dataset_facts(statistics)}
    facts |= {"not tested": f"shortcuts, with fewer than {MIN_GROUPS} prompts"} if too_few else {}
    ordered = tuple(sort_by_severity(findings))
    return Diagnosis(name, dataset.kind, statistics.num_rows, ordered, facts, tuple(passed), local.path)


def held_out_digests(name: str) -> tuple[set[int], set[int]]:
    """Return the digests of the prompts and of the images of a held-out dataset.

    Args:
        name: a dataset, or a list of prompts: a text file with one per line, or a table with the columns prompt and category.

    Raises:
        ValueError: if it is neither.
    """
    path = Path(resolve_asset(name))
    if is_prompt_list(path):
        return {digest(plain_text(prompt)) for prompt in read_prompts(name)}, set()
    dataset = load_dataset(name, path=local_pairs(name).path)
    prompts: set[int] = set()
    image_digests: set[int] = set()
    with progress_bar("reading held-out rows", dataset.num_rows) as advance:
        for rows in batches(dataset):
            for row in rows:
                cells = prompt_images(row) or [row[column] for column in ("image_a", "image_b") if row.get(column)]
                images: list[ImageFeatures] = [
                    image for image in map(extract_features, cells) if not isinstance(image, str)
                ]
                image_digests |= {image.digest for image in images}
                if dataset.kind == "responses":
                    prompts.add(response_checks.prompt_digests(row, images)[1])
                else:
                    prompts.add(digest(plain_text(row["prompt"] or "")))
            advance(len(rows))
    return prompts, image_digests


def dataset_facts(statistics: DatasetStatistics) -> dict[str, str]:
    """Return properties of a dataset as text, by name."""
    facts = {"rows": f"{statistics.num_rows:,}", "pairs with a winner": f"{len(statistics.ids):,}"}
    if statistics.one_sided:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(statistics.one_sided.items(), reverse=True))
        facts["rows with one side"] = f"{kinds}. Labels, duplicates and shortcuts are checked on pairs only"
    if statistics.ids:
        facts["prompts"] = f"{len(set(statistics.column('prompts').tolist())):,}"
    for name in ("preference", "images per row", "format", "size", "source", "licence"):
        counts = statistics.counts.get(name)
        if counts:
            most_common = [f"{value} ({count:,})" for value, count in counts.most_common(4)]
            others = [f"{len(counts) - 4} more"] if len(counts) > 4 else []
            facts[name] = ", ".join(most_common + others)
    models = sorted({str(model) for pair in statistics.models for model in pair if model})
    if models:
        facts["models"] = ", ".join(models[:4]) + (f", {len(models) - 4} more" if len(models) > 4 else "")
    return facts
