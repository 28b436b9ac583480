"""Scores of a judge for a folder of images or a preference dataset, as Parquet with one row per image.

Prompts come from metadata.jsonl in the folder ({"file_name": ..., "prompt": ...}), from a text file next to each image,
or from a text file with one prompt per line in the order of the file names. An image that does not decode has no score
and a reason. Finished shards stay on disk, and a restarted run skips them. Several processes (RANK of WORLD_SIZE) divide
the shards among them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from dpo_mm.config import JudgeConfig
from dpo_mm.data.image_files import IMAGE_SUFFIXES, decode_image, image_bytes, rgb_image
from dpo_mm.data.lazy_images import source_cells
from dpo_mm.data.load_pairs import source_counts
from dpo_mm.data.parquet import combine_shards
from dpo_mm.data.row_digest import digest
from dpo_mm.data.row_paths import MARK, is_regular
from dpo_mm.data.schema import load_pairs
from dpo_mm.data.text_files import read_lines
from dpo_mm.files.checksums import all_intact, missing_shards, saved_shards, write_with_checksum
from dpo_mm.files.content_key import content_hash, file_hash, library_versions
from dpo_mm.files.output_files import output_files, write_file
from dpo_mm.files.outputs import OutputKind, output_folder, settings_of
from dpo_mm.judges import check_outputs, judge_card, judge_digests, load_judge, takes_sources
from dpo_mm.judges.score_checks import image_scores
from dpo_mm.printing.progress import progress_bar
from dpo_mm.process.interruption import stop_on_signal

if TYPE_CHECKING:
    from datasets import Dataset

SCORING = OutputKind("scoring.json", "judged", flag="output")


class ImageToScore(NamedTuple):
    """An image to score.

    Attributes:
        id: file name, or row id and side ("row-0/a").
        prompt: its prompt.
        file: its file, or None for an image of a dataset.
        row, side: row number and side (a or b) in a dataset.
    """

    id: str
    prompt: str
    file: Path | None = None
    row: int = 0
    side: str = ""


class ScoreResult(NamedTuple):
    """The written file, the number of images with and without a score, and the mean score."""

    path: Path
    scored: int
    broken: int
    mean: float


def score(config: JudgeConfig) -> ScoreResult | None:
    """Score images with a judge and write a Parquet file, with the judge's card as JSON next to it.

    Returns:
        The result, or None if other processes still have unfinished shards.

    Raises:
        ValueError: if the judge is unknown, an image has no prompt, or the output is an input, a file of others or was
            started with other settings.
    """
    if not config.output.endswith(".parquet"):
        raise ValueError(f"output {config.output!r}: expected a file name that ends in .parquet")
    load_judge(config.judge)
    check_outputs(config.judge, "images")
    parts, output = Path(f"{config.output}.parts"), Path(config.output)
    files = output_files([output, output.with_suffix(".json")], inputs=[config.images, config.prompts])
    with stop_on_signal(lambda: saved_shards(parts)), files:
        images, rows = read_images(config.images, config.prompts)
        settings = settings_of("scores of images", ingredients(config, images, rows))
        with output_folder(parts, SCORING, settings, overwrite=config.overwrite):
            return _score(config, images, rows)


def _score(config: JudgeConfig, images: Sequence[ImageToScore], rows: Dataset | None) -> ScoreResult | None:
    """Write this process's shards that do not exist yet, and combine them when all exist."""
    folder, output = Path(f"{config.output}.parts"), Path(config.output)
    shards = [images[i : i + config.shard_size] for i in range(0, len(images), config.shard_size)]
    paths = [folder / f"shard-{number:05}.parquet" for number in range(len(shards))]
    missing = missing_shards(paths)
    if missing:
        with progress_bar("judging", sum(len(shards[n]) for n in missing)) as advance:
            for number in missing:
                _write(_score_shard(shards[number], rows, config.judge), paths[number])
                advance(len(shards[number]))
    if not all_intact(paths, Path(config.output)):
        return None
    with write_file(output, overwrite=config.overwrite) as temporary:
        combine_shards(paths, temporary, empty_message="")
    with write_file(output.with_suffix(".json"), overwrite=config.overwrite) as temporary:
        temporary.write_text(json.dumps(judge_card(config.judge), indent=1), encoding="utf-8")
    return _result(output)


def ingredients(config: JudgeConfig, images: Sequence[ImageToScore], rows: Dataset | None) -> dict[str, Any]:
    """Return what decides the scores of images, see `dpo_mm.files.content_key`."""
    if rows is not None:
        content = digest(rows.select_columns(scored_columns([config.judge])))
    else:
        files = [(image, image.file) for image in images if image.file]
        content = content_hash(
            [
                [image.id, image.prompt, file_hash(file) if is_regular(file, file.parent) else None]
                for image, file in files
            ]
        )
    return {
        "settings": {name: getattr(config, name) for name in ("judge", "images", "prompts", "shard_size")},
        "images": content,
        "judges": judge_digests([config.judge]),
        "libraries": library_versions(),
    }


def scored_columns(judges: Sequence[str]) -> list[str]:
    """Return the columns of a preference dataset that decide the scores of these judges."""
    edits = ["image_source"] if any(map(takes_sources, judges)) else []
    return ["id", "prompt", "image_a", "image_b", *edits]


def check_sources(rows: Dataset, judges: Sequence[str], *, name: str) -> None:
    """Check that every row has an image to edit if a judge takes one.

    Args:
        rows: rows of `image_preference`.
        judges: names of judges.
        name: name of the dataset, for the error.

    Raises:
        ValueError: if a row has none.
    """
    edits = next((judge for judge in judges if takes_sources(judge)), None)
    counts = source_counts(rows) if edits else []
    if 0 in counts:
        raise ValueError(
            f"{name}, row {counts.index(0)}: no image_source. Judge {edits!r} scores edits, so every row needs the image to edit. "
            "Add it, or leave this judge out"
        )


def read_images(images: str, prompts: str | None) -> tuple[list[ImageToScore], Dataset | None]:
    """List the images of a folder, or of both sides of a preference dataset, with their prompts.

    Args:
        images: a folder of images, or a preference dataset.
        prompts: text file with one prompt per line, for a folder.

    Returns:
        The images, and the dataset if they come from one.

    Raises:
        ValueError: if an image has no prompt, or prompts are passed for a dataset.
    """
    folder = Path(images)
    if folder.is_dir() and any(map(_is_image, folder.iterdir())):
        return _images_of_folder(folder, prompts), None
    if prompts:
        raise ValueError(
            f"{images}: --prompts is only for a folder of images. A preference dataset has its own prompts."
        )
    rows = load_pairs(images)
    ids_and_prompts = enumerate(zip(rows["id"], rows["prompt"], strict=True))
    return [
        ImageToScore(f"{row_id}/{side}", prompt, row=n, side=side)
        for n, (row_id, prompt) in ids_and_prompts
        for side in "ab"
    ], rows


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _images_of_folder(folder: Path, prompts: str | None) -> list[ImageToScore]:
    files = sorted(filter(_is_image, folder.iterdir()), key=_natural_order)
    if prompts:
        lines = _read_lines(Path(prompts))
        if len(lines) != len(files):
            raise ValueError(
                f"{prompts}: {len(lines)} prompts for {len(files)} images. Expected one line per image, in the order of "
                "the file names."
            )
        return [ImageToScore(file.name, line.strip(), file) for file, line in zip(files, lines, strict=True)]
    metadata = _read_metadata(folder / "metadata.jsonl") if is_regular(folder / "metadata.jsonl", folder) else {}
    images = []
    for file in files:
        text_file = file.with_suffix(".txt")
        if file.name not in metadata and not is_regular(text_file, folder):
            raise ValueError(
                f"{file}: no prompt. Add a line to metadata.jsonl, a file {text_file.name} next to the image, or pass "
                "--prompts FILE."
            )
        prompt = metadata[file.name] if file.name in metadata else "\n".join(_read_lines(text_file)).strip()
        images.append(ImageToScore(file.name, prompt, file))
    return images


def _read_metadata(path: Path) -> dict[str, str]:
    prompts = {}
    for number, line in enumerate(_read_lines(path), start=1):
        try:
            row = json.loads(line)
            prompts[str(row["file_name"])] = str(row["prompt"] if "prompt" in row else row["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: expected {{'file_name': ..., 'prompt': ...}}") from error
    return prompts


def _read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Expected a text file.")
    return read_lines(path)


def _score_shard(images: Sequence[ImageToScore], rows: Dataset | None, judge: str) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [
        {"id": image.id, "prompt": image.prompt, "judge": judge, "score": None, "error": None} for image in images
    ]
    decoded: list[tuple[int, Image.Image, list[Image.Image]]] = []
    edits = takes_sources(judge)
    for index, image in enumerate(images):
        try:
            decoded.append((index, decode_image(_encoded(image, rows)), _sources(image, rows) if edits else []))
        except (ValueError, OSError) as error:
            records[index]["error"] = str(error)
    if decoded:
        prompts = [images[index].prompt for index, _, _ in decoded]
        scores = image_scores(judge, [image for _, image, _ in decoded], prompts, [each for _, _, each in decoded])
        for (index, _, _), value in zip(decoded, scores, strict=True):
            records[index]["score"] = float(value)
    return records


def _sources(image: ImageToScore, rows: Dataset | None) -> list[Image.Image]:
    """Return the images to edit of a row, empty without one. Raises ValueError if it does not decode."""
    if rows is None:
        return []
    (row,) = rows.select_columns("image_source").with_format("arrow")[image.row : image.row + 1].to_pylist()
    try:
        return [rgb_image(cell) for cell in source_cells(row)]
    except ValueError as error:
        raise ValueError(f"image_source: {error}") from error


def _encoded(image: ImageToScore, rows: Dataset | None) -> bytes:
    if image.file:
        return image_bytes(f"{image.file.parent}{MARK}{image.file.name}")
    assert rows is not None
    cell = rows.with_format("arrow")[image.row : image.row + 1].column(f"image_{image.side}")[0].as_py()
    return image_bytes(cell)


def _write(records: list[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.string()
    schema = pa.schema({"id": text, "prompt": text, "judge": text, "score": pa.float64(), "error": text})
    with write_with_checksum(path) as temporary:
        pq.write_table(pa.Table.from_pylist(records, schema=schema), temporary)


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """Sort key in which 2.png comes before 10.png, as the lines of a prompt list do."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", path.name)]


def _result(path: Path) -> ScoreResult:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    scores = pq.read_table(path, columns=["score"])["score"]
    mean = pc.mean(scores).as_py()
    return ScoreResult(path, len(scores) - scores.null_count, scores.null_count, float("nan") if mean is None else mean)
