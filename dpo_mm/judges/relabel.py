"""New labels of a preference set by an ensemble of judges, before training.

    q_j = sigmoid((s_j(a) - s_j(b)) / tau_j)        judge j's probability that a wins
    p   = mean of q_j over the judges               what the ensemble says
    logit(p) + logit(h)                             where the set's own label counts too, h: how likely it makes a

Averaging several reward models' predictions before preference training: RankDPO, Karthik et al. 2024 (2410.18013); the
adding of log-odds is Bayes' rule for errors that are independent. A pair that the judges find equal is a tie, never a
win; a tie of the set becomes a win only where judges say so; both_bad stays. The old label is kept beside the new one.
Judging is the long part: it is done in shards that a restarted run skips. Processes share them (RANK of WORLD_SIZE).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image
from scipy.optimize import brentq
from scipy.special import expit, logit

from dpo_mm.config import RelabelConfig
from dpo_mm.data.image_files import decode_image, image_bytes
from dpo_mm.data.schema import load_pairs
from dpo_mm.judges import better_of, is_pairwise, judge_card, load_judge, load_pairwise
from dpo_mm.progress import progress_bar
from dpo_mm.resumable import atomic_write, check_settings_unchanged, exit_cleanly_on_sigterm, missing_shards

if TYPE_CHECKING:
    from datasets import Dataset, Features

BATCH = 512
"""Rows in memory while writing."""
EXACT = 1e-9
"""Probabilities nearer to 1/2 than this are 1/2: rounding makes no winner."""


class Labels(NamedTuple):
    """Of each pair: the new probability that a wins, the judges' own, (judges, pairs), and whether the pair is kept."""

    p: np.ndarray
    each: np.ndarray
    kept: np.ndarray


class Made(NamedTuple):
    """What is written: judges' scores, (judges, pairs, 2), their units, the labels, and the preference of each pair."""

    scores: np.ndarray
    units: Sequence[float]
    labels: Labels
    preferences: Sequence[str]


class RelabelResult(NamedTuple):
    """What came of it: the file, and the counts by name, as they also stand in the JSON file beside it."""

    path: Path
    summary: dict[str, Any]


def relabel(config: RelabelConfig) -> RelabelResult | None:
    """Judge a set's pairs and write it with new labels; None where other processes have shards to finish yet.

    Raises ValueError for a setting out of range, an unknown judge, a picture that does not decode, or no pair left.
    """
    _check(config)
    rows, folder = load_pairs(config.pairs), Path(f"{config.output}.parts")
    cards = {name: judge_card(name) for name in config.judges}
    same = {name: card.get("weights") or card.get("code_sha256") for name, card in cards.items()}
    told = hashlib.sha256("\0".join([*rows["id"], *rows["prompt"]]).encode()).hexdigest()
    plan = {"pairs": config.pairs, "ids and prompts": told, "judges": same, "shard_size": config.shard_size}
    check_settings_unchanged(folder, plan, done="judged", flag="output")
    scores = _judged(rows, config, folder)
    if scores is None:
        return None
    given = np.array([given_probability(row) for row in _plain(rows)])
    units = _units(scores, given, config)
    found = labels(scores, units, given, trust=config.trust, agreement=config.agreement)
    found = found._replace(kept=found.kept & ~np.isnan(found.p))
    if not found.kept.any():
        raise ValueError(f"{config.pairs}: the judges agree on none of {len(rows)} pairs; lower agreement")
    new = [_preference(p, old, config.tie) for p, old in zip(found.p, rows["preference"], strict=True)]
    made = Made(scores, units, found, new)
    _write(rows, made, config)
    summary = _summary(list(rows["preference"]), given, made, config, cards)
    Path(config.output).with_suffix(".json").write_text(json.dumps(summary, indent=1))
    return RelabelResult(Path(config.output), summary)


def _check(config: RelabelConfig) -> None:
    if not config.judges:
        raise ValueError("judges: none is named; give at least one, several with commas")
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
        raise ValueError(f"output {config.output!r}: expected the name of a file that ends in .parquet")
    for name in config.judges:
        load_pairwise(name) if is_pairwise(name) else load_judge(name)


# Labels


def labels(
    scores: np.ndarray, units: Sequence[float], given: np.ndarray, *, trust: float | None = None, agreement: float = 0.5
) -> Labels:
    """What judges say of pairs, and the set's own labels with them where they are trusted.

    scores: (judges, pairs, 2), a then b, higher is better. units: tau of each judge, in its scores, > 0; inf: no say.
    given: the set's probability that a wins, (pairs,). trust, agreement: as in `RelabelConfig`.
    """
    gaps = scores[..., 0] - scores[..., 1]
    each = expit(gaps / np.array(units)[:, None])
    p = each.mean(0)
    if trust is not None:
        held = 0.5 + (2 * trust - 1) * (given - 0.5)
        p = expit(logit(p.clip(1e-12, 1 - 1e-12)) + logit(held))
    half = np.abs(each - 0.5) < EXACT
    for_a = ((each > 0.5) & ~half).mean(0) + half.mean(0) / 2
    return Labels(p, each, np.maximum(for_a, 1 - for_a) >= agreement - EXACT)


def given_probability(row: dict[str, Any]) -> float:
    """How likely the set makes a: its p_a, or its votes, or its label; 1/2 for a tie or both_bad."""
    if row["p_a"] is not None:
        return float(row["p_a"])
    votes = (row["votes_a"] or 0) + (row["votes_b"] or 0)
    return (row["votes_a"] or 0) / votes if votes else {"a": 1.0, "b": 0.0}.get(row["preference"], 0.5)


def _preference(p: float, old: str, tie: float) -> str:
    if old == "both_bad":
        return old
    if abs(p - 0.5) <= max(tie, EXACT):
        return "tie"
    return "a" if p > 0.5 else "b"


def spread(gaps: np.ndarray) -> float:
    """Root mean square of a judge's differences; infinite where it sees none, so that it has no say."""
    size = float(np.sqrt(np.mean(gaps**2)))
    return size or math.inf


def likeliest(gaps: np.ndarray, given: np.ndarray) -> float:
    """tau that makes labels likeliest, sum of given · log sigmoid(gap / tau) + (1 - given) · log sigmoid(-gap / tau).

    Two made-up pairs of the judge's root mean square gap, one for it and one against, keep a judge that is never wrong
    from being certain. Infinite where the judge is right no more often than wrong: it has no say.
    """
    size = spread(gaps)
    if math.isinf(size):
        return size
    gaps, given = np.append(gaps, [size, size]) / size, np.append(given, [1.0, 0.0])

    def slope(k: float) -> float:
        return float(((given - expit(k * gaps)) * gaps).sum())

    return math.inf if slope(0) <= 0 else size / float(brentq(slope, 0, 1e4))


def _units(scores: np.ndarray, given: np.ndarray, config: RelabelConfig) -> list[float]:
    if config.scales:
        return list(config.scales)
    gaps = scores[..., 0] - scores[..., 1]
    there = ~np.isnan(gaps)
    if config.scale == "spread":
        return [spread(own[seen]) for own, seen in zip(gaps, there, strict=True)]
    decided = given != 0.5
    return [likeliest(own[seen & decided], given[seen & decided]) for own, seen in zip(gaps, there, strict=True)]


# Judging


def _judged(rows: Dataset, config: RelabelConfig, folder: Path) -> np.ndarray | None:
    """Scores, (judges, pairs, 2), NaN where a picture does not decode; None while other processes' shards are missing."""
    starts = range(0, len(rows), config.shard_size)
    places = [folder / f"shard-{number:05}.npy" for number in range(len(starts))]
    left = missing_shards(places)
    if left:
        with (
            exit_cleanly_on_sigterm(),
            progress_bar("judging", sum(_size(rows, starts[n], config) for n in left)) as advance,
        ):
            for number in left:
                part = rows.select(range(starts[number], starts[number] + _size(rows, starts[number], config)))
                found = _shard(part, config, first=starts[number])
                with atomic_write(places[number]) as beside, beside.open("wb") as file:
                    np.save(file, found)
                advance(len(part))
    if not all(place.exists() for place in places):
        return None
    return np.concatenate([np.load(place) for place in places], axis=1)


def _size(rows: Dataset, start: int, config: RelabelConfig) -> int:
    return min(config.shard_size, len(rows) - start)


def _shard(part: Dataset, config: RelabelConfig, *, first: int) -> np.ndarray:
    pictures, whole = [], []
    for number, row in enumerate(_cells(part)):
        try:
            pictures.append([_picture(row[f"image_{side}"]) for side in "ab"])
            whole.append(number)
        except ValueError as error:
            if config.undecodable_images == "raise":
                where = f"{config.pairs}, row {first + number}"
                raise ValueError(
                    f"{where}: a picture does not decode ({error}); drop such rows with --undecodable-images drop"
                ) from error
    found = np.full((len(config.judges), len(part), 2), np.nan)
    if whole:
        prompts = [part["prompt"][number] for number in whole]
        for place, name in enumerate(config.judges):
            found[place, whole] = scored(name, [a for a, _ in pictures], [b for _, b in pictures], prompts)
    return found


def scored(name: str, a: list[Image.Image], b: list[Image.Image], prompts: list[str]) -> np.ndarray:
    """A judge's scores of pairs, (pairs, 2), higher is better; a pairwise judge's probability of a, and of b.

    Raises ValueError where the judge gives something that is no number.
    """
    if is_pairwise(name):
        likely = np.array(load_pairwise(name)(a, b, prompts), dtype=float)
        found = np.stack([likely, 1 - likely], axis=1)
    else:
        values = np.array(load_judge(name)([*a, *b], [*prompts, *prompts]), dtype=float)
        found = values.reshape(2, -1).T * (-1 if better_of(name) == "lower" else 1)
    if not np.isfinite(found).all():
        pair = int(np.flatnonzero(~np.isfinite(found).all(1))[0])
        raise ValueError(
            f"judge {name!r} gives {found[pair].tolist()} for the prompt {prompts[pair]!r}; expected numbers"
        )
    return found


def _picture(cell: dict[str, Any] | None) -> Image.Image:
    try:
        return decode_image(image_bytes(cell))
    except OSError as error:
        raise ValueError(str(error)) from error


def _cells(rows: Dataset) -> Iterator[dict[str, Any]]:
    """Rows as they are stored, pictures undecoded."""
    for start in range(0, len(rows), BATCH):
        yield from rows.with_format("arrow")[start : start + BATCH].to_pylist()


def _plain(rows: Dataset) -> Any:
    return rows.select_columns(["preference", "p_a", "votes_a", "votes_b"])


# Writing


def columns(rows: Dataset) -> Features:
    """The set's columns with what relabelling adds: given_preference, given_p_a, and each judge's say."""
    from datasets import Features, List, Value

    number, text = Value("float64"), Value("string")
    say = {"judge": text, "score_a": number, "score_b": number, "p_a": number}
    return Features({**rows.features, "given_preference": text, "given_p_a": number, "judged": List(say)})


def _write(rows: Dataset, made: Made, config: RelabelConfig) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = columns(rows).arrow_schema
    place = Path(config.output)
    cells = enumerate(_cells(rows))
    with atomic_write(place) as beside, pq.ParquetWriter(beside, schema) as writer:
        while batch := list(itertools.islice(cells, BATCH)):
            new = [_row(row, n, made, config) for n, row in batch if made.labels.kept[n]]
            writer.write_table(pa.Table.from_pylist(new, schema=schema))


def _row(row: dict[str, Any], n: int, made: Made, config: RelabelConfig) -> dict[str, Any]:
    """A row with its new label; scores are the mean over judges, each in its unit."""
    scores, each = made.scores[:, n], made.labels.each[:, n]
    says = [
        {"judge": name, "score_a": a, "score_b": b, "p_a": p}
        for name, (a, b), p in zip(config.judges, scores, each, strict=True)
    ]
    names, (a, b) = "+".join(config.judges), (scores / np.array(made.units)[:, None]).mean(0)
    bad = made.preferences[n] == "both_bad"
    return {
        **row,
        "preference": made.preferences[n],
        "p_a": None if bad else made.labels.p[n],
        "score_a": a,
        "score_b": b,
        "axis": row["axis"] or names,
        "source": f"{row['source'] or config.pairs}, relabelled by {names}",
        "given_preference": row["preference"],
        "given_p_a": row["p_a"],
        "judged": says,
    }


def _summary(
    before: Sequence[str], given: np.ndarray, made: Made, config: RelabelConfig, cards: dict[str, Any]
) -> dict[str, Any]:
    whole, scale = ~np.isnan(made.labels.p), "given" if config.scales else config.scale
    kept = [(before[n], made.preferences[n]) for n in np.flatnonzero(made.labels.kept).tolist()]
    return {
        "pairs": len(before),
        "kept": len(kept),
        "left out, judges disagree": int((whole & ~made.labels.kept).sum()),
        "left out, a picture does not decode": int((~whole).sum()),
        "labels as before": sum(old == new for old, new in kept),
        "wins turned to the other side": sum({old, new} == {"a", "b"} for old, new in kept),
        "wins that became ties": sum(old in ("a", "b") and new == "tie" for old, new in kept),
        "ties that became wins": sum(old == "tie" and new in ("a", "b") for old, new in kept),
        "judges": [
            {"judge": name, **_says(made.scores[place], given), "unit": _finite(made.units[place]), "card": cards[name]}
            for place, name in enumerate(config.judges)
        ],
        "settings": {"trust": config.trust, "agreement": config.agreement, "tie": config.tie, "scale": scale},
    }


def _says(scores: np.ndarray, given: np.ndarray) -> dict[str, int]:
    """How often a judge sides with the set's own label, of the pairs where both decide, and how often it decides nothing."""
    gaps = scores[:, 0] - scores[:, 1]
    both = (given != 0.5) & (gaps != 0) & ~np.isnan(gaps)
    return {
        "decides, as the set does": int(both.sum()),
        "with the set's label": int(((gaps > 0) == (given > 0.5))[both].sum()),
        "finds equal": int((gaps == 0).sum()),
    }


def _finite(unit: float) -> float | None:
    return None if math.isinf(unit) else unit
