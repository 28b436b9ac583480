"""Aspect-ratio buckets, and the scale and crop of an image."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dpo_mm.policies.diffusion.buckets import bucket_for, buckets_of, cover


def test_buckets_of_1024_are_sdxl_sizes_of_about_its_area() -> None:
    buckets = buckets_of(1024, 8)
    assert len(buckets) == 17
    assert {(1024, 1024), (1152, 896), (1216, 832), (1344, 768), (832, 1216), (512, 2048)} <= set(buckets)


@pytest.mark.parametrize(("resolution", "unit"), [(1024, 16), (512, 8), (64, 2), (32, 8), (48, 16)])
def test_buckets_of_any_resolution_have_area_unit_and_symmetry(resolution: int, unit: int) -> None:
    buckets = buckets_of(resolution, unit)
    assert (resolution, resolution) in buckets and len(buckets) >= 3
    for width, height in buckets:
        assert width % unit == height % unit == 0
        assert 0.75 * resolution**2 <= width * height <= resolution**2 or (unit / resolution > 0.2)
        assert width * height <= resolution**2 and (height, width) in buckets


def test_bucket_for_pair_is_nearest_to_the_geometric_mean() -> None:
    buckets = buckets_of(1024, 8)
    assert bucket_for([(2000, 1000), (2000, 1000)], buckets) == (1472, 704)
    assert bucket_for([(2000, 1000), (1000, 2000)], buckets) == (1024, 1024)
    assert bucket_for([(300, 400), (300, 400)], buckets) == (896, 1152)
    assert bucket_for([(9000, 10), (9000, 10)], buckets) == (2048, 512)


@pytest.mark.parametrize("size", [(64, 64), (100, 40), (37, 91), (33, 1000), (31, 30)])
@pytest.mark.parametrize("target", [(64, 64), (96, 40), (40, 96)])
def test_cover_crops_the_target_size_from_the_centre(size: tuple[int, int], target: tuple[int, int]) -> None:
    scaled, (left, top, right, bottom) = cover(size, target)
    assert (right - left, bottom - top) == target
    assert left >= 0 and top >= 0 and right <= scaled[0] and bottom <= scaled[1]
    assert abs(left - (scaled[0] - right)) <= 1 and abs(top - (scaled[1] - bottom)) <= 1
    assert min(scaled[0] - target[0], scaled[1] - target[1]) == 0


def test_cover_square_matches_the_bundled_models_encodings() -> None:
    """The encodings of the bundled models depend on it."""
    image = Image.fromarray(np.arange(90 * 60 * 3, dtype=np.uint8).reshape(60, 90, 3))
    scale = 32 / 60
    expected = image.resize((round(90 * scale), 32), Image.Resampling.LANCZOS).crop((8, 0, 40, 32))
    scaled, box = cover(image.size, (32, 32))
    assert np.array_equal(np.asarray(image.resize(scaled, Image.Resampling.LANCZOS).crop(box)), np.asarray(expected))
