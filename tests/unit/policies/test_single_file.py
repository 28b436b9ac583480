"""A checkpoint in one file, in the layout of the original code, gives the weights of the pipeline that it was made of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from dpo_mm.config import TrainConfig
from dpo_mm.policies.families import load_policy, model_content, policy_class
from dpo_mm.policies.single_file import config_folder, converted_folder
from dpo_mm.training.run import train
from tests.contracts.families import BUILDERS
from tests.contracts.original_layout import write_configs, write_original


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> Path:
    """A tiny Stable Diffusion as one file, with its configs in the folder of its name."""
    folder = tmp_path_factory.mktemp("sd15")
    write_configs(Path(tiny_model), folder / "one")
    return write_original(diffusers.DiffusionPipeline.from_pretrained(tiny_model), folder / "one.safetensors")


def test_usual_configs_are_found_in_the_cache(sd15: Path, tiny_model: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Catches SDXL's configs for Stable Diffusion, and a folder next to the file that is required."""
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(sd15.read_bytes())
    cached = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    configs = write_configs(Path(tiny_model), cached / "snapshots" / "a1")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert config_folder(str(alone)) == configs and policy_class(str(alone)).__name__ == "StableDiffusion"


def assert_same_weights(ours: Any, theirs: Any, parts: tuple[str, ...]) -> None:
    for part in parts:
        state, expected = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert state.keys() == expected.keys() and len(state) > 10
        assert all(torch.equal(state[name], expected[name]) for name in state)


def test_weights_are_those_of_the_pipeline(sd15: Path, tiny_model: str) -> None:
    """Catches a block that is converted to another place, and a second conversion."""
    policy = load_policy(str(sd15))
    assert policy.modality == "image"
    theirs = diffusers.DiffusionPipeline.from_pretrained(tiny_model)
    assert_same_weights(policy.pipe, theirs, ("unet", "vae", "text_encoder"))
    written = [path.stat().st_mtime_ns for path in Path(converted_folder(str(sd15))).rglob("*.safetensors")]
    load_policy(str(sd15))
    assert written == [path.stat().st_mtime_ns for path in Path(converted_folder(str(sd15))).rglob("*.safetensors")]


def test_sdxl_has_both_text_encoders(tmp_path: Path) -> None:
    """Catches the second text encoder, whose layout is that of open_clip, with weights left out."""
    (tmp_path / "pipeline").mkdir()
    pipe = diffusers.DiffusionPipeline.from_pretrained(BUILDERS["sdxl"].build(tmp_path / "pipeline"))
    # The readers of this layout tell the two text encoders apart by their width
    wide = CLIPTextConfig(**{**pipe.text_encoder_2.config.to_dict(), "hidden_size": 32, "projection_dim": 32})
    pipe.text_encoder_2 = CLIPTextModelWithProjection(wide)
    pipe.save_pretrained(tmp_path / "wide")
    write_configs(tmp_path / "wide", tmp_path / "one")
    file = write_original(pipe, tmp_path / "one.safetensors")
    assert policy_class(str(file)).__name__ == "StableDiffusionXL"
    ours = diffusers.DiffusionPipeline.from_pretrained(converted_folder(str(file)))
    assert_same_weights(ours, pipe, ("unet", "vae", "text_encoder", "text_encoder_2"))


@pytest.mark.slow
def test_single_file_trains_like_its_pipeline(sd15: Path, tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """Catches another loss than with the pipeline's folder, and a card whose code does not load the base."""
    common: dict[str, Any] = {"beta": 500.0, "steps": 1, "batch_size": 2, "log_every": 1, "eval_fraction": 0.0}
    ours = train(TrainConfig(str(sd15), pairs, str(tmp_path / "ours"), **common))
    theirs = train(TrainConfig(tiny_model, pairs, str(tmp_path / "theirs"), **common))
    assert ours.history == theirs.history
    (code,) = re.findall(r"```python\n(.*?)\n```", (ours.folder / "README.md").read_text(), re.DOTALL)
    lines = code.partition("image = ")[0].replace('"ours"', f'"{ours.folder}"')
    names: dict[str, Any] = {}
    exec(lines, names)
    assert type(names["pipe"]).__name__ == "StableDiffusionPipeline" and names["pipe"].unet.peft_config


def test_what_is_missing_is_named_in_one_line(sd15: Path, tiny_model: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Catches random weights in place of a missing tensor, and a download of configs."""
    monkeypatch.setenv("DPO_MM_CACHE", str(tmp_path / "cache"))
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(sd15.read_bytes())
    with pytest.raises(
        ValueError, match=r"the configs of its pipeline are not on this machine\. Put .*alone, or run: hf"
    ):
        policy_class(str(alone))
    tensors = load_file(sd15)
    for name in (
        "model.diffusion_model.out.2.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ):
        name = next(key for key in tensors if key.endswith(name.rpartition("transformer.")[2]))
        cut = tmp_path / f"cut-{len(name)}.safetensors"
        save_file({key: value for key, value in tensors.items() if key != name}, cut)
        write_configs(Path(tiny_model), cut.with_suffix(""))
        with pytest.raises(ValueError, match="has no weight"):
            load_policy(str(cut))
    other = tmp_path / "lora.safetensors"
    save_file({"lora.weight": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match="Expected a whole Stable Diffusion"):
        policy_class(str(other))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(sd15.read_bytes()[:-10])
    write_configs(Path(tiny_model), tmp_path / "broken")
    with pytest.raises(ValueError, match="its header says"):
        load_policy(str(broken))
    with pytest.raises(ValueError, match="is a pickle, which is not read"):
        policy_class(str(tmp_path / "x.ckpt"))
    assert model_content(str(sd15)) != model_content(tiny_model) != ""
