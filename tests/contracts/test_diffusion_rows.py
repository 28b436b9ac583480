"""Columns besides the two images and the prompt: sizes and crops for SDXL, the image to edit for Kontext."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dpo_mm.config import TrainConfig
from dpo_mm.data.image_files import encode_png
from dpo_mm.data.schema import make_image_rows, split_by_prompt
from dpo_mm.policies.adapters import check_lora_format
from dpo_mm.policies.families import load_policy
from dpo_mm.training.encoding import encode
from dpo_mm.training.run import train
from tests.conftest import noise_image, rows
from tests.contracts.families import BUILDERS, WORDS
from tests.contracts.test_diffusion import config, first_step


@pytest.fixture(scope="module")
def sdxl(folders: Callable[[str], str]) -> str:
    return folders("sdxl")


@pytest.fixture(scope="module")
def kontext(folders: Callable[[str], str]) -> str:
    return folders("flux-kontext")


def cell(image: Image.Image) -> dict[str, Any]:
    return {"bytes": encode_png(image), "path": None}


def edit_rows(count: int) -> list[dict[str, Any]]:
    return [{**row, "image_source": cell(noise_image(300 + n))} for n, row in enumerate(rows(count))]


def test_sdxl_conditioning_equals_the_upstream_pipelines(sdxl: str) -> None:
    policy, row = load_policy(sdxl), BUILDERS["sdxl"]
    sizes = {"original_size": (48, 40), "crops_coords_top_left": (3, 2), "target_size": (32, 24)}
    expected, timestep, latents, _ = first_step(policy, row, {"prompt": WORDS[:1], "num_inference_steps": 3, **sizes})
    prompt = policy.encode_prompts(WORDS[:1])
    size_conditioning = torch.tensor([[48.0, 40, 3, 2, 32, 24]])
    with torch.no_grad():
        ours = policy.denoise(
            policy.model, latents, torch.as_tensor(timestep)[None], {**prompt, "frame": size_conditioning}
        )
        uncropped = policy.denoise(policy.model, latents, torch.as_tensor(timestep)[None], prompt)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert (uncropped - expected).abs().max() > 1e-3


def test_sdxl_rows_have_the_size_and_crop_of_each_image(sdxl: str, tmp_path: Path) -> None:
    policy = load_policy(sdxl)
    policy.prepare(config())
    wide = noise_image(5, 64).resize((96, 64))
    row = {**rows(1)[0], "image_b": cell(wide), "preference": "a"}
    cached = encode(policy, make_image_rows([row]), where="pairs", cache=tmp_path)
    assert cached[0]["chosen_frame"].tolist() == [32, 32, 0, 0, 32, 32]
    assert cached[0]["rejected_frame"].tolist() == [64, 96, 0, 8, 32, 32]
    expected = np.asarray(wide.resize((48, 32), Image.Resampling.LANCZOS).crop((8, 0, 40, 32)))
    assert np.array_equal(np.asarray(policy.resize_and_crop(wide)), expected)
    batch = policy.collate([{**cached[0], "visit": 0}])
    log_probs = policy.log_probs(policy.model, batch)
    batch_without_sizes = {name: value for name, value in batch.items() if not name.endswith("_frame")}
    default_log_probs = policy.log_probs(policy.model, batch_without_sizes)
    assert torch.equal(log_probs.chosen, default_log_probs.chosen) and not torch.equal(
        log_probs.rejected, default_log_probs.rejected
    )


def test_sdxl_autoencoder_encodes_in_float32_in_a_float16_pipeline(sdxl: str) -> None:
    policy = load_policy(sdxl, precision="fp16")
    mean, std = policy.encode_images([noise_image(0)])
    assert policy.vae.dtype == torch.float16
    with torch.no_grad():
        expected = policy.vae.float().encode(policy.pixels(noise_image(0))[None]).latent_dist
    assert torch.equal(mean, expected.mean) and torch.equal(std, expected.std)


def test_image_to_edit_reaches_the_denoiser(kontext: str, tmp_path: Path) -> None:
    policy = load_policy(kontext, resolution=32)
    policy.prepare(config())
    cached = encode(policy, make_image_rows(edit_rows(2)), where="pairs", cache=tmp_path)
    mean, _ = policy.encode_images([noise_image(300), noise_image(301)])
    torch.testing.assert_close(torch.stack([cached[n]["source_mean"] for n in (0, 1)]), mean, atol=1e-6, rtol=0)
    batch = policy.collate([{**cached[n], "visit": 0} for n in (0, 1)])
    torch.testing.assert_close(batch["prompt"]["source"], policy.latent_scale.normalise(mean), atol=1e-6, rtol=0)
    other = {**batch, "prompt": {**batch["prompt"], "source": batch["prompt"]["source"].flip(0)}}
    assert not torch.equal(policy.log_probs(policy.model, batch).chosen, policy.log_probs(policy.model, other).chosen)


@pytest.mark.parametrize("family", ["flux2-dev", "flux2-klein"])
def test_flux2_edits_as_upstream_and_each_prompt_its_image(
    family: str, folders: Callable[[str], str], tmp_path: Path
) -> None:
    """It catches sources at one time, only the first source, one prompt's sources for all, and rows of which some have one."""
    row = dataclasses.replace(BUILDERS[family], size=64)
    policy = load_policy(folders(family), resolution=64)
    policy.prepare(config())
    images = [noise_image(300 + n, 64) for n in range(2)]
    arguments = {"prompt": WORDS[:1], "num_inference_steps": 3, "image": images}
    expected, timestep, latents, _ = first_step(policy, row, arguments)
    latents, expected = (row.unpack(policy.pipe, value, 64) for value in (latents, expected))
    first, second = policy.latent_scale.normalise(policy.encode_sources(images)).split(1)
    prompt = policy.encode_prompts(WORDS[:1])
    with torch.no_grad():
        ours, edit_of_one, unedited = (
            policy.denoise(policy.model, latents, torch.as_tensor(timestep)[None], prompt | more)
            for more in ({"source": first, "source_2": second}, {"source": first}, {})
        )
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(unedited, expected, atol=1e-3) and not torch.allclose(edit_of_one, expected, atol=1e-3)
    both, one = (
        [
            np.asarray(i)
            for part in policy.sample(
                WORDS[:n], [5, 6][:n], steps=2, guidance=2.0, batch_size=2, sources=[[image] for image in images[:n]]
            )
            for i in part
        ]
        for n in (2, 1)
    )
    assert len(both) == 2 and np.array_equal(both[0], one[0])
    edits = [
        {**each, "image_source": {"bytes": encode_png(image), "path": None}}
        for each, image in zip(rows(2), images, strict=True)
    ]
    cached = encode(policy, make_image_rows(edits), where="pairs", cache=tmp_path)
    torch.testing.assert_close(cached[0]["source_mean"], policy.encode_images(images[:1])[0][0], atol=1e-5, rtol=0)
    several = [
        {**edits[0], "image_source": [cell(image) for image in images]},
        {**edits[1], "image_source": [cell(images[1])]},
    ]
    mixed = encode(policy, make_image_rows(several), where="pairs", cache=tmp_path)
    assert [list(bucket) for bucket in mixed.buckets] == [[0], [1]] and mixed.sizes == ["64x64", "64x64 2 sources"]
    with pytest.raises(ValueError, match="row row-1 of pairs: 1 images to edit, but others have 2"):
        encode(policy, make_image_rows(several), where="pairs", cache=tmp_path, one_sided=True)
    assert "source_2_mean" not in mixed[0] and mixed[1]["id"] == "row-0"
    torch.testing.assert_close(mixed[1]["source_2_mean"], policy.encode_images(images)[0][1], atol=1e-5, rtol=0)
    assert "source_mean" not in encode(policy, make_image_rows(rows(2)), where="pairs", cache=tmp_path)[0]
    with pytest.raises(
        ValueError, match=r"row row-1 of pairs: image_source is missing\. Other rows have an image to edit"
    ):
        encode(policy, make_image_rows([edits[0], rows(2)[1]]), where="pairs", cache=tmp_path)


def test_source_of_other_proportions_is_named_in_the_error(kontext: str, tmp_path: Path) -> None:
    """A chosen image of the target size may be the model's own edit of a cropped source."""
    wide = {"bytes": encode_png(noise_image(1, 96).crop((0, 0, 96, 48))), "path": None}
    policy = load_policy(kontext, resolution=32)
    made = [{**row, "image_source": wide} for row in rows(2)]
    assert len(encode(policy, make_image_rows(made), where="pairs", cache=tmp_path)) == 2
    large = {"bytes": encode_png(noise_image(2, 64)), "path": None}
    given = [{**row, "image_source": wide, "image_a": large, "image_b": large} for row in rows(2)]
    with pytest.raises(ValueError, match="row row-0 of pairs: image_source is 96x48, but the chosen image is 64x64"):
        encode(policy, make_image_rows(given), where="pairs", cache=tmp_path)


def test_missing_or_unused_source_images_are_named_in_the_error(kontext: str, tiny_model: str, tmp_path: Path) -> None:
    some = edit_rows(2)
    some[1]["image_source"] = None
    editor, plain = load_policy(kontext, resolution=32), load_policy(tiny_model)
    with pytest.raises(ValueError, match=r"row row-1 of pairs: image_source is missing. FluxKontextPipeline edits"):
        encode(editor, make_image_rows(some), where="pairs", cache=tmp_path)
    with pytest.raises(
        ValueError, match=r"pairs: rows have an image_source, which StableDiffusionPipeline does not use"
    ):
        encode(plain, make_image_rows(some), where="pairs", cache=tmp_path)
    drawing: dict[str, Any] = {"steps": 1, "guidance": 1.0, "batch_size": 1}
    with pytest.raises(ValueError, match="FluxKontextPipeline, which needs an image to edit per prompt"):
        next(editor.sample(WORDS[:1], [0], **drawing))
    with pytest.raises(ValueError, match="StableDiffusionPipeline, which takes no images to edit"):
        next(plain.sample(WORDS[:1], [0], sources=[[noise_image(0)]], **drawing))
    with pytest.raises(ValueError, match="FluxKontextPipeline, which takes one image to edit"):
        next(editor.sample(WORDS[:1], [0], sources=[[noise_image(0)] * 2], **drawing))
    several = [{**row, "image_source": [row["image_source"]] * (1 + n)} for n, row in enumerate(edit_rows(2))]
    with pytest.raises(
        ValueError, match="row row-1 of pairs: image_source has 2 images, but FluxKontextPipeline takes 1"
    ):
        encode(editor, make_image_rows(several), where="pairs", cache=tmp_path)
    several[0]["image_source"] = []
    with pytest.raises(ValueError, match="row row-0 of pairs: image_source is missing"):
        encode(editor, make_image_rows(several), where="pairs", cache=tmp_path)


def test_undecodable_source_image_is_named_in_the_error(kontext: str, tmp_path: Path) -> None:
    rows_with_source = edit_rows(2)
    rows_with_source[0]["image_source"] = {"bytes": b"<html>", "path": None}
    policy = load_policy(kontext, resolution=32)
    with pytest.raises(ValueError, match="row row-0 of pairs: image_source does not decode"):
        encode(policy, make_image_rows(rows_with_source), where="pairs", cache=tmp_path)
    remaining = encode(
        policy, make_image_rows(rows_with_source), where="pairs", cache=tmp_path, undecodable_images="drop"
    )
    assert len(remaining) == 1 and remaining[0]["id"] == "row-1"


def test_same_prompt_with_two_source_images_counts_as_two_prompts() -> None:
    same_prompt = [{**row, "prompt": "make it blue", "id": f"{n}"} for n, row in enumerate(edit_rows(10))]
    train_rows, eval_rows = split_by_prompt(make_image_rows(same_prompt), 0.3, seed=0)
    assert eval_rows is not None and len(eval_rows) == 3 and len(train_rows) == 7
    plain = [{k: v for k, v in row.items() if k != "image_source"} for row in same_prompt]
    assert split_by_prompt(make_image_rows(plain), 0.3, seed=0)[1] is None


def test_unsupported_resolution_is_named_in_the_error(kontext: str) -> None:
    with pytest.raises(ValueError, match=r"resolution 30 is not supported: .* takes multiples of 4"):
        load_policy(kontext, resolution=30)


@pytest.mark.parametrize(
    ("changes", "prefix", "message"),
    [
        ({"lora_format": "comfy"}, "lora_unet", "lora_format 'comfy' is unknown. Expected one of diffusers, kohya"),
        ({"lora_format": "kohya"}, None, "lora_format 'kohya': Mystery has no names in kohya's format"),
        ({"lora_format": "kohya", "tuning": "full"}, "lora_unet", "tuning is full, which makes no LoRA"),
    ],
)
def test_unsupported_lora_format_raises(changes: dict[str, Any], prefix: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_lora_format(config(**changes), prefix, family="Mystery")


def test_training_on_edits_writes_an_adapter(kontext: str, write_pairs: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = train(
        TrainConfig(
            model=kontext,
            pairs=write_pairs(edit_rows(4)),
            output_dir=str(out),
            steps=2,
            batch_size=2,
            eval_fraction=0.0,
            resolution=32,
        )
    )
    assert (out / "pytorch_lora_weights.safetensors").exists()
    assert result.settings["family"] == "FluxKontext, FluxKontextPipeline"
