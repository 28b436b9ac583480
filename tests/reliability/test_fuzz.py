"""Four thousand damaged images, and damaged rows.

Each is decoded correctly or rejected with a reason. Nothing crashes or hangs.
"""

from __future__ import annotations

import io
import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from dpo_mm.data.image_files import MAX_PIXELS, decode_image
from dpo_mm.data.schema import load_pairs, make_image_rows
from dpo_mm.policies.families import load_policy
from dpo_mm.training.encoding import encode
from tests.conftest import rows

NUM_IMAGES, NUM_DATASETS = 4_000, 40
MODES = {"PNG": ("RGB", "RGBA", "L", "P", "1", "I;16"), "JPEG": ("RGB", "CMYK", "L"), "GIF": ("P",), "BMP": ("RGB",),
         "TIFF": ("RGB", "CMYK", "F"), "PPM": ("RGB",), "ICO": ("RGBA",)}  # fmt: skip


def valid_files() -> list[bytes]:
    """A small image file of each format and mode."""
    if features.check("webp"):
        MODES["WEBP"] = ("RGB", "RGBA")
    noise = np.random.default_rng(0).integers(0, 256, (16, 24), dtype=np.uint8)
    files = []
    for kind, modes in MODES.items():
        for mode in modes:
            if mode == "I;16":
                image = Image.fromarray(noise.astype(np.uint16) * 257)
            elif mode == "F":  # floats from 0 to 1
                image = Image.fromarray(noise.astype(np.float32) / 255)
            else:
                image = Image.fromarray(noise).convert(mode)
            buffer = io.BytesIO()
            image.save(buffer, kind)
            files.append(buffer.getvalue())
    return files


def damage(data: bytes, rng: random.Random) -> bytes:
    """Damage a file one to four times.

    Each time it is truncated, bytes are changed, inserted, doubled or zeroed, or the header is replaced by another
    format's.
    """
    content = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start, length = rng.randrange(len(content) + 1), rng.choice((1, 2, 4, 16, 64))
        kind = rng.randrange(6)
        if kind == 0:
            del content[start:]
        elif kind == 1:
            for index in range(start, min(start + length, len(content))):
                content[index] ^= rng.randrange(1, 256)
        elif kind == 2:
            content[start:start] = rng.randbytes(length)
        elif kind == 3:
            content[start:start] = content[start : start + length]
        elif kind == 4:
            content[start : start + length] = bytes(min(length, len(content) - start))
        else:
            content[:8] = rng.choice(
                (
                    b"\x89PNG\r\n\x1a\n",
                    b"\xff\xd8\xff\xe0\0\x10JF",
                    b"GIF89a\1\0",
                    b"RIFF\xff\0\0\0",
                    b"II*\0\x08\0\0\0",
                )
            )
    return bytes(content)


@pytest.mark.slow
def test_damaged_images_decode_or_are_rejected_with_a_reason() -> None:
    files, rng = valid_files(), random.Random(0)
    assert all(decode_image(file).mode == "RGB" for file in files)
    decoded = rejected = 0
    for number in range(NUM_IMAGES):
        data = damage(files[number % len(files)], rng)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = decode_image(data)
        except ValueError as error:
            assert str(error).strip(), data[:40]
            rejected += 1
            continue
        assert image.mode == "RGB" and 0 < image.width * image.height <= MAX_PIXELS
        decoded += 1
    assert decoded > NUM_IMAGES / 20 and rejected > NUM_IMAGES / 5, (decoded, rejected)


UNUSUAL_VALUES: list[Any] = [
    None,
    "",
    "x",
    "A",
    "b ",
    "left",
    0,
    1.5,
    True,
    [],
    {},
    "tie\0",
    "é" * 5000,
    float("nan"),
    b"a",
]


@pytest.mark.slow
@pytest.mark.parametrize("column", ["prompt", "preference", "image_a", "id", "p_a", "votes_a", "score_a"])
def test_damaged_rows_are_valid_or_rejected_with_the_file_name(column: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = random.Random(column)
    for number in range(NUM_DATASETS):
        table: list[dict[str, Any]] = [dict(row) for row in rows(rng.randint(1, 4))]
        for _ in range(rng.randint(1, 2)):
            rng.choice(table)[column] = rng.choice(UNUSUAL_VALUES)
        if rng.random() < 0.1:
            for row in table:
                row.pop(column, None)
        try:
            pq.write_table(pa.Table.from_pylist(table), tmp_path / f"{number}.parquet")
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
            continue
        try:
            pairs = load_pairs(str(tmp_path / f"{number}.parquet"))
        except ValueError as error:
            assert f"{number}.parquet" in str(error)
            continue
        assert set(pairs["preference"]) <= {"a", "b", "tie", "both_bad"} and len(pairs) == len(table)
        assert all(isinstance(prompt, str) for prompt in pairs["prompt"])


def test_skipped_rows_are_recorded_with_the_reason(tiny_model: str, tmp_path: Path) -> None:
    files, rng = valid_files(), random.Random(1)
    examples = [dict(row) for row in rows(60)]
    for number, row in enumerate(examples):
        row["image_a"] = {"bytes": damage(files[number % len(files)], rng), "path": None}
        row["preference"] = "a"
    encoded = encode(
        load_policy(tiny_model), make_image_rows(examples), where="fuzz", undecodable_images="drop", cache=tmp_path
    )
    skipped = [json.loads(line) for line in next(tmp_path.rglob("quarantine.jsonl")).read_text().splitlines()]
    assert len(encoded) + len(skipped) == len(examples) and len(encoded) > 0 and len(skipped) > 0
    assert all(record["reason"] for record in skipped)
