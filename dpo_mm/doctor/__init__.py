"""What is wrong with a preference set, before anything is trained on it.

`examine` reads the set once, from end to end, and keeps a few hundred bytes a pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dpo_mm.assets import resolve_asset
from dpo_mm.data.prompts import read_prompts
from dpo_mm.doctor import image_checks, response_checks
from dpo_mm.doctor.checks import CHECKS, Finding, by_severity
from dpo_mm.doctor.dataset_statistics import DatasetStatistics, digest, lost, makers, plain
from dpo_mm.doctor.duplicates import repeated_ids
from dpo_mm.doctor.image_features import Look, look
from dpo_mm.doctor.loading import batches, load_dataset
from dpo_mm.progress import progress_bar

KINDS = {"images": image_checks, "answers": response_checks}


@dataclass(frozen=True)
class Diagnosis:
    """What was found in a set. facts: what it holds, in words. fine: titles of the checks that found nothing."""

    name: str
    kind: str
    rows: int
    findings: tuple[Finding, ...]
    facts: dict[str, str]
    fine: tuple[str, ...]

    def failed(self, *, strict: bool = False) -> bool:
        """Whether there is a finding of severity error; strict: or warning."""
        bad = ("error", "warning") if strict else ("error",)
        return any(finding.severity in bad for finding in self.findings)


def examine(name: str, *, held_out: str | None = None, uncertain: frozenset[str] = frozenset()) -> Diagnosis:
    """Look at every row of a set, and at the set as a whole.

    name: as `load_dataset` takes it. held_out: another set, or a list of prompts, that must not be in it. uncertain: names
    of sources that have ties, votes or scores. Raises ValueError that names the set where it can't be read at all.
    """
    opened = load_dataset(name)
    prompts, pictures = held_out_digests(held_out) if held_out else (set(), set())
    examiner = KINDS[opened.kind]
    seen = examiner.collect_statistics(opened, prompts, pictures)
    found = seen.notes.findings(seen.rows) + examiner.run_checks(seen) + makers(seen)
    found += repeated_ids(seen.ids)
    found += lost(seen, set(uncertain)) if opened.kind == "images" or set(seen.counts["source"]) & uncertain else []
    names = {finding.check for finding in found}
    skipped = set() if held_out else {"held-out-prompts", "held-out-pictures"}
    fine = [check for check, about in CHECKS.items() if opened.kind in about.kinds and check not in names | skipped]
    return Diagnosis(name, opened.kind, seen.rows, tuple(by_severity(found)), facts(seen), tuple(fine))


def held_out_digests(name: str) -> tuple[set[int], set[int]]:
    """Digests of the prompts and pictures of a set, or of a text file with a prompt a line.

    Raises ValueError where it is neither.
    """
    path = Path(resolve_asset(name))
    if path.suffix == ".txt":
        return {digest(plain(prompt)) for prompt in read_prompts(name)}, set()
    opened = load_dataset(name)
    prompts: set[int] = set()
    pictures: set[int] = set()
    with progress_bar("looking at held-out rows", opened.rows) as advance:
        for rows in batches(opened):
            for row in rows:
                cells = row.get("images") or [row[c] for c in ("image_a", "image_b") if row.get(c)]
                looks: list[Look] = [one for one in map(look, cells) if not isinstance(one, str)]
                pictures |= {one.digest for one in looks}
                of_answers = opened.kind == "answers"
                prompts.add(
                    response_checks.prompt_digests(row, looks)[1] if of_answers else digest(plain(row["prompt"] or ""))
                )
            advance(len(rows))
    return prompts, pictures


def facts(seen: DatasetStatistics) -> dict[str, str]:
    """What a set holds, in words."""
    found = {"rows": f"{seen.rows:,}", "pairs to learn from": f"{len(seen.ids):,}"}
    if seen.ids:
        found["prompts"] = f"{len(set(seen.column('prompts').tolist())):,}"
    for name in ("preference", "images a row", "format", "size", "source", "licence"):
        counts = seen.counts.get(name)
        if counts:
            shown = [f"{key} ({count:,})" for key, count in counts.most_common(4)]
            found[name] = ", ".join([*shown, *([f"{len(counts) - 4} more"] if len(counts) > 4 else [])])
    models = sorted({model for pair in seen.sides for model in pair if model})
    if models:
        found["models"] = ", ".join(models[:4]) + (f", {len(models) - 4} more" if len(models) > 4 else "")
    return found
