"""Encoded response pairs: in memory if they are small, else encoded in the step that uses them.

A row of a vision-language model at real size takes some 20 MiB once encoded, so a large dataset does not fit in memory. Its
rows stay in the dataset's file. Before the first step, their texts are encoded and the headers of their images are read, so
that a row that is too long or not valid is named at once. The lengths are cached on disk.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dpo_mm.config import TrainConfig
from dpo_mm.data.load_pairs import UndecodableImageError, UndecodedRows, decode_prompt_images, undecoded_rows
from dpo_mm.data.row_digest import row_digests
from dpo_mm.files.checksums import with_checksum, without_checksum
from dpo_mm.files.content_key import content_hash, content_key, library_versions
from dpo_mm.files.resumable import atomic_write, set_aside
from dpo_mm.policies.protocol import TextPolicy
from dpo_mm.printing.progress import progress_bar
from dpo_mm.process.process_rank import process_rank
from dpo_mm.training.coupled_rows import CoupledRows
from dpo_mm.training.training_rows import TrainingRows, liked_and_disliked, load_training_rows

if TYPE_CHECKING:
    from datasets import Dataset

    from dpo_mm.policies.vlm.row_sizes import RowSize

logger = logging.getLogger(__name__)

QUARANTINE = "quarantine.jsonl"
FIELDS = ("row", "column", "reason")
"""Keys of a line of QUARANTINE."""
MAX_BYTES_IN_MEMORY = 256 * 2**20
"""Size of all encoded rows above which they are encoded in the steps that use them."""
SAMPLED_ROWS = 4
"""Rows that are encoded to estimate the size of all."""
ROWS_PER_PROCESS = 1000
"""Rows from which another process helps to measure lengths."""
MAX_PROCESSES = 8


class EncodedSplits(NamedTuple):
    """Encoded training pairs, encoded evaluation pairs or None, and what decided them.

    Attributes:
        digest: of the dataset.
        encoded_digest: of encoded text, "" for images, whose cache has a key.
        row_digests: returns the digests of the response pairs with an id.
    """

    rows: Any
    eval_rows: Any
    digest: str
    encoded_digest: str = ""
    row_digests: Callable[[str], list[str]] | None = None


class StreamedRows:
    """Response pairs that are encoded when they are used, by number.

    A row whose image does not decode raises, see `dropped_rows`.

    Args:
        policy: encodes the rows.
        rows: the dataset, as stored.
        numbers: rows to use.
        lengths: tokens of each of them.
        content_digest: hash of the dataset and of the token ids of their texts.
        config: its `pairs` name the dataset.
    """

    def __init__(
        self,
        policy: TextPolicy,
        rows: Dataset,
        *,
        numbers: Sequence[int],
        lengths: Sequence[int],
        content_digest: str,
        config: TrainConfig,
    ) -> None:
        self.policy, self.rows, self.numbers, self.lengths = policy, UndecodedRows(rows), numbers, lengths
        self.content_digest, self.config = content_digest, config

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number >= len(self):
            raise IndexError(number)
        for place in range(number, number + len(self)):
            row = self.rows[self.numbers[place % len(self)]]
            images = decode_prompt_images(row, self.config.pairs)
            if encoded := self.policy.encode([{**row, "images": images}]):  # else it is too long after all
                return encoded[0]
        raise ValueError(f"{self.config.pairs}: every row is longer than max_length. Raise it")

    def ids(self) -> list[str]:
        """Return the ids of the rows, in order."""
        names = self.rows.others["id"][:]
        return [str(names[number]) for number in self.numbers]


def encode_responses(
    policy: TextPolicy,
    config: TrainConfig,
    cache: Path,
    recorded: Sequence[Mapping[str, Any]] = (),
    *,
    loaded: TrainingRows | None = None,
) -> EncodedSplits:
    """Encode the training pairs of a config, and evaluation pairs of other prompts.

    Args:
        policy: the model.
        config: settings of the run.
        cache: folder for the lengths of rows that are encoded later.
        recorded: rows that the run has dropped until its checkpoint. They stay dropped, and their digests count.
        loaded: the rows, if they are loaded already.

    Raises:
        ValueError: if a row is too long or not valid, or no row is left.
    """
    loaded = loaded or load_training_rows(config, modality="text")
    pairs, apart = loaded.every, loaded.evaluation
    splits = [part for part in (loaded.train, apart) if part is not None]
    if loaded.kind == "liked":
        splits = [rows for part in splits for rows in liked_and_disliked(part)]
    dropped: list[str] = []
    digests = row_digests(pairs, recorded)
    content, of_rows = content_hash(digests), np.array(digests, dtype=np.bytes_)
    if estimated_bytes(policy, pairs, config) > MAX_BYTES_IN_MEMORY:
        encoded: list[Any] = [
            stream_rows(policy, part, config, cache, content=[content, number], dropped=dropped)
            for number, part in enumerate(splits)
        ]
        hashes: Any = [part.content_digest for part in encoded]
    else:
        encoded = [policy.encode(_decoded(part, config, dropped)) for part in splits]
        hashes = encoded if apart is not None else [*encoded, None]
    if loaded.kind == "liked":
        encoded = [
            CoupledRows(*encoded[n : n + 2]) if all(encoded[n : n + 2]) else [] for n in range(0, len(encoded), 2)
        ]
    if not encoded[0]:
        raise ValueError(
            f"{config.pairs}: none of its {len(pairs)} rows is left to train on, because {len(dropped)} have an image that "
            "does not decode and the others are longer than max_length. Fix the images, or raise max_length"
        )
    if process_rank().is_first:
        before = [json.dumps({name: record[name] for name in FIELDS}) + "\n" for record in recorded]
        _list_dropped(Path(config.output_dir) / QUARANTINE, before or dropped)
    eval_rows = (encoded[1] or None) if apart is not None else None
    of_id = functools.partial(_digests_of, pairs, of_rows)
    return EncodedSplits(encoded[0], eval_rows, content, content_hash(hashes), of_id)


def _digests_of(pairs: Dataset, digests: np.ndarray, row: str) -> list[str]:
    """Digests of the rows with an id."""
    return [digests[number].decode() for number, name in enumerate(pairs["id"]) if name == row]


def estimated_bytes(policy: TextPolicy, pairs: Dataset, config: TrainConfig) -> int:
    """Estimate the bytes of all encoded rows from some rows that are spread over the dataset."""
    numbers = sorted({int(n) for n in np.linspace(0, len(pairs) - 1, SAMPLED_ROWS)})
    sizes = []
    for row in undecoded_rows(pairs.select(numbers)):
        try:
            images = decode_prompt_images(row, config.pairs)
            sizes += [encoded_bytes(each) for each in policy.encode([{**row, "images": images}])]
        except ValueError:
            continue  # it is named when its turn comes
    return int(np.mean(sizes or [0]) * len(pairs))


def encoded_bytes(value: Any) -> int:
    """Bytes of the tensors of an encoded row."""
    if isinstance(value, Mapping):
        return sum(encoded_bytes(part) for part in value.values())
    return value.nbytes if hasattr(value, "nbytes") else 0


def _decoded(rows: Dataset, config: TrainConfig, dropped: list[str]) -> Iterator[dict[str, Any]]:
    """Yield rows with decoded images. Those with an undecodable image raise, or are added to `dropped`."""
    for row in undecoded_rows(rows):
        try:
            yield {**row, "images": decode_prompt_images(row, config.pairs)}
        except UndecodableImageError as error:
            if config.undecodable_images == "raise":
                raise
            dropped.append(error.as_json_line())


def stream_rows(
    policy: TextPolicy,
    rows: Dataset,
    config: TrainConfig,
    cache: Path,
    *,
    content: Any,
    dropped: list[str],
) -> StreamedRows:
    """Measure rows, or read their lengths from the cache, and return them without the dropped ones.

    Args:
        policy: the model.
        rows: response pairs, as stored.
        config: settings of the run.
        cache: folder for the lengths.
        content: digest of the rows.
        dropped: receives a line for each dropped row with a broken image.

    Raises:
        ValueError: as `encode_responses`.
    """
    path = lengths_path(policy, config, cache, content=content)
    sizes = _measured(policy, rows, config, path)
    dropped += [size for size in sizes if isinstance(size, str)]
    numbers = [number for number, size in enumerate(sizes) if isinstance(size, list)]
    lengths = [sizes[number][0] for number in numbers]
    content_digest = content_hash([content, *(sizes[number][1] for number in numbers)])
    return StreamedRows(policy, rows, numbers=numbers, lengths=lengths, content_digest=content_digest, config=config)


def describe_lengths(lengths: Sequence[int]) -> str:
    """Describe the lengths of rows, in tokens."""
    if not lengths:
        return "no row is short enough"
    median, high = np.percentile(lengths, [50, 99])
    return f"median {median:,.0f}, 99 % have at most {high:,.0f}, longest {max(lengths):,}"


def _measured(policy: TextPolicy, rows: Dataset, config: TrainConfig, path: Path) -> list[Any]:
    """Length and text digest of each row. Dropped rows have None if they are too long, else the line that lists them."""
    try:
        if before := without_checksum(json.loads(path.read_text(encoding="utf-8"))):
            return before["sizes"]
    except (OSError, ValueError):
        pass  # none yet, or damaged: the rows are measured
    sizes = _measure_in_processes(policy, rows, drop=config.undecodable_images == "drop")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, fix="free space or set DPO_MM_CACHE") as temporary:
        temporary.write_text(json.dumps(with_checksum({"sizes": sizes})), encoding="utf-8")
    return sizes


def lengths_path(policy: TextPolicy, config: TrainConfig, cache: Path, *, content: Any) -> Path:
    """Return the path of the lengths of rows. A short row is encoded, because a template may print the date.

    Args:
        policy: the model. Its weights do not count.
        config: settings of the run.
        cache: folder of the cache.
        content: digest of the rows.
    """
    parts = {
        "model": policy.encoding_fingerprint(),
        "rows": content,
        "settings": [
            config.max_length,
            config.overlong_rows,
            config.undecodable_images,
            config.eval_fraction,
            config.seed,
        ],
        "example": _example(policy),
        "libraries": library_versions(),
    }
    return cache / "lengths" / f"{content_key('lengths of rows', parts)}.json"


def _example(policy: TextPolicy) -> list[Any] | None:
    try:
        size = policy.row_measure()({"id": "example", "images": [], "prompt": "a", "chosen": "b", "rejected": "c"})
    except ValueError:  # it is longer than max_length, like all rows
        return None
    return None if size is None else list(size)


def measure_row(
    measure: Callable[[Mapping[str, Any]], RowSize | None], row: Mapping[str, Any], *, drop: bool
) -> list[Any] | str | None:
    """Return [tokens, digest] of a row, None if it is dropped for its length, or the line that lists a broken image."""
    try:
        size = measure(row)
    except UndecodableImageError as error:
        if not drop:
            raise
        return error.as_json_line()
    return None if size is None else list(size)


class _Measured:
    """Sizes of rows as a dataset, so that a DataLoader spreads the work over processes."""

    def __init__(self, policy: TextPolicy, rows: Dataset, *, drop: bool) -> None:
        self.measure, self.rows, self.drop = policy.row_measure(), UndecodedRows(rows), drop

    def __len__(self) -> int:
        return len(self.rows.others)

    def __getitem__(self, number: int) -> Any:
        return measure_row(self.measure, self.rows[number], drop=self.drop)


def _measure_in_processes(policy: TextPolicy, rows: Dataset, *, drop: bool) -> list[Any]:
    from torch.utils.data import DataLoader

    helpers = min(len(rows) // ROWS_PER_PROCESS, os.cpu_count() or 1, MAX_PROCESSES)
    loader: Any = DataLoader(
        _Measured(policy, rows, drop=drop),  # type: ignore[arg-type]
        batch_size=64,
        num_workers=helpers if helpers > 1 else 0,
        collate_fn=list,
    )
    sizes: list[Any] = []
    with progress_bar("measuring rows", len(rows)) as advance:
        for batch in loader:
            sizes += batch
            advance(len(batch))
    return sizes


def _remove_list(path: Path) -> None:
    """Remove the list of an earlier run. A file with other contents is renamed."""
    try:
        is_list = all(json.loads(line).keys() == set(FIELDS) for line in path.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError, AttributeError):
        is_list = False
    if is_list:
        path.unlink()
    else:
        set_aside(path)


def _list_dropped(path: Path, dropped: Sequence[str]) -> None:
    if path.exists():
        _remove_list(path)
    if not dropped:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text("".join(dropped), encoding="utf-8")
    logger.warning("%d rows have an image that does not decode. See %s", len(dropped), path)
