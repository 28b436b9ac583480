"""Scores of a judge for a folder of pictures or a preference set, as Parquet: one row a picture.

Prompts come from metadata.jsonl in the folder ({"file_name": ..., "prompt": ...}), from a text file beside each picture,
or from a list given, a prompt a line in the order of the pictures' names. A picture that does not decode has no score and
a reason. Finished shards are kept; a restarted run goes on after them. Processes share them (RANK of WORLD_SIZE).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from dpo_mm.config import JudgeConfig
from dpo_mm.data.image_files import decode_image, image_bytes
from dpo_mm.data.parquet import combine_shards
from dpo_mm.data.schema import load_pairs
from dpo_mm.judges import judge_card, load_judge
from dpo_mm.progress import progress_bar
from dpo_mm.resumable import atomic_write, check_settings_unchanged, exit_cleanly_on_sigterm, missing_shards

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Picture(NamedTuple):
    """A picture to score: its name, its prompt, and its file or its row and side in a set."""

    id: str
    prompt: str
    file: Path | None = None
    row: int = 0
    side: str = ""


class ScoreResult(NamedTuple):
    """The file written, how many pictures have a score, how many don't, and their mean score."""

    path: Path
    scored: int
    broken: int
    mean: float


def score(config: JudgeConfig) -> ScoreResult | None:
    """Score pictures as the config says; None where other processes have shards to finish yet.

    Raises ValueError for an unknown judge, pictures without prompts, or a folder begun with other settings.
    """
    load_judge(config.judge)
    pictures, rows = read_images(config.images, config.prompts)
    card, folder = judge_card(config.judge), Path(f"{config.output}.parts")
    plan = {"judge": config.judge, "images": config.images, "prompts": config.prompts, "pictures": len(pictures)}
    plan |= {"weights": card.get("weights") or card.get("code_sha256"), "shard_size": config.shard_size}
    check_settings_unchanged(folder, plan, done="judged", flag="output")
    shards = [pictures[i : i + config.shard_size] for i in range(0, len(pictures), config.shard_size)]
    places = [folder / f"shard-{number:05}.parquet" for number in range(len(shards))]
    left = missing_shards(places)
    if left:
        with exit_cleanly_on_sigterm(), progress_bar("judging", sum(len(shards[n]) for n in left)) as advance:
            for number in left:
                _write(_shard(shards[number], rows, config.judge), places[number])
                advance(len(shards[number]))
    if not all(place.exists() for place in places):
        return None
    path = combine_shards(places, Path(config.output), nothing="")
    path.with_suffix(".json").write_text(json.dumps(card, indent=1))
    return _counted(path)


def read_images(images: str, prompts: str | None) -> tuple[list[Picture], Dataset | None]:
    """The pictures of a folder, or of both sides of a preference set, with the set. Raises ValueError without prompts."""
    folder = Path(images)
    if folder.is_dir() and any(path.suffix.lower() in SUFFIXES for path in folder.iterdir()):
        return _of_folder(folder, prompts), None
    if prompts:
        raise ValueError(f"{images}: prompts are for a folder of pictures; a preference set has its own")
    rows = load_pairs(images)
    named = zip(rows["id"], rows["prompt"], strict=True)
    return [
        Picture(f"{name}/{side}", prompt, row=n, side=side) for n, (name, prompt) in enumerate(named) for side in "ab"
    ], rows


def _of_folder(folder: Path, prompts: str | None) -> list[Picture]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if prompts:
        lines = _text(Path(prompts)).splitlines()
        if len(lines) != len(files):
            raise ValueError(
                f"{prompts}: {len(lines)} prompts for {len(files)} pictures; expected a line for each, in order"
            )
        return [Picture(file.name, line.strip(), file) for file, line in zip(files, lines, strict=True)]
    known = _metadata(folder / "metadata.jsonl")
    pictures = []
    for file in files:
        beside = file.with_suffix(".txt")
        if file.name not in known and not beside.is_file():
            raise ValueError(
                f"{file}: no prompt; expected a line for it in metadata.jsonl, a {beside.name} beside it, or --prompts FILE"
            )
        prompt = known[file.name] if file.name in known else _text(beside).strip()
        pictures.append(Picture(file.name, prompt, file))
    return pictures


def _metadata(path: Path) -> dict[str, str]:
    found = {}
    for number, line in enumerate(_text(path).splitlines() if path.is_file() else [], start=1):
        try:
            row = json.loads(line)
            found[str(row["file_name"])] = str(row["prompt"] if "prompt" in row else row["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: expected {{'file_name': ..., 'prompt': ...}}") from error
    return found


def _text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected text")
    return path.read_text()


def _shard(pictures: Sequence[Picture], rows: Dataset | None, judge: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"id": one.id, "prompt": one.prompt, "judge": judge, "score": None, "error": None} for one in pictures
    ]
    decoded: list[tuple[int, Image.Image]] = []
    for place, one in enumerate(pictures):
        try:
            decoded.append((place, decode_image(_bytes(one, rows))))
        except (ValueError, OSError) as error:
            found[place]["error"] = str(error)
    scores = (
        load_judge(judge)([i for _, i in decoded], [pictures[place].prompt for place, _ in decoded]) if decoded else []
    )
    for (place, _), value in zip(decoded, scores, strict=True):
        found[place]["score"] = float(value)
    return found


def _bytes(one: Picture, rows: Dataset | None) -> bytes:
    if one.file:
        return one.file.read_bytes()
    assert rows is not None
    cell = rows.with_format("arrow")[one.row : one.row + 1].column(f"image_{one.side}")[0].as_py()
    return image_bytes(cell)


def _write(found: list[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.string()
    schema = pa.schema({"id": text, "prompt": text, "judge": text, "score": pa.float64(), "error": text})
    with atomic_write(path) as beside:
        pq.write_table(pa.Table.from_pylist(found, schema=schema), beside)


def _counted(path: Path) -> ScoreResult:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    scores = pq.read_table(path, columns=["score"])["score"]
    mean = pc.mean(scores).as_py()
    return ScoreResult(path, len(scores) - scores.null_count, scores.null_count, float("nan") if mean is None else mean)
