"""Inputs that gave a wrong result without a word: each is right now, or refused in one line."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from dpo_mm.config import TrainConfig
from dpo_mm.data.image_files import decode_image
from dpo_mm.data.schema import Response
from dpo_mm.judges.scoring import read_images
from dpo_mm.judges.text import anls, cer, wer
from dpo_mm.policies.families import load_policy


def test_misspelt_lora_target_of_an_image_model_is_named(tiny_model: str) -> None:
    """Catches to_kk, which diffusers ignores next to targets that exist."""
    config = TrainConfig(model=tiny_model, pairs="-", output_dir="-", lora_targets=("to_q", "to_kk", "to_v"))
    with pytest.raises(ValueError, match="no module is called 'to_kk'; did you mean 'to_k'"):
        load_policy(tiny_model).prepare(config)


@pytest.mark.parametrize("change", [{"in_channels": 9}, {"in_channels": 8}, {"time_cond_proj_dim": 16}])
def test_unet_with_other_inputs_is_refused_by_name(change: dict[str, int], tiny_model: str, tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, **change})
    pipe.save_pretrained(tmp_path / "model")
    named = f"takes {change['in_channels']} input channels" if "in_channels" in change else "guidance embedding"
    for weights in (True, False):
        with pytest.raises(ValueError, match=named):
            load_policy(str(tmp_path / "model"), weights=weights)


def test_decode_image_takes_the_photo_of_a_file_with_a_preview() -> None:
    buffer, photo = io.BytesIO(), Image.new("RGB", (32, 16), "red")
    photo.save(buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 4))])
    assert decode_image(buffer.getvalue()).size == (32, 16)
    animated = io.BytesIO()
    photo.save(animated, "GIF", save_all=True, append_images=[Image.new("RGB", (32, 16), "blue")])
    with pytest.raises(ValueError, match="animated"):
        decode_image(animated.getvalue())


def test_text_judges_ignore_how_an_accent_is_encoded() -> None:
    """Catches an ANLS of 0.71 and a CER above 0 for the same text in NFC and NFD."""
    composed, decomposed = "caf\u00e9 cr\u00e8me", "cafe\u0301 cre\u0300me"
    for response, ground_truth in ((composed, decomposed), (decomposed, composed)):
        given = [Response(response, 3, False)]
        assert cer(given, [ground_truth])[0].hits == 0 and wer(given, [ground_truth])[0].hits == 0
        assert anls(given, [ground_truth])[0].hits == 1


def test_read_images_matches_prompts_in_the_order_of_numbers(tmp_path: Path) -> None:
    """Catches 10.png before 2.png: the prompts then belong to other images."""
    for number in range(12):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    (tmp_path / "prompts.list").write_text("".join(f"prompt {number}\n" for number in range(12)))
    images, _ = read_images(str(tmp_path), str(tmp_path / "prompts.list"))
    assert [image.prompt for image in images] == [f"prompt {Path(str(image.file)).stem}" for image in images]
    assert torch.tensor([int(Path(str(image.file)).stem) for image in images]).tolist() == list(range(12))
