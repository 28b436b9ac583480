"""Image statistics: known values, and the same from files as from images in memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from dpo_mm.evaluation.image_statistics import image_statistics
from dpo_mm.evaluation.image_store import COMPRESS_LEVEL, ImageFiles
from tests.conftest import noise_image


def test_statistics_of_plain_colours() -> None:
    """Mutation that it catches: channels in another order of maximum and minimum."""
    images = [Image.new("RGB", (32, 16), colour) for colour in ((200, 50, 100), (90, 90, 90), (0, 0, 0))]
    statistics = image_statistics(images)
    assert np.allclose(statistics.saturation, [0.75, 0, 0]) and np.allclose(statistics.sharpness, 0, atol=1e-6)
    assert statistics.small.shape == (3, 4, 8, 3) and tuple(statistics.small[0, 0, 0]) == (200, 50, 100)


def test_statistics_of_files_are_those_of_their_images(tmp_path: Path) -> None:
    """Mutations that it catches: results of threads in another order, and the size of another compression."""
    images = [noise_image(number, 64) for number in range(9)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png", compress_level=COMPRESS_LEVEL)
    files = ImageFiles([tmp_path / f"{number}.png" for number in range(9)])
    in_memory, on_disk = (dataclasses.astuple(image_statistics(sequence)) for sequence in (images, files))
    assert all(np.array_equal(one, other) for one, other in zip(in_memory, on_disk, strict=True))
