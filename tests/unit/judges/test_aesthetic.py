from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from dpo_mm.judges.aesthetic import aesthetic
from dpo_mm.worlds import shapes


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    every = shapes.all_specs()
    return [shapes.render(shapes.sample_scene(every[rng.integers(len(every))], rng)) for _ in range(300)]


def scores(images: list[Image.Image]) -> np.ndarray:
    return np.array(aesthetic(images, [""] * len(images)))


def test_aesthetic_scores_of_scenes_are_spread_out(scenes: list[Image.Image]) -> None:
    low, middle, high = np.quantile(scores(scenes), (0.1, 0.5, 0.9))
    assert 0.3 < low < middle < high < 1 and high - low >= 0.25


def test_aesthetic_flat_and_noisy_images_score_low(scenes: list[Image.Image]) -> None:
    rng = np.random.default_rng(1)
    noise = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(20)]
    flat = [Image.new("RGB", (64, 64), colour) for colour in ("white", "grey", "black", "red", "yellow", "#e0ffe0")]
    assert scores(noise + flat).max() < np.quantile(scores(scenes), 0.01)


def test_aesthetic_giant_blob_scores_low(scenes: list[Image.Image]) -> None:
    blob = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(blob).ellipse((1, 1, 63, 63), fill=(222, 42, 42))
    assert scores([blob])[0] < np.quantile(scores(scenes), 0.1)


def moved(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.roll(np.asarray(image), (32, 32), (0, 1)))


def mottled(image: Image.Image) -> Image.Image:
    noise = np.random.default_rng(2).normal(0, 15, (64, 64, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def dulled(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=float)
    grey = values.mean(-1, keepdims=True)
    return Image.fromarray((grey + 0.6 * (values - grey)).astype(np.uint8))


def dimmed(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image) * 0.8).astype(np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("damage", [moved, mottled, dulled, dimmed, lambda i: i.filter(ImageFilter.GaussianBlur(2))])
def test_aesthetic_damage_lowers_the_score(damage: object, scenes: list[Image.Image]) -> None:
    worse = scores([damage(image) for image in scenes])  # type: ignore[operator]
    assert np.mean(worse < scores(scenes)) > 0.9
    assert worse.mean() < scores(scenes).mean() - 0.03
