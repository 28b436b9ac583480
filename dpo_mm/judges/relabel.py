"""Relabelling: new labels of a preference dataset from an ensemble of judges, before training.

    q_j = sigmoid((s_j(a) - s_j(b)) / tau_j)        judge j's probability that a wins
    p   = mean of q_j over the judges               the ensemble's probability
    logit(p) + logit(h)                             if the dataset's own label counts too; h: its probability of a

Averaging the predictions of several reward models before preference training follows RankDPO, Karthik et al. 2024
(2410.18013). Adding log-odds is Bayes' rule for independent errors. If the judges score a pair equally, it is a tie and
never a win. A tie of the dataset becomes a win only if the judges decide so. both_bad is unchanged. The old label is
written in its own column.

Scoring takes most of the time. It is done in shards, which a restarted run skips. Several processes (RANK of WORLD_SIZE)
divide the shards among them.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit

from dpo_mm.config import RelabelConfig
from dpo_mm.data.image_files import rgb_image
from dpo_mm.data.lazy_images import source_cells
from dpo_mm.data.parquet import PAGE_CHECKSUMS
from dpo_mm.data.row_digest import digest
from dpo_mm.files.checksums import all_intact, missing_shards, saved_shards, write_with_checksum
from dpo_mm.files.content_key import library_versions
from dpo_mm.files.output_files import output_files, write_file
from dpo_mm.files.outputs import output_folder, settings_of
from dpo_mm.judges import (
    check_outputs,
    is_pairwise,
    judge_card,
    judge_digests,
    load_judge,
    load_pairwise,
    takes_sources,
)
from dpo_mm.judges.score_checks import score_pairs
from dpo_mm.judges.scoring import SCORING, check_sources, scored_columns
from dpo_mm.printing.progress import progress_bar
from dpo_mm.process.interruption import stop_on_signal
from dpo_mm.sources.local_pairs import load_image_pairs

if TYPE_CHECKING:
    from datasets import Dataset, Features

BATCH = 512
"""Rows in memory during writing."""
TIE_TOLERANCE = 1e-9
"""Probabilities closer to 1/2 than this are ties, so that rounding does not decide."""


class Labels(NamedTuple):
    """New labels of all pairs.

    Attributes:
        p: probability that a wins, (pairs,).
        each: the same for each judge, (judges, pairs).
        accepted: False for pairs that are left out, (pairs,).
    """

    p: np.ndarray
    each: np.ndarray
    accepted: np.ndarray


class RelabelledPairs(NamedTuple):
    """Everything that is written.

    Attributes:
        scores: scores of the judges, (judges, pairs, 2).
        units: tau of each judge.
        labels: the new labels.
        preferences: the new preference of each pair.
    """

    scores: np.ndarray
    units: Sequence[float]
    labels: Labels
    preferences: Sequence[str]


class RelabelResult(NamedTuple):
    """The written file, and the summary, which is also in the JSON file next to it."""

    path: Path
    summary: dict[str, Any]


def relabel(config: RelabelConfig) -> RelabelResult | None:
    """Score the pairs of a dataset with judges and write them with new labels.

    Returns:
        The result, or None if other processes still have unfinished shards.

    Raises:
        ValueError: if a setting, a judge, an image or the output is refused, or no pair is left.
    """
    _check(config)
    parts, output = Path(f"{config.output}.parts"), Path(config.output)
    files = output_files([output, output.with_suffix(".json")], inputs=[config.pairs])
    with stop_on_signal(lambda: saved_shards(parts)), files:
        rows = load_image_pairs(config.pairs, columns=config.columns, media_dir=config.media_dir)
        check_sources(rows, config.judges, name=config.pairs)
        settings = settings_of("relabelled pairs", ingredients(config, rows))
        with output_folder(parts, SCORING, settings, overwrite=config.overwrite):
            scores = _score_shards(rows, config, parts)
            return None if scores is None else _relabel(rows, scores, config)


def _relabel(rows: Dataset, scores: np.ndarray, config: RelabelConfig) -> RelabelResult:
    """Compute the new labels from the judges' scores and write them."""
    cards = {name: judge_card(name) for name in config.judges}
    given = np.array([given_probability(row) for row in _label_columns(rows)])
    units = _units(scores, given, config)
    new = labels(scores, units, given, trust=config.trust, agreement=config.agreement)
    new = new._replace(accepted=new.accepted & ~np.isnan(new.p))
    if not new.accepted.any():
        raise ValueError(f"{config.pairs}: the judges agree on none of {len(rows)} pairs. Lower agreement.")
    preferences = [_preference(p, old, config.tie) for p, old in zip(new.p, rows["preference"], strict=True)]
    relabelled = RelabelledPairs(scores, units, new, preferences)
    _write(rows, relabelled, config)
    summary = _summary(list(rows["preference"]), given, relabelled, config, cards)
    with write_file(Path(config.output).with_suffix(".json"), overwrite=config.overwrite) as temporary:
        temporary.write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return RelabelResult(Path(config.output), summary)


def ingredients(config: RelabelConfig, rows: Dataset) -> dict[str, Any]:
    """Return what decides the scores of a dataset, see `dpo_mm.files.content_key`. The rule for labels does not."""
    return {
        "settings": {name: getattr(config, name) for name in ("pairs", "shard_size")},
        "images": digest(rows.select_columns(scored_columns(config.judges))),
        "judges": judge_digests(config.judges),
        "libraries": library_versions(),
    }


def _check(config: RelabelConfig) -> None:
    if not config.judges:
        raise ValueError("judges is empty. Name at least one judge, several separated by commas.")
    if config.scale not in ("spread", "labels"):
        raise ValueError(f"scale {config.scale!r} is unknown; expected 'spread' or 'labels'")
    if config.scales and (len(config.scales) != len(config.judges) or min(config.scales) <= 0):
        raise ValueError(f"scales: expected a number above 0 for each of {len(config.judges)} judges")
    if config.trust is not None and not 0.5 <= config.trust < 1:
        raise ValueError(f"trust is {config.trust:g}; expected a probability in [0.5, 1)")
    if not 0.5 <= config.agreement <= 1 or not 0 <= config.tie < 0.5:
        raise ValueError("expected agreement in [0.5, 1] and tie in [0, 0.5)")
    if config.undecodable_images not in ("raise", "drop"):
        raise ValueError(f"undecodable_images {config.undecodable_images!r} is unknown; expected 'raise' or 'drop'")
    if not config.output.endswith(".parquet"):
        raise ValueError(f"output {config.output!r}: expected a file name that ends in .parquet")
    for name in config.judges:
        load_pairwise(name) if is_pairwise(name) else load_judge(name)
        check_outputs(name, "images")


# Labels


def labels(
    scores: np.ndarray, units: Sequence[float], given: np.ndarray, *, trust: float | None = None, agreement: float = 0.5
) -> Labels:
    """Combine the judges' scores, and the dataset's own labels if they are trusted, into new labels.

    Args:
        scores: (judges, pairs, 2), a then b, higher is better.
        units: tau of each judge, in its scores, > 0. Infinity gives the judge no weight.
        given: the dataset's probability that a wins, (pairs,).
        trust: probability that the dataset's label is right, [0.5, 1), or None to ignore it.
        agreement: smallest fraction of judges that must agree for a pair to be accepted, [0.5, 1].
    """
    gaps = scores[..., 0] - scores[..., 1]
    each = expit(gaps / np.array(units)[:, None])
    p = each.mean(0)
    if trust is not None:
        prior = 0.5 + (2 * trust - 1) * (given - 0.5)
        p = expit(logit(p.clip(1e-12, 1 - 1e-12)) + logit(prior))
    tied = np.abs(each - 0.5) < TIE_TOLERANCE
    for_a = ((each > 0.5) & ~tied).mean(0) + tied.mean(0) / 2
    return Labels(p, each, np.maximum(for_a, 1 - for_a) >= agreement - TIE_TOLERANCE)


def given_probability(row: dict[str, Any]) -> float:
    """Probability that a wins by the dataset: its p_a, or its votes, or its label. A tie or both_bad gives 1/2."""
    if row["p_a"] is not None:
        return float(row["p_a"])
    votes = (row["votes_a"] or 0) + (row["votes_b"] or 0)
    return (row["votes_a"] or 0) / votes if votes else {"a": 1.0, "b": 0.0}.get(row["preference"], 0.5)


def _preference(p: float, old: str, tie: float) -> str:
    if old == "both_bad":
        return old
    if abs(p - 0.5) <= max(tie, TIE_TOLERANCE):
        return "tie"
    return "a" if p > 0.5 else "b"


def spread(gaps: np.ndarray) -> float:
    """Root mean square of a judge's score gaps. It is infinite if all are 0, so that the judge has no weight."""
    rms = float(np.sqrt(np.mean(gaps**2)))
    return rms or math.inf


def most_likely_unit(gaps: np.ndarray, given: np.ndarray) -> float:
    """tau that maximises the likelihood of labels: sum of given · log sigmoid(gap / tau) + (1 - given) · log sigmoid(-gap / tau).

    Two artificial pairs with the judge's root mean square gap, one for it and one against, prevent certainty for a judge
    that is never wrong. The result is infinite if the judge is right no more often than wrong, so it has no weight.

    Args:
        gaps: score gaps, a minus b, (pairs,).
        given: the dataset's probability that a wins, (pairs,).
    """
    rms = spread(gaps)
    if math.isinf(rms):
        return rms
    gaps, given = np.append(gaps, [rms, rms]) / rms, np.append(given, [1.0, 0.0])

    def slope(k: float) -> float:
        return float(((given - expit(k * gaps)) * gaps).sum())

    return math.inf if slope(0) <= 0 else rms / float(brentq(slope, 0, 1e4))


def _units(scores: np.ndarray, given: np.ndarray, config: RelabelConfig) -> list[float]:
    if config.scales:
        return list(config.scales)
    gaps = scores[..., 0] - scores[..., 1]
    scored = ~np.isnan(gaps)
    if config.scale == "spread":
        return [spread(of_judge[valid]) for of_judge, valid in zip(gaps, scored, strict=True)]
    decided = given != 0.5
    return [
        most_likely_unit(of_judge[valid & decided], given[valid & decided])
        for of_judge, valid in zip(gaps, scored, strict=True)
    ]


# Scoring


def _score_shards(rows: Dataset, config: RelabelConfig, folder: Path) -> np.ndarray | None:
    """Scores, (judges, pairs, 2), NaN if an image does not decode. None while other processes' shards are missing."""
    starts = range(0, len(rows), config.shard_size)
    paths = [folder / f"shard-{number:05}.npy" for number in range(len(starts))]
    missing = missing_shards(paths)
    if missing:
        with (
            progress_bar("judging", sum(_length(rows, starts[n], config) for n in missing)) as advance,
        ):
            for number in missing:
                part = rows.select(range(starts[number], starts[number] + _length(rows, starts[number], config)))
                scores = _score_shard(part, config, first=starts[number])
                with write_with_checksum(paths[number]) as temporary, temporary.open("wb") as file:
                    np.save(file, scores)
                advance(len(part))
    if not all_intact(paths, Path(config.output)):
        return None
    return np.concatenate([np.load(path) for path in paths], axis=1)


def _length(rows: Dataset, start: int, config: RelabelConfig) -> int:
    return min(config.shard_size, len(rows) - start)


def _score_shard(part: Dataset, config: RelabelConfig, *, first: int) -> np.ndarray:
    images, decoded = [], []
    sources_of = source_cells if any(map(takes_sources, config.judges)) else lambda row: []
    for number, row in enumerate(_stored_rows(part)):
        try:
            images.append([rgb_image(cell) for cell in (row["image_a"], row["image_b"], *sources_of(row))])
            decoded.append(number)
        except ValueError as error:
            if config.undecodable_images == "raise":
                raise ValueError(
                    f"{config.pairs}, row {first + number}: an image does not decode ({error}). Fix the file, or leave such rows "
                    "out with --undecodable-images drop."
                ) from error
    scores = np.full((len(config.judges), len(part), 2), np.nan)
    if decoded:
        prompts = [part["prompt"][number] for number in decoded]
        for index, name in enumerate(config.judges):
            a, b = ([each[side] for each in images] for side in (0, 1))
            scores[index, decoded] = score_pairs(name, a, b, prompts, [each[2:] for each in images])
    return scores


def _stored_rows(rows: Dataset) -> Iterator[dict[str, Any]]:
    """Rows as stored, with encoded images."""
    for start in range(0, len(rows), BATCH):
        yield from rows.with_format("arrow")[start : start + BATCH].to_pylist()


def _label_columns(rows: Dataset) -> Any:
    return rows.select_columns(["preference", "p_a", "votes_a", "votes_b"])


# Writing


def columns(rows: Dataset) -> Features:
    """Columns of the dataset, and those that relabelling adds: given_preference, given_p_a, and each judge's scores."""
    from datasets import Features, List, Value

    number, text = Value("float64"), Value("string")
    of_judge = {"judge": text, "score_a": number, "score_b": number, "p_a": number}
    return Features({**rows.features, "given_preference": text, "given_p_a": number, "judged": List(of_judge)})


def _write(rows: Dataset, relabelled: RelabelledPairs, config: RelabelConfig) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = columns(rows).arrow_schema
    stored = enumerate(_stored_rows(rows))
    with (
        write_file(Path(config.output), overwrite=config.overwrite) as temporary,
        pq.ParquetWriter(temporary, schema, **PAGE_CHECKSUMS) as writer,
    ):
        while batch := list(itertools.islice(stored, BATCH)):
            new = [_row(row, n, relabelled, config) for n, row in batch if relabelled.labels.accepted[n]]
            writer.write_table(pa.Table.from_pylist(new, schema=schema))


def _row(row: dict[str, Any], n: int, relabelled: RelabelledPairs, config: RelabelConfig) -> dict[str, Any]:
    """A row with its new label. Its scores are means over the judges, each in its unit."""
    scores, each = relabelled.scores[:, n], relabelled.labels.each[:, n]
    of_judges = [
        {"judge": name, "score_a": a, "score_b": b, "p_a": p}
        for name, (a, b), p in zip(config.judges, scores, each, strict=True)
    ]
    names, (a, b) = "+".join(config.judges), (scores / np.array(relabelled.units)[:, None]).mean(0)
    both_bad = relabelled.preferences[n] == "both_bad"
    return {
        **row,
        "preference": relabelled.preferences[n],
        "p_a": None if both_bad else relabelled.labels.p[n],
        "score_a": a,
        "score_b": b,
        "axis": row["axis"] or names,
        "source": f"{row['source'] or config.pairs}, relabelled by {names}",
        "given_preference": row["preference"],
        "given_p_a": row["p_a"],
        "judged": of_judges,
    }


def _summary(
    before: Sequence[str], given: np.ndarray, relabelled: RelabelledPairs, config: RelabelConfig, cards: dict[str, Any]
) -> dict[str, Any]:
    decoded, scale = ~np.isnan(relabelled.labels.p), "given" if config.scales else config.scale
    accepted = relabelled.labels.accepted
    changes = [(before[n], relabelled.preferences[n]) for n in np.flatnonzero(accepted).tolist()]
    return {
        "pairs": len(before),
        "kept": len(changes),
        "left out, judges disagree": int((decoded & ~accepted).sum()),
        "left out, an image does not decode": int((~decoded).sum()),
        "labels as before": sum(old == new for old, new in changes),
        "wins turned to the other side": sum({old, new} == {"a", "b"} for old, new in changes),
        "wins that became ties": sum(old in ("a", "b") and new == "tie" for old, new in changes),
        "ties that became wins": sum(old == "tie" and new in ("a", "b") for old, new in changes),
        "judges": [
            {
                "judge": name,
                **_agreement(relabelled.scores[index], given),
                "unit": _finite(relabelled.units[index]),
                "card": cards[name],
            }
            for index, name in enumerate(config.judges)
        ],
        "settings": {"trust": config.trust, "agreement": config.agreement, "tie": config.tie, "scale": scale},
    }


def _agreement(scores: np.ndarray, given: np.ndarray) -> dict[str, int]:
    """Counts of pairs on which a judge agrees with the dataset's label, of those that both decide, and of equal scores."""
    gaps = scores[:, 0] - scores[:, 1]
    both = (given != 0.5) & (gaps != 0) & ~np.isnan(gaps)
    return {
        "decides, as the set does": int(both.sum()),
        "with the set's label": int(((gaps > 0) == (given > 0.5))[both].sum()),
        "finds equal": int((gaps == 0).sum()),
    }


def _finite(unit: float) -> float | None:
    return None if math.isinf(unit) else unit
