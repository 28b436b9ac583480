"""Votes as preference rows: counts, the probability that a wins, and how far people agree.

A person counts once a pair: the repeats that measure agreement are no second votes. A tie is half a vote for each side;
both_bad says nothing of which is better. A pair's preference is what most said; where two answers share the lead it is
a tie, so that nothing undecided turns into a win.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_mm.assets import presets_folder
from dpo_mm.data.schema import make_image_rows
from dpo_mm.errors import did_you_mean
from dpo_mm.labels.pairs import digest, file_of, open_pairs
from dpo_mm.labels.ratings import Rating, ratings
from dpo_mm.labels.store import Vote, VoteStore, source_of
from dpo_mm.labels.vote_formats import FORMS
from dpo_mm.resumable import atomic_write

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Agreement:
    """Answers that were the same, of all that could have been: one person's to a repeat, two persons' to one pair."""

    same_self: int
    repeats: int
    same_others: int
    meetings: int


def agreement(votes: Sequence[Vote]) -> Agreement:
    """How far labellers agree with themselves and with each other; skips say nothing."""
    said = {(vote.labeller, vote.pair, vote.again): vote.said for vote in votes if vote.said != "skip"}
    selves = [
        said[who, pair, False] == what
        for (who, pair, again), what in said.items()
        if again and (who, pair, False) in said
    ]
    by_pair: dict[str, list[str]] = defaultdict(list)
    for (_, pair, again), what in said.items():
        if not again:
            by_pair[pair].append(what)
    others = [one == other for answers in by_pair.values() for one, other in combinations(answers, 2)]
    return Agreement(sum(selves), len(selves), sum(others), len(others))


def tally(votes: Sequence[Vote]) -> dict[str, dict[str, Any]]:
    """preference, p_a, votes_a and votes_b of each pair that has an answer, by id. p_a: null where all say both_bad."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for vote in votes:
        if not vote.again and vote.said != "skip":
            answers[vote.pair][vote.said] += 1
    return {pair: _verdict(counts) for pair, counts in answers.items()}


def _verdict(counts: Counter[str]) -> dict[str, Any]:
    (first, most), *rest = counts.most_common()
    shared = bool(rest) and rest[0][1] == most
    comparing = counts["a"] + counts["b"] + counts["tie"]
    return {
        "preference": "tie" if shared else first,
        "p_a": (counts["a"] + counts["tie"] / 2) / comparing if comparing else None,
        "votes_a": counts["a"],
        "votes_b": counts["b"],
    }


def labelled(votes: Sequence[Vote], rows: Dataset, digests: dict[str, str]) -> Dataset:
    """The pairs that have an answer as `ImagePreference` rows, in the set's order.

    Raises ValueError where there are none, or where a pair no longer looks as it did when it was voted on.
    """
    said = tally(votes)
    people = len({vote.labeller for vote in votes})
    kept = []
    for row in rows:
        if row["id"] not in said:
            continue
        if digests.get(row["id"], digest(row)) != digest(row):
            raise ValueError(f"pair {row['id']!r} has other pictures or another prompt than when it was voted on")
        pictures = {name: {"bytes": file_of(row[name]), "path": None} for name in ("image_a", "image_b")}
        known = {"axis": "people", "source": f"labelled by {people} {'person' if people == 1 else 'people'}"}
        kept.append({**row, **pictures, **known, **said[row["id"]]})
    if not kept:
        raise ValueError("no votes yet, or only skips; nothing to export")
    return make_image_rows(kept)


def export(votes: str, output: str, *, pairs: str | None = None, form: str = "rows") -> dict[str, str]:
    """Write the votes of a file, whole or not at all; returns what to print.

    form: rows (`ImagePreference`, Parquet), or one of FORMS, JSON. pairs: the set where it has moved.
    Raises ValueError as `labelled`, `open_pairs` and `VoteStore`, and for an unknown form.
    """
    if form not in ("rows", *FORMS):
        raise ValueError(f"form {form!r} is unknown; {did_you_mean(form, ('rows', *FORMS))}")
    store, rows = open_votes(votes, pairs)
    cast = store.votes()
    found = labelled(cast, rows, store.digests())
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as beside:
        if form == "rows":
            found.to_parquet(str(beside))
        else:
            beside.write_text(json.dumps(FORMS[form](cast, rows), ensure_ascii=False, indent=1))
    return {"pairs": f"{len(found)} of {len(rows)}", **summary(cast)}


def open_votes(votes: str, pairs: str | None = None) -> tuple[VoteStore, Dataset]:
    """A file of votes and the set that they are on. pairs: the set where it has moved."""
    source = pairs or source_of(votes)
    rows = open_pairs(source)
    return VoteStore(votes, rows["id"], source=absolute(source)), rows


def model_ratings(store: VoteStore, rows: Dataset) -> list[Rating]:
    """How the models of a set stand by its votes. Raises ValueError as `ratings`."""
    sides = zip(rows["model_a"], rows["model_b"], strict=True)
    return ratings(store.votes(), dict(zip(rows["id"], sides, strict=True)))


def summary(votes: Sequence[Vote]) -> dict[str, str]:
    """What a person wants to know of the votes, by name."""
    counts, agreed = Counter(vote.said for vote in votes), agreement(votes)
    lefts = [vote.said == "ab"[vote.swapped] for vote in votes if vote.said in ("a", "b")]
    return {
        "votes": f"{len(votes)} by {len({vote.labeller for vote in votes})} people",
        "answers": ", ".join(f"{name} {counts[name]}" for name in ("a", "b", "tie", "both_bad", "skip")),
        "left side won": f"{sum(lefts)} of {len(lefts)} decided",
        "same answer to a repeat": f"{agreed.same_self} of {agreed.repeats}",
        "two people agree": f"{agreed.same_others} of {agreed.meetings}",
    }


def absolute(source: str) -> str:
    """A file or folder by its full path; a shipped or hub set by its name."""
    return str(Path(source).absolute()) if Path(source).exists() else source


def train_command(votes: str, prompts: Sequence[str]) -> str:
    """One command line from votes to a trained adapter, for the folder that it is asked in."""
    from dpo_mm.data.prompts import category

    preset = "sd15" if any(category(prompt) == "all" for prompt in prompts) else "shapes"
    recipe, output = presets_folder() / f"faithfulness-{preset}.yaml", Path(votes).with_suffix(".parquet")
    names = {
        name: shlex.quote(_near(path)) for name, path in (("votes", Path(votes)), ("recipe", recipe), ("out", output))
    }
    return (
        f"dpo-mm label export {names['votes']} --output {names['out']} && "
        f"dpo-mm train {names['recipe']} --pairs {names['out']} --output-dir runs/labelled"
    )


def _near(path: Path) -> str:
    """A path as seen from the folder we are in, where it is within."""
    here, path = Path.cwd(), path.absolute()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
