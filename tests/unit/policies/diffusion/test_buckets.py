"""Buckets by aspect ratio, and the scale and crop of a picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dpo_mm.policies.diffusion.buckets import bucket_for, buckets_of, cover


def test_buckets_are_those_of_sdxl_that_keep_its_area() -> None:
    found = buckets_of(1024, 8)
    assert len(found) == 17
    assert {(1024, 1024), (1152, 896), (1216, 832), (1344, 768), (832, 1216), (512, 2048)} <= set(found)


@pytest.mark.parametrize(("resolution", "unit"), [(1024, 16), (512, 8), (64, 2), (32, 8), (48, 16)])
def test_buckets_keep_area_unit_and_symmetry(resolution: int, unit: int) -> None:
    found = buckets_of(resolution, unit)
    assert (resolution, resolution) in found and len(found) >= 3
    for width, height in found:
        assert width % unit == height % unit == 0
        assert 0.75 * resolution**2 <= width * height <= resolution**2 or (unit / resolution > 0.2)
        assert width * height <= resolution**2 and (height, width) in found


def test_both_sides_share_the_bucket_between_them() -> None:
    buckets = buckets_of(1024, 8)
    assert bucket_for([(2000, 1000), (2000, 1000)], buckets) == (1472, 704)
    assert bucket_for([(2000, 1000), (1000, 2000)], buckets) == (1024, 1024)
    assert bucket_for([(300, 400), (300, 400)], buckets) == (896, 1152)
    assert bucket_for([(9000, 10), (9000, 10)], buckets) == (2048, 512)


@pytest.mark.parametrize("size", [(64, 64), (100, 40), (37, 91), (33, 1000), (31, 30)])
@pytest.mark.parametrize("frame", [(64, 64), (96, 40), (40, 96)])
def test_a_crop_covers_its_frame_from_the_centre(size: tuple[int, int], frame: tuple[int, int]) -> None:
    scaled, (left, top, right, bottom) = cover(size, frame)
    assert (right - left, bottom - top) == frame
    assert left >= 0 and top >= 0 and right <= scaled[0] and bottom <= scaled[1]
    assert abs(left - (scaled[0] - right)) <= 1 and abs(top - (scaled[1] - bottom)) <= 1
    assert min(scaled[0] - frame[0], scaled[1] - frame[1]) == 0


def test_a_square_is_cropped_as_it_always_was() -> None:
    """The shipped models' encodings depend on it."""
    image = Image.fromarray(np.arange(90 * 60 * 3, dtype=np.uint8).reshape(60, 90, 3))
    scale = 32 / 60
    old = image.resize((round(90 * scale), 32), Image.Resampling.LANCZOS).crop((8, 0, 40, 32))
    scaled, box = cover(image.size, (32, 32))
    assert np.array_equal(np.asarray(image.resize(scaled, Image.Resampling.LANCZOS).crop(box)), np.asarray(old))
