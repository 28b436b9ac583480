"""Export of votes as preference rows: vote counts, the probability that a wins, and the agreement of annotators.

Each person counts once per pair: repeats only measure agreement. A tie is half a vote for each image. both_bad does not
count for either image. The preference of a pair is the most frequent choice. If two choices share the lead, it is a tie,
so that an undecided vote does not become a win.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_mm.assets import presets_folder
from dpo_mm.data.lazy_images import source_cells, source_column
from dpo_mm.data.load_pairs import has_source_lists
from dpo_mm.data.parquet import PAGE_CHECKSUMS
from dpo_mm.data.schema import image_preference, make_image_rows, make_response_rows, response_preference
from dpo_mm.errors import did_you_mean, name_row
from dpo_mm.files.output_files import output_files, write_file
from dpo_mm.labels.agreement import agreement, krippendorff_alpha
from dpo_mm.labels.pairs import file_bytes, models_of, open_pairs, pair_digest
from dpo_mm.labels.ratings import Rating, rate_models
from dpo_mm.labels.response_pairs import is_response, labelled_response
from dpo_mm.labels.store import Vote, VoteReader, source_of
from dpo_mm.labels.vote_formats import FORMATS
from dpo_mm.printing.printed_text import counted, quoted

if TYPE_CHECKING:
    from datasets import Dataset

GROUP_ROWS, GROUP_BYTES = 1000, 2**25
"""Largest number of rows, and of bytes of images, in memory before a row group is written."""


def tally(votes: Sequence[Vote]) -> dict[str, dict[str, Any]]:
    """Return preference, p_a, votes_a and votes_b of each pair with a choice other than skip, by pair id.

    p_a is null if every choice is both_bad.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for vote in votes:
        if not vote.is_repeat and vote.choice != "skip":
            counts[vote.pair][vote.choice] += 1
    return {pair: _preference(choices) for pair, choices in counts.items()}


def _preference(counts: Counter[str]) -> dict[str, Any]:
    (first, most), *rest = counts.most_common()
    is_shared_lead = bool(rest) and rest[0][1] == most
    comparing = counts["a"] + counts["b"] + counts["tie"]
    return {
        "preference": "tie" if is_shared_lead else first,
        "p_a": (counts["a"] + counts["tie"] / 2) / comparing if comparing else None,
        "votes_a": counts["a"],
        "votes_b": counts["b"],
    }


def preference_rows(votes: Sequence[Vote], rows: Dataset, digests: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the pairs with votes as preference rows of images or of responses, in the dataset's order.

    Rows of responses have a chosen one, so pairs without a winner are left out.

    Args:
        votes: active votes.
        rows: the dataset, with undecoded images.
        digests: `pair_digest` of each pair when it was voted on, by pair id.

    Raises:
        ValueError: if there are no votes or no winners, or a pair has changed since it was voted on.
    """
    preferences = tally(votes)
    if not preferences:
        raise ValueError("there are no votes except skips, so there is nothing to export")
    people = len({vote.annotator for vote in votes})
    count = 0
    for row in rows:
        if row["id"] not in preferences:
            continue
        digest = pair_digest(row)
        if digests.get(row["id"], digest) != digest:
            raise ValueError(f"pair {row['id']!r} has changed since it was voted on")
        with name_row(f"pair {row['id']!r}", "Fix the dataset, or vote again without this pair"):
            labelled = _labelled(row, preferences[row["id"]])
        if labelled is None:
            continue
        count += 1
        yield {**labelled, "axis": "people", "source": f"labelled by {counted(people, 'person', 'people')}"}
    if not count:
        raise ValueError("no pair of responses has a winner, so there is nothing to export. Training needs winners")


def _labelled(row: dict[str, Any], preference: dict[str, Any]) -> dict[str, Any] | None:
    """Return a row with the label of the votes, or None if it is of responses and none of them won."""
    if is_response(row):
        return labelled_response(row, preference)
    stored = lambda cell: {"bytes": file_bytes(cell), "path": None}
    images = {column: stored(row[column]) for column in ("image_a", "image_b") if row[column] is not None}
    sources = [stored(cell) for cell in source_cells(row)]
    column = source_column(sources, several=isinstance(row["image_source"], list))
    return {**row, **images, "image_source": column, **preference}


def _write_rows(labelled: Iterable[dict[str, Any]], path: Path, rows: Dataset) -> int:
    """Write rows as Parquet, a row group at a time, so that the images of one are in memory. Return their number."""
    import pyarrow.parquet as pq

    of_responses = "chosen" in rows.column_names
    make = make_response_rows if of_responses else make_image_rows
    features = response_preference() if of_responses else image_preference(several_sources=has_source_lists(rows))
    count, schema = 0, features.arrow_schema
    with pq.ParquetWriter(path, schema, **PAGE_CHECKSUMS) as writer:
        for group in _row_groups(labelled):
            writer.write_table(make(group).data.table.cast(schema))
            count += len(group)
    return count


def _row_groups(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield rows in lists of at most GROUP_ROWS rows and about GROUP_BYTES bytes of images."""
    group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        group.append(row)
        cells = row["images"] if is_response(row) else (row["image_a"], row["image_b"])
        size += sum(len(cell["bytes"]) for cell in cells)
        if len(group) >= GROUP_ROWS or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _write_json(items: Iterable[dict[str, Any]], path: Path) -> None:
    """Write a list as JSON, an item at a time."""
    with path.open("w", encoding="utf-8") as file:
        for number, item in enumerate(items):
            text = json.dumps(item, ensure_ascii=False, indent=1).replace("\n", "\n ")
            file.write(f"{',' if number else '['}\n {text}")
        file.write("\n]")


def export(
    votes: str, output: str, *, pairs: str | None = None, format: str = "rows", overwrite: bool = False
) -> dict[str, str]:
    """Write the votes of a file to a temporary file, then rename it. Return a summary to print.

    Args:
        votes: SQLite file of votes.
        output: file to write.
        pairs: the dataset, if it has moved since the votes.
        format: rows (`ImagePreference` or `ResponsePreference`, Parquet), or one of FORMATS (JSON).
        overwrite: replace an earlier export.

    Raises:
        ValueError: if the format is unknown, the output is an input or a file of others, or as in `preference_rows`,
            `open_pairs` and `VoteReader`.
    """
    if format not in ("rows", *FORMATS):
        raise ValueError(f"format {format!r} is unknown; {did_you_mean(format, ('rows', *FORMATS))}")
    source = pairs or source_of(votes)
    with output_files([Path(output)], inputs=[votes, source]):
        store, rows = open_votes(votes, pairs)
        active_votes = store.votes()
        labelled = preference_rows(active_votes, rows, store.digests())
        with write_file(Path(output), overwrite=overwrite) as temporary:
            if format == "rows":
                count = _write_rows(labelled, temporary, rows)
            else:
                count = sum(1 for _ in labelled)
                _write_json(FORMATS[format](active_votes, rows), temporary)
    return {"pairs": f"{count} of {len(rows)}", **summary(active_votes)}


def open_votes(votes: str, pairs: str | None = None) -> tuple[VoteReader, Dataset]:
    """Open a file of votes for reading, and the dataset that they belong to. The file may be read-only.

    Args:
        votes: SQLite file of votes.
        pairs: the dataset, if it has moved since the votes.
    """
    source = pairs or source_of(votes)
    rows = open_pairs(source)
    return VoteReader(votes, rows["id"][:], source=source), rows


def model_ratings(store: VoteReader, rows: Dataset, *, at: float | None = None) -> list[Rating]:
    """Rate the models of a dataset by its votes.

    Args:
        at: Unix time. The votes are those that were active then. None: now.

    Raises:
        ValueError: if no vote compares two named models.
    """
    return rate_models(store.votes(at=at), models_of(rows))


def summary(votes: Sequence[Vote]) -> dict[str, str]:
    """Return the number of votes, the choices, the bias to the left and the agreement, as text."""
    counts, agreed = Counter(vote.choice for vote in votes), agreement(votes)
    left_won = [vote.choice == "ab"[vote.swapped] for vote in votes if vote.choice in ("a", "b")]
    return {
        "votes": f"{len(votes)} by {counted(len({vote.annotator for vote in votes}), 'person', 'people')}",
        "choices": ", ".join(f"{choice} {counts[choice]}" for choice in ("a", "b", "tie", "both_bad", "skip")),
        "left won": f"{sum(left_won)} of {counted(len(left_won), 'vote')} with a winner",
        "same choice on a repeat": f"{agreed.same_annotator} of {agreed.repeats}",
        "same choice of two people": f"{agreed.two_annotators} of {agreed.comparisons}",
        "agreement (Krippendorff's alpha)": krippendorff_alpha(votes).text(),
    }


def absolute_source(source: str) -> str:
    """Return the absolute path of a file or folder. The name of a bundled or hub dataset is unchanged."""
    return str(Path(source).absolute()) if Path(source).exists() else source


def preset_for(rows: Dataset) -> Path:
    """Return a preset that trains on the votes on a dataset. It names a model of the dataset's kind."""
    from dpo_mm.data.prompts import category

    if "chosen" in rows.column_names:
        return presets_folder() / "captioner-smolvlm.yaml"
    preset = "sd15" if any(category(prompt) == "all" for prompt in rows["prompt"][:]) else "shapes"
    return presets_folder() / f"faithfulness-{preset}.yaml"


def train_command(votes: str, config: Path) -> str:
    """Return a command line that exports the votes and trains an adapter, relative to the current folder."""
    output = Path(votes).with_suffix(".parquet")
    votes_argument, config_argument, output_argument = (
        quoted(_relative_path(path)) for path in (Path(votes), config, output)
    )
    return (
        f"dpo-mm label export {votes_argument} --output {output_argument} && "
        f"dpo-mm train {config_argument} --pairs {output_argument} --output-dir runs/labelled"
    )


def _relative_path(path: Path) -> str:
    """Return a path relative to the current folder if it is inside, otherwise the absolute path."""
    here, path = Path.cwd(), path.absolute()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
