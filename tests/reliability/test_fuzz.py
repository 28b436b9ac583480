"""Ten thousand damaged pictures and rows: each is used rightly or refused with a reason; nothing crashes or hangs."""

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

PICTURES, SETS = 10_000, 300
MODES = {"PNG": ("RGB", "RGBA", "L", "P", "1", "I;16"), "JPEG": ("RGB", "CMYK", "L"), "GIF": ("P",), "BMP": ("RGB",),
         "TIFF": ("RGB", "CMYK", "F"), "PPM": ("RGB",), "ICO": ("RGBA",)}  # fmt: skip


def whole_files() -> list[bytes]:
    """A small file of each format and mode."""
    if features.check("webp"):
        MODES["WEBP"] = ("RGB", "RGBA")
    noise = np.random.default_rng(0).integers(0, 256, (16, 24), dtype=np.uint8)
    found = []
    for kind, modes in MODES.items():
        for mode in modes:
            image = (
                Image.fromarray(noise.astype(np.uint16) * 257)
                if mode == "I;16"
                else Image.fromarray(noise).convert(mode)
            )
            buffer = io.BytesIO()
            image.save(buffer, kind)
            found.append(buffer.getvalue())
    return found


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The file cut, flipped, stuffed, with a stretch doubled, zeroed, or under another's head."""
    whole = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(whole) + 1), rng.choice((1, 2, 4, 16, 64))
        kind = rng.randrange(6)
        if kind == 0:
            del whole[at:]
        elif kind == 1:
            for place in range(at, min(at + length, len(whole))):
                whole[place] ^= rng.randrange(1, 256)
        elif kind == 2:
            whole[at:at] = rng.randbytes(length)
        elif kind == 3:
            whole[at:at] = whole[at : at + length]
        elif kind == 4:
            whole[at : at + length] = bytes(min(length, len(whole) - at))
        else:
            whole[:8] = rng.choice(
                (
                    b"\x89PNG\r\n\x1a\n",
                    b"\xff\xd8\xff\xe0\0\x10JF",
                    b"GIF89a\1\0",
                    b"RIFF\xff\0\0\0",
                    b"II*\0\x08\0\0\0",
                )
            )
    return bytes(whole)


@pytest.mark.slow
def test_damaged_pictures_are_pictures_or_refused_with_a_reason() -> None:
    files, rng = whole_files(), random.Random(0)
    assert all(decode_image(file).mode == "RGB" for file in files)
    used = refused = 0
    for number in range(PICTURES):
        data = damaged(files[number % len(files)], rng)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = decode_image(data)
        except ValueError as error:
            assert str(error).strip(), data[:40]
            refused += 1
            continue
        assert image.mode == "RGB" and 0 < image.width * image.height <= MAX_PIXELS
        used += 1
    assert used > PICTURES / 20 and refused > PICTURES / 5, (used, refused)


STRANGE: list[Any] = [None, "", "x", "A", "b ", "left", 0, 1.5, True, [], {}, "tie\0", "é" * 5000, float("nan"), b"a"]


@pytest.mark.slow
@pytest.mark.parametrize("column", ["prompt", "preference", "image_a", "id", "p_a", "votes_a", "score_a"])
def test_damaged_rows_are_valid_or_refused_with_their_row(column: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = random.Random(column)
    for number in range(SETS):
        some: list[dict[str, Any]] = [dict(row) for row in rows(rng.randint(1, 4))]
        for _ in range(rng.randint(1, 2)):
            rng.choice(some)[column] = rng.choice(STRANGE)
        if rng.random() < 0.1:
            for row in some:
                row.pop(column, None)
        try:
            pq.write_table(pa.Table.from_pylist(some), tmp_path / f"{number}.parquet")
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
            continue
        try:
            found = load_pairs(str(tmp_path / f"{number}.parquet"))
        except ValueError as error:
            assert f"{number}.parquet" in str(error)
            continue
        assert set(found["preference"]) <= {"a", "b", "tie", "both_bad"} and len(found) == len(some)
        assert all(isinstance(prompt, str) for prompt in found["prompt"])


def test_what_is_refused_in_a_run_is_quarantined_with_its_reason(tiny_model: str, tmp_path: Path) -> None:
    files, rng = whole_files(), random.Random(1)
    some = [dict(row) for row in rows(60)]
    for number, row in enumerate(some):
        row["image_a"] = {"bytes": damaged(files[number % len(files)], rng), "path": None}
        row["preference"] = "a"
    kept = encode(
        load_policy(tiny_model), make_image_rows(some), where="fuzz", undecodable_images="drop", cache=tmp_path
    )
    noted = [json.loads(line) for line in next(tmp_path.rglob("quarantine.jsonl")).read_text().splitlines()]
    assert len(kept) + len(noted) == len(some) and len(kept) > 0 and len(noted) > 0
    assert all(one["reason"] for one in noted)
