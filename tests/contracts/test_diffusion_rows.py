"""What rows bring beside two pictures and a prompt: sizes and crops for SDXL, a picture to edit for Kontext."""

from __future__ import annotations

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
from dpo_mm.policies.adapters import check_format
from dpo_mm.policies.families import load_policy
from dpo_mm.training.encoding import encode
from tests.conftest import picture, rows
from tests.contracts.families import BUILDERS, WORDS
from tests.contracts.test_diffusion import config, stepped


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(BUILDERS["sdxl"].build(tmp_path_factory.mktemp("sdxl")))


@pytest.fixture(scope="module")
def kontext(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(BUILDERS["flux-kontext"].build(tmp_path_factory.mktemp("kontext")))


def cell(image: Image.Image) -> dict[str, Any]:
    return {"bytes": encode_png(image), "path": None}


def edits(count: int) -> list[dict[str, Any]]:
    return [{**row, "image_source": cell(picture(300 + n))} for n, row in enumerate(rows(count))]


def test_sdxl_is_told_sizes_and_crops_as_the_stock_pipeline_tells_them(xl: str) -> None:
    policy, row = load_policy(xl), BUILDERS["sdxl"]
    told = {"original_size": (48, 40), "crops_coords_top_left": (3, 2), "target_size": (32, 24)}
    given, timestep, latents, _ = stepped(policy, row, {"prompt": WORDS[:1], "num_inference_steps": 3, **told})
    prompt = policy.encode_prompts(WORDS[:1])
    frame = torch.tensor([[48.0, 40, 3, 2, 32, 24]])
    with torch.no_grad():
        ours = policy.denoise(policy.model, latents, torch.as_tensor(timestep)[None], {**prompt, "frame": frame})
        whole = policy.denoise(policy.model, latents, torch.as_tensor(timestep)[None], prompt)
    torch.testing.assert_close(ours, given, atol=1e-5, rtol=0)
    assert (whole - given).abs().max() > 1e-3


def test_sdxls_rows_bring_each_pictures_own_size_and_crop(xl: str, tmp_path: Path) -> None:
    policy = load_policy(xl)
    policy.prepare(config())
    wide = picture(5, 64).resize((96, 64))
    row = {**rows(1)[0], "image_b": cell(wide), "preference": "a"}
    kept = encode(policy, make_image_rows([row]), where="pairs", cache=tmp_path)
    assert kept[0]["chosen_frame"].tolist() == [32, 32, 0, 0, 32, 32]
    assert kept[0]["rejected_frame"].tolist() == [64, 96, 0, 8, 32, 32]
    shown = np.asarray(wide.resize((48, 32), Image.Resampling.LANCZOS).crop((8, 0, 40, 32)))
    assert np.array_equal(np.asarray(policy.resize_and_crop(wide)), shown)
    batch = policy.collate([{**kept[0], "visit": 0}])
    found = policy.log_probs(policy.model, batch)
    plain = {name: value for name, value in batch.items() if not name.endswith("_frame")}
    alike = policy.log_probs(policy.model, plain)
    assert torch.equal(found.chosen, alike.chosen) and not torch.equal(found.rejected, alike.rejected)


def test_sdxls_autoencoder_encodes_in_float32_where_the_pipeline_is_in_float16(xl: str) -> None:
    policy = load_policy(xl, precision="fp16")
    mean, std = policy.encode_images([picture(0)])
    assert policy.vae.dtype == torch.float16
    with torch.no_grad():
        expected = policy.vae.float().encode(policy.pixels(picture(0))[None]).latent_dist
    assert torch.equal(mean, expected.mean) and torch.equal(std, expected.std)


def test_a_picture_to_edit_comes_from_the_row_to_the_denoiser(kontext: str, tmp_path: Path) -> None:
    policy = load_policy(kontext, resolution=32)
    policy.prepare(config())
    kept = encode(policy, make_image_rows(edits(2)), where="pairs", cache=tmp_path)
    mean, _ = policy.encode_images([picture(300), picture(301)])
    torch.testing.assert_close(torch.stack([kept[n]["source_mean"] for n in (0, 1)]), mean, atol=1e-6, rtol=0)
    batch = policy.collate([{**kept[n], "visit": 0} for n in (0, 1)])
    torch.testing.assert_close(batch["prompt"]["source"], policy.latent_scale.normalised(mean), atol=1e-6, rtol=0)
    other = {**batch, "prompt": {**batch["prompt"], "source": batch["prompt"]["source"].flip(0)}}
    assert not torch.equal(policy.log_probs(policy.model, batch).chosen, policy.log_probs(policy.model, other).chosen)


def test_sources_that_are_missing_or_not_wanted_are_named(kontext: str, tiny_model: str, tmp_path: Path) -> None:
    some = edits(2)
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
        next(plain.sample(WORDS[:1], [0], sources=[picture(0)], **drawing))


def test_a_source_that_does_not_decode_is_named(kontext: str, tmp_path: Path) -> None:
    some = edits(2)
    some[0]["image_source"] = {"bytes": b"<html>", "path": None}
    policy = load_policy(kontext, resolution=32)
    with pytest.raises(ValueError, match="row row-0 of pairs: image_source does not decode"):
        encode(policy, make_image_rows(some), where="pairs", cache=tmp_path)
    left = encode(policy, make_image_rows(some), where="pairs", cache=tmp_path, undecodable_images="drop")
    assert len(left) == 1 and left[0]["id"] == "row-1"


def test_one_prompt_of_two_sources_is_two_prompts() -> None:
    same = [{**row, "prompt": "make it blue", "id": f"{n}"} for n, row in enumerate(edits(10))]
    inside, apart = split_by_prompt(make_image_rows(same), 0.3, seed=0)
    assert apart is not None and len(apart) == 3 and len(inside) == 7
    plain = [{k: v for k, v in row.items() if k != "image_source"} for row in same]
    assert split_by_prompt(make_image_rows(plain), 0.3, seed=0)[1] is None


def test_a_resolution_that_does_not_fit_is_named(kontext: str) -> None:
    with pytest.raises(ValueError, match=r"resolution 30 is not supported: .* takes multiples of 4"):
        load_policy(kontext, resolution=30)


@pytest.mark.parametrize(
    ("changes", "prefix", "said"),
    [
        ({"lora_format": "comfy"}, "lora_unet", "lora_format 'comfy' is unknown. Expected one of diffusers, kohya"),
        ({"lora_format": "kohya"}, None, "lora_format 'kohya': Mystery has no names in kohya's format"),
        ({"lora_format": "kohya", "tuning": "full"}, "lora_unet", "tuning is full, which makes no LoRA"),
    ],
)
def test_a_format_that_cannot_be_written_is_refused(changes: dict[str, Any], prefix: str | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_format(config(**changes), prefix, family="Mystery")


def test_a_whole_run_on_edits_writes_an_adapter(
    kontext: str, write_pairs: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_mm.training import run

    monkeypatch.setattr(run, "build_policy", lambda config: load_policy(kontext, resolution=32))
    out = tmp_path / "out"
    trained = run.train(
        TrainConfig(
            model=kontext, pairs=write_pairs(edits(4)), output_dir=str(out), steps=2, batch_size=2, eval_fraction=0.0
        )
    )
    assert (out / "pytorch_lora_weights.safetensors").exists()
    assert trained.settings["family"] == "FluxKontext, FluxKontextPipeline"
