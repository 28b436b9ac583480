"""Clips: rows whose images have frames side by side, through encoding, comparing and the gallery."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from dpo_mm.config import CompareConfig, TrainConfig
from dpo_mm.data.clips import SHOWN, clip_frames, clip_image, clip_preview
from dpo_mm.data.image_files import encode_png
from dpo_mm.data.schema import make_image_rows
from dpo_mm.evaluation import compare_images as comparing
from dpo_mm.evaluation.image_sampling import ImageSampler, sampling_plan
from dpo_mm.evaluation.image_store import ImageStore
from dpo_mm.evaluation.saved_comparison import load_comparison
from dpo_mm.pages.gallery import saved_pair_html
from dpo_mm.policies.families import load_policy
from dpo_mm.training.encoding import encode
from dpo_mm.training.model_card import generating_lines, usage_code
from tests.conftest import noise_image, rows
from tests.contracts.families import BUILDERS, WORDS

FRAMES = 5
JUDGE = "tests.unit.evaluation.test_clips:first_frame"


def first_frame(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return [float(np.asarray(clip_frames(image, FRAMES)[0]).mean()) for image in images]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Any:
    policy: Any = load_policy(str(BUILDERS["wan"].build(tmp_path_factory.mktemp("wan"))), resolution=32)
    assert policy.frames == 81
    policy.frames = FRAMES
    return policy


def clip(number: int) -> Image.Image:
    return clip_image([noise_image(number + 100 * frame, 32) for frame in range(FRAMES)])


def test_preview_has_the_first_and_the_last_frame() -> None:
    frames = [Image.new("RGB", (4, 6), (number, 0, 0)) for number in range(9)]
    whole = clip_image(frames)
    assert whole.size == (36, 6) and [f.getpixel((0, 0)) for f in clip_frames(whole, 9)] == [
        (n, 0, 0) for n in range(9)
    ]
    shown = clip_frames(clip_preview(whole, 9), SHOWN)
    assert [frame.getpixel((3, 5)) for frame in shown] == [(0, 0, 0), (2, 0, 0), (4, 0, 0), (6, 0, 0), (8, 0, 0)]
    assert clip_preview(frames[0], 1) is frames[0]


def test_rows_with_clips_are_encoded_and_mirrored_frame_by_frame(video: Any, tmp_path: Path) -> None:
    """It catches a mirrored clip that runs backwards, and a row with another number of frames."""
    sides = [
        {f"image_{side}": {"bytes": encode_png(clip(2 * n + k)), "path": None} for k, side in enumerate("ab")}
        for n in range(2)
    ]
    made = [{**row, **images} for row, images in zip(rows(2), sides, strict=True)]
    cached = encode(video, make_image_rows(made), where="pairs", cache=tmp_path, flipped=True)
    chosen = clip_frames(clip(0), FRAMES)
    mean, _ = video.encode_images([clip_image(chosen), clip_image([ImageOps.mirror(frame) for frame in chosen])])
    assert mean.shape == (2, 4, 3, 16, 16)
    np.testing.assert_allclose(cached[0]["chosen_mean"], mean[0], atol=1e-5)
    np.testing.assert_allclose(cached[0]["chosen_mean_flipped"], mean[1], atol=1e-5)
    made[1]["image_b"] = {"bytes": encode_png(noise_image(1, 32)), "path": None}
    with pytest.raises(
        ValueError, match="row row-1 of pairs: its 32x32 pixels are not 5 frames of equal width side by side"
    ):
        encode(video, make_image_rows(made), where="pairs", cache=tmp_path)


def test_comparing_shows_frames_of_base_above_those_of_tuned(
    video: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It catches a clip of one frame, and a manifest that does not tell clips from images."""
    monkeypatch.setattr(comparing, "load_image_policy", lambda *_, **__: video)
    (tmp_path / "prompts.txt").write_text("\n".join(WORDS[:2]))
    common: dict[str, Any] = {"judges": (JUDGE,), "num_inference_steps": 2, "images_per_prompt": 1}
    config = CompareConfig(video.source, str(tmp_path / "out"), prompts=str(tmp_path / "prompts.txt"), **common)
    page = comparing.compare_images(config, title="t", command="c").report.read_text()
    assert "Frames of base above, of tuned below, from the same seed." in page
    assert page.count('<div class="pair clip">') == 2 and 'width="160" height="32"' in page
    sampler = ImageSampler(video, config, ImageStore(tmp_path / "pictures"))
    for scale, label in ((0.0, "base"), (1.0, "tuned")):
        sampler.generate(sampling_plan(config), scale=scale, label=label)
    (tmp_path / "metrics.json").write_text(json.dumps({"comparisons": []}))
    (first, _) = load_comparison(tmp_path, judges=[]).pairs
    assert first.frames == FRAMES and Image.open(first.base).size == (160, 32)
    assert saved_pair_html(first).count('<div class="figures">') == 2


def test_model_card_saves_a_clip() -> None:
    lines = ["from diffusers import DiffusionPipeline", 'pipe = "a pipeline"']
    code = lambda clips: usage_code(
        TrainConfig("-", "-", "run"), image_lines=[*lines, *generating_lines(edits=False, clips=clips)]
    )
    assert ".frames[0]" in code(True) and ".images" not in code(True)
    assert ".images[0]" in code(False)


def test_a_second_denoiser_is_refused(video: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video.pipe, "transformer_2", video.model)
    with pytest.raises(ValueError, match=r"two denoisers, .*as in Wan 2.2, are not supported\. Use Wan 2.1"):
        type(video)(video.pipe, "wan")
