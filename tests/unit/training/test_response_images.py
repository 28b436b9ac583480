"""Images of response pairs are decoded like those of image pairs, and a row whose image does not decode is named or dropped."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from dpo_mm.config import TrainConfig
from dpo_mm.data.image_files import decode_image
from dpo_mm.data.load_pairs import decode_prompt_images, undecoded_rows
from dpo_mm.data.schema import load_responses, make_response_rows
from dpo_mm.policies.families import load_policy
from dpo_mm.training.encoding import encode_splits
from tests.contracts.tiny_vlms import noise_image, save


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def transparent() -> Image.Image:
    """Black strokes on a transparent ground, which `convert` alone turns into black on black."""
    pixels = np.zeros((56, 56, 4), np.uint8)
    pixels[10:20, 10:46, 3] = 255
    return Image.fromarray(pixels)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return file_of(noise_image(1).crop((0, 0, 56, 28)), exif=exif)


RAMP = np.tile(np.linspace(0, 65535, 56).astype(np.uint16), (56, 1))
FILES = {
    "RGBA": file_of(transparent()),
    "LA": file_of(transparent().convert("LA")),
    "palette": file_of(transparent().quantize()),
    "16 bits": file_of(Image.fromarray(RAMP)),
    "16 bits, TIFF": file_of(Image.fromarray(RAMP), "TIFF"),
    "float TIFF": file_of(Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF"),
    "phone": file_of(noise_image(0), "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16), "blue")]),
    "rotated": rotated(),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save("llava", tmp_path_factory.mktemp("llava") / "model")


def row(name: str, images: Any) -> dict[str, Any]:
    return {"id": name, "images": images, "prompt": f"describe {name}", "chosen": "a red square", "rejected": "text"}


def test_encode_decodes_every_format_like_image_pairs(model: str, tmp_path: Path) -> None:
    """Catches PIL's `convert("RGB")`, and images that `datasets` decodes on its own."""
    make_response_rows([row(name, [{"bytes": data, "path": None}]) for name, data in FILES.items()]).to_parquet(
        tmp_path / "pairs.parquet"
    )
    policy = load_policy(model)
    encoded = policy.encode(load_responses(str(tmp_path / "pairs.parquet")))
    assert [each["id"] for each in encoded] == list(FILES)
    for each, data in zip(encoded, FILES.values(), strict=True):
        expected = policy.processor.image_processor([decode_image(data)], return_tensors="pt")["pixel_values"]
        assert (each["images"]["pixel_values"] - expected).abs().max() < 1e-6, each["id"]


@pytest.mark.parametrize("column", ["paths", "bytes", "structs"])
def test_image_columns_of_other_layouts_are_decoded_too(column: str, tmp_path: Path) -> None:
    """Catches cells that `datasets` does not know as images."""
    (tmp_path / "a.png").write_bytes(FILES["RGBA"])
    cell = {"bytes": FILES["RGBA"], "path": None}
    columns: dict[str, tuple[str, Any, Any]] = {
        "paths": ("images", [str(tmp_path / "a.png")], List(Value("string"))),
        "bytes": ("images", [FILES["RGBA"]], List(Value("binary"))),
        "structs": ("images", [cell], List({"bytes": Value("binary"), "path": Value("string")})),
    }
    name, value, feature = columns[column]
    texts = Features({key: Value("string") for key in ("id", "prompt", "chosen", "rejected")})
    cells = {key: row("a", None)[key] for key in texts}
    rows = Dataset.from_list([{**cells, name: value}], features=Features({**texts, name: feature}))
    rows.to_parquet(tmp_path / "pairs.parquet")
    (loaded,) = undecoded_rows(load_responses(str(tmp_path / "pairs.parquet")))
    (image,) = decode_prompt_images(loaded, "pairs")
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((20, 15)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("cell", "reason"), [(None, "it is missing"), ({"bytes": file_of(noise_image(2))[:200], "path": None}, "truncated")]
)
def test_undecodable_image_names_the_row_or_drops_it(cell: Any, reason: str, model: str, tmp_path: Path) -> None:
    """Catches a null in the list of images that counts as no image, and `undecodable_images` without effect on text."""
    good = {"bytes": file_of(noise_image(0)), "path": None}
    text, images = Value("string"), List(ImageFeature())
    features = Features({"id": text, "images": images, "prompt": text, "chosen": text, "rejected": text})
    path, out = tmp_path / "pairs.parquet", tmp_path / "out"
    Dataset.from_list([row("r0", [good]), row("r1", [good, cell])], features=features).to_parquet(path)
    config = TrainConfig(model=model, pairs=str(path), output_dir=str(out), eval_fraction=0)
    policy: Any = load_policy(model)
    with pytest.raises(
        ValueError, match=rf"row r1 of .*: image 1 does not decode .*{reason}.*undecodable_images: drop"
    ):
        encode_splits(policy, config)
    assert [
        each["id"] for each in encode_splits(policy, dataclasses.replace(config, undecodable_images="drop")).rows
    ] == ["r0"]
    (dropped,) = map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())
    assert dropped["row"] == "r1" and dropped["column"] == "image 1" and reason in dropped["reason"]
