"""Frozen work, done once: autoencoder posteriors and prompt embeddings of a preference set, in Arrow on disk.

Kept under a key of model, preprocessing and data, so that a second run starts at once. Written in shards, aside and
then renamed: a run that was cut short goes on with the shard it was at. The posterior's mean and standard deviation
are kept, not one sample of it, so that a fresh sample at each visit is exactly what encoding in the step would give.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dpo_mm import kept, pictures
from dpo_mm.config import TrainConfig
from dpo_mm.objectives import FROM_DATA
from dpo_mm.progress import progress
from dpo_mm.schema import decided, load_pairs, load_responses, split_by_prompt

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

    _check_sources(policy, rows, where)
    for column in ("image_a", "image_b", "image_source"):
        rows = rows.cast_column(column, Image(decode=False))
    index = {name: n for n, name in enumerate(sorted(set(rows["prompt"])))}
    optional = _data_columns(rows)
    with progress("encoding pictures", len(rows)) as advance:
        for number, part in _shards(len(rows)):
            place = folder / f"pairs-{number:05}"
            if not place.exists():
                good = list(_readable(rows.select(part), where, on_bad_image, folder, edits=policy.edits))
                if good:
                    _keep(place, _columns(policy, good, index, optional))
            advance(len(part))
    if not any(folder.glob("pairs-*")):
        raise ValueError(
            f"{where}: no pair is left; every row has a picture that does not decode, see {folder / 'quarantine.jsonl'}"
        )


def _check_sources(policy: Any, rows: Dataset, where: str) -> None:
    """Raises ValueError where a model that edits has no picture to edit, or one that doesn't edit has some."""
    given = [
        cell is not None
        for cell in rows.select_columns("image_source").with_format("arrow")["image_source"].to_pylist()
    ]
    kind = type(policy.pipe).__name__
    if policy.edits and not all(given):
        raise ValueError(
            f"row {rows['id'][given.index(False)]} of {where}: image_source is missing; {kind} edits a picture, and rows for it bring it"
        )
    if any(given) and not policy.edits:
        raise ValueError(
            f"{where}: rows have an image_source, which {kind} can't take; drop the column or train a model that edits"
        )


def _readable(
    rows: Dataset, where: str, on_bad_image: str, folder: Path, *, edits: bool = False
) -> Iterator[dict[str, Any]]:
    """Rows with their pictures decoded: the side that won, the other, and for a model that edits the source."""
    for row in rows:
        sides = ["image_a", "image_b"] if row["preference"] == "a" else ["image_b", "image_a"]
        sides += ["image_source"] if edits else []
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
        if len(decoded) == len(sides):
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
    for place, side in enumerate(("chosen", "rejected", "source")[: len(rows[0]["pictures"])]):
        pictures = [row["pictures"][place] for row in rows]
        parts = [policy.encode_images(pictures[i : i + 32]) for i in range(0, len(rows), 32)]
        columns[f"{side}_mean"] = torch.cat([mean for mean, _ in parts]).numpy()
        if side != "source":
            columns[f"{side}_std"] = torch.cat([std for _, std in parts]).numpy()
            columns |= {f"{side}_{name}": fact.numpy() for name, fact in policy.image_facts(pictures).items()}
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
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(
            error.errno, f"could not write {place}: {error.strerror or error}; free space or set DPO_MM_CACHE"
        ) from error
    aside.rename(place)


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    aside.replace(path)


def _note(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def encoded_sets(policy: Any, config: TrainConfig) -> tuple[Any, Any]:
    """The config's pairs to train on and, of other prompts, those to watch. Raises ValueError as `encode` does.

    A policy that encodes its rows itself (text) keeps them in memory; pictures go through the cache.
    """
    if hasattr(policy, "encode"):
        inside, apart = split_by_prompt(load_responses(config.pairs), config.eval_fraction, seed=config.seed)
        return policy.encode(inside), None if apart is None else policy.encode(apart)
    pairs = decided(load_pairs(config.pairs))
    rows, watched = split_by_prompt(pairs, config.eval_fraction, seed=config.seed)
    encoded = encode(policy, rows, where=config.pairs, on_bad_image=config.on_bad_image)
    if watched is None:
        return encoded, None
    return encoded, encode(policy, watched, where=config.pairs, on_bad_image=config.on_bad_image)


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
def keep_reference(policy: Any, rows: Any, config: TrainConfig, *, draws: int) -> WithReference:
    """The reference's log-probs of every row at its first `draws` visits, asked once, before training; of answers, which
    have no draws, once for all runs, see `dpo_mm.kept`."""
    place = kept.place_of(policy, rows, cache_folder()) if policy.exact else None
    if place and (before := kept.read(place)):
        return WithReference(rows, **before)
    device = next(policy.model.parameters()).device
    chosen, rejected = torch.empty(len(rows), draws), torch.empty(len(rows), draws)
    off = policy.adapter_off() if config.tuning == "lora" else contextlib.nullcontext()
    with off, progress("asking the reference", len(rows) * draws) as advance:
        for visit in range(draws):
            for start in range(0, len(rows), config.batch_size):
                part = range(start, min(start + config.batch_size, len(rows)))
                batch = policy.collate([{**rows[n], "visit": visit} for n in part])
                found = policy.log_probs(policy.model, _moved(batch, device))
                chosen[part.start : part.stop, visit] = found.chosen.cpu()
                rejected[part.start : part.stop, visit] = found.rejected.cpu()
                advance(len(part))
    if place:
        kept.write(place, chosen=chosen, rejected=rejected)
    return WithReference(rows, chosen, rejected)


def _moved(batch: Any, device: torch.device) -> Any:
    from accelerate.utils import send_to_device

    return send_to_device(batch, device)
