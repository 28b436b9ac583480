"""Frozen work, done once: autoencoder posteriors and prompt embeddings of a preference set, in Arrow on disk.

Kept under a key of model, preprocessing and data, so that a second run starts at once. Written in shards, aside and
then renamed: a run that was cut short goes on with the shard it was at. The posterior's mean and standard deviation
are kept, not one sample of it, so that a fresh sample at each visit is exactly what encoding in the step would give.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from dpo_mm import pictures
from dpo_mm.collate import PairStream
from dpo_mm.config import TrainConfig
from dpo_mm.objectives import FROM_DATA
from dpo_mm.progress import progress
from dpo_mm.schema import decided, digest, load_pairs, load_responses, split_by_prompt

if TYPE_CHECKING:
    from datasets import Dataset

SHARD = 256


def cache_folder() -> Path:
    """Where encoded sets are kept: $DPO_MM_CACHE, or dpo-mm in the user's cache folder."""
    home = os.environ.get("DPO_MM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo-mm"
    return Path(home)


class EncodedPairs:
    """Encoded rows: id, chosen and rejected posterior (mean and std), the prompt's tensors, columns of FROM_DATA."""

    def __init__(self, folder: Path) -> None:
        from datasets import concatenate_datasets, load_from_disk

        self.folder = folder
        shards = sorted(folder.glob("pairs-*"))
        self.pairs = concatenate_datasets([load_from_disk(str(shard)) for shard in shards]).with_format("torch")  # type: ignore[type-var]
        texts = sorted(folder.glob("prompts-*"))
        self.prompts = concatenate_datasets([load_from_disk(str(shard)) for shard in texts]).with_format("torch")  # type: ignore[type-var]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = dict(self.pairs[number])
        row["prompt"] = self.prompts[int(row.pop("prompt_row"))]
        return row


def encode(
    policy: Any, rows: Dataset, *, where: str, on_bad_image: str = "raise", cache: Path | None = None
) -> EncodedPairs:
    """The decided pairs of `rows` as the policy takes them, from the cache where they are there.

    Raises ValueError that names set, row and fix where a picture does not decode, unless on_bad_image is "skip": then
    the row is left out and noted in quarantine.jsonl beside the encoded set.
    """
    if on_bad_image not in ("raise", "skip"):
        raise ValueError(f"on_bad_image {on_bad_image!r} is unknown; expected 'raise' or 'skip'")
    folder = (cache or cache_folder()) / "encoded" / _key(policy, rows)
    if not (folder / "complete.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _encode_prompts(policy, rows, folder)
        _encode_pairs(policy, rows, folder, where, on_bad_image)
        _write(folder / "complete.json", json.dumps({"source": where, "model": policy.source, "rows": len(rows)}))
    return EncodedPairs(folder)


def _key(policy: Any, rows: Dataset) -> str:
    return hashlib.sha256(f"{policy.fingerprint()} {rows._fingerprint} v1".encode()).hexdigest()[:24]


def _shards(total: int) -> Iterator[tuple[int, range]]:
    for number, start in enumerate(range(0, total, SHARD)):
        yield number, range(start, min(start + SHARD, total))


def _encode_prompts(policy: Any, rows: Dataset, folder: Path) -> None:
    names = sorted(set(rows["prompt"]))
    with progress("encoding prompts", len(names)) as advance:
        for number, part in _shards(len(names)):
            place = folder / f"prompts-{number:05}"
            if not place.exists():
                tensors = policy.encode_prompts([names[i] for i in part])
                _keep(place, {k: (v.float() if v.is_floating_point() else v).numpy() for k, v in tensors.items()})
            advance(len(part))


def _encode_pairs(policy: Any, rows: Dataset, folder: Path, where: str, on_bad_image: str) -> None:
    from datasets import Image

    for column in ("image_a", "image_b"):
        rows = rows.cast_column(column, Image(decode=False))
    index = {name: n for n, name in enumerate(sorted(set(rows["prompt"])))}
    optional = _data_columns(rows)
    with progress("encoding pictures", len(rows)) as advance:
        for number, part in _shards(len(rows)):
            place = folder / f"pairs-{number:05}"
            if not place.exists():
                good = list(_readable(rows.select(part), where, on_bad_image, folder))
                if good:
                    _keep(place, _columns(policy, good, index, optional))
            advance(len(part))
    if not any(folder.glob("pairs-*")):
        raise ValueError(
            f"{where}: no pair is left; every row has a picture that does not decode, see {folder / 'quarantine.jsonl'}"
        )


def _readable(rows: Dataset, where: str, on_bad_image: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Rows with their pictures decoded, and the side that won first."""
    for row in rows:
        sides = ("image_a", "image_b") if row["preference"] == "a" else ("image_b", "image_a")
        decoded: list[Any] = []
        for column in sides:
            try:
                decoded.append(pictures.decode(_bytes(row[column])))
            except (ValueError, OSError) as error:
                reason = f"row {row['id']} of {where}: {column} does not decode ({error})"
                if on_bad_image == "raise":
                    raise ValueError(f"{reason}; drop it with --on-bad-image skip") from None
                _note(folder / "quarantine.jsonl", {"row": row["id"], "column": column, "reason": str(error)})
                break
        if len(decoded) == 2:
            yield {**row, "pictures": decoded}


def _bytes(cell: dict[str, Any] | None) -> bytes:
    if not cell or (not cell.get("bytes") and not cell.get("path")):
        raise ValueError("it is missing")
    return cell["bytes"] or Path(cell["path"]).read_bytes()


def _data_columns(rows: Dataset) -> dict[str, list[float]]:
    """Columns of FROM_DATA that every row can fill, by id: the winner's probability and the judged margin."""
    wanted = {"probability": _probability, "score_margin": _score_margin}
    assert set(wanted) == set(FROM_DATA)
    plain = rows.select_columns(["preference", "p_a", "votes_a", "votes_b", "score_a", "score_b"])
    filled = {name: [function(row) for row in plain] for name, function in wanted.items()}
    ids = rows["id"]
    return {name: dict(zip(ids, values, strict=True)) for name, values in filled.items() if None not in values}  # type: ignore[misc]


def _probability(row: dict[str, Any]) -> float | None:
    p = row["p_a"]
    if p is None and row["votes_a"] is not None and row["votes_b"] is not None and row["votes_a"] + row["votes_b"]:
        p = row["votes_a"] / (row["votes_a"] + row["votes_b"])
    if p is None:
        return None
    return p if row["preference"] == "a" else 1 - p


def _score_margin(row: dict[str, Any]) -> float | None:
    if row["score_a"] is None or row["score_b"] is None:
        return None
    difference = row["score_a"] - row["score_b"]
    return difference if row["preference"] == "a" else -difference


def _columns(
    policy: Any, rows: Sequence[dict[str, Any]], index: dict[str, int], optional: dict[str, Any]
) -> dict[str, Any]:
    columns: dict[str, Any] = {"id": [row["id"] for row in rows], "prompt_row": [index[row["prompt"]] for row in rows]}
    for place, side in enumerate(("chosen", "rejected")):
        parts = [
            policy.encode_images([row["pictures"][place] for row in rows[i : i + 32]]) for i in range(0, len(rows), 32)
        ]
        columns[f"{side}_mean"] = torch.cat([mean for mean, _ in parts]).numpy()
        columns[f"{side}_std"] = torch.cat([std for _, std in parts]).numpy()
    for name, values in optional.items():
        columns[name] = [values[row["id"]] for row in rows]
    return columns


def _keep(place: Path, columns: dict[str, Any]) -> None:
    """Write columns as an Arrow set, aside and then under its name; arrays keep their shape."""
    from datasets import Array2D, Array3D, Dataset, Features, List, Value

    kinds: dict[str, Any] = {}
    for name, values in columns.items():
        if isinstance(values, np.ndarray):
            shape, kind = values.shape[1:], str(values.dtype)
            arrays = {2: Array2D, 3: Array3D}
            kinds[name] = (
                arrays[len(shape)](shape, kind) if len(shape) in arrays else List(Value(kind), length=shape[0])
            )
        else:
            kinds[name] = Value({str: "string", int: "int64", float: "float64"}[type(values[0])])
    aside = place.with_name(f".{place.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        Dataset.from_dict({k: list(v) for k, v in columns.items()}, features=Features(kinds)).save_to_disk(str(aside))
        aside.rename(place)
    except OSError as error:
        if place.exists():  # another run encodes the same set at the same time, and was first
            return
        raise OSError(
            error.errno, f"could not write {place}: {error.strerror or error}; free space or set DPO_MM_CACHE"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    aside.replace(path)


def _note(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


class Sets(NamedTuple):
    """Encoded pairs to train on, those to watch (or None), and a digest of what they were made from."""

    rows: Any
    watched: Any
    digest: str


def encoded_sets(policy: Any, config: TrainConfig) -> Sets:
    """The config's pairs to train on and, of other prompts, those to watch. Raises ValueError as `encode` does.

    A policy that encodes its rows itself (text) keeps them in memory; pictures go through the cache.
    """
    if hasattr(policy, "encode"):
        pairs = load_responses(config.pairs)
        inside, apart = split_by_prompt(pairs, config.eval_fraction, seed=config.seed)
        return Sets(policy.encode(inside), None if apart is None else policy.encode(apart), digest(pairs))
    pairs = decided(load_pairs(config.pairs))
    rows, apart = split_by_prompt(pairs, config.eval_fraction, seed=config.seed)
    take = functools.partial(encode, policy, where=config.pairs, on_bad_image=config.on_bad_image)
    return Sets(take(rows), None if apart is None else take(apart), digest(pairs))


class WithReference:
    """Encoded rows with the reference's log-probs at each of K fixed visits, (K,) a side."""

    def __init__(self, rows: Any, chosen: torch.Tensor, rejected: torch.Tensor) -> None:
        self.rows, self.chosen, self.rejected = rows, chosen, rejected

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        kept = {"reference_chosen": self.chosen[number], "reference_rejected": self.rejected[number]}
        return {**self.rows[number], **kept}


@torch.no_grad()
def keep_reference(policy: Any, stream: PairStream, config: TrainConfig) -> WithReference:
    """The reference's log-probs of a stream's rows at each of its K fixed draws, asked once, before training.

    Asked in batches of training's size, the last one filled up with rows that were asked already: a row's numbers are
    then those that a reference asked in the step would give, bit for bit where arithmetic doesn't depend on the place
    in a batch.
    """
    device = next(policy.model.parameters()).device
    rows, size, total = stream.rows, config.batch_size, len(stream.rows) * stream.draws
    fixed = dataclasses.replace(stream, length=total, shuffle=False)
    sides = torch.empty(2, stream.draws, len(rows))
    off = policy.adapter_off() if config.tuning == "lora" else contextlib.nullcontext()
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
    mixed = torch.autocast(device.type, half, enabled=half is not None)
    with off, mixed, progress("asking the reference", total) as advance:
        for start in range(0, total, size):
            numbers = [n % total for n in range(start, start + size)]
            batch = policy.collate([fixed[n] for n in numbers])
            found = policy.log_probs(policy.model, _moved(batch, device))
            for side, values in zip(sides, (found.chosen, found.rejected), strict=True):
                side.view(-1)[torch.tensor(numbers)] = values.float().cpu()
            advance(min(size, total - start))
    return WithReference(rows, sides[0].T.contiguous(), sides[1].T.contiguous())


def _moved(batch: Any, device: torch.device) -> Any:
    from accelerate.utils import send_to_device

    return send_to_device(batch, device)
