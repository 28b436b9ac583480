"""Code in a model or an adapter is never executed, and no secret is saved."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_mm.config import TrainConfig
from dpo_mm.policies.families import load_policy, resolve_commit
from dpo_mm.training.run import train
from tests.contracts.families import stable_diffusion
from tests.contracts.tiny_vlms import save


class Canary:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def write_pickled_weights(file: Path, canary: Path) -> None:
    """Write a pickled Canary as a weights file, and check that unpickling it creates the canary file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weight": Canary(canary)}, file)
    with pytest.raises(pickle.UnpicklingError):  # torch itself raises; ours must not call it
        torch.load(file, weights_only=True)
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists()  # unpickling creates the file
    canary.unlink()


def test_pickled_pipeline_weights_are_not_loaded(tmp_path: Path) -> None:
    folder, canary = stable_diffusion(tmp_path / "model"), tmp_path / "canary"
    for weights in (folder / "unet").glob("*.safetensors"):
        weights.unlink()
    write_pickled_weights(folder / "unet" / "diffusion_pytorch_model.bin", canary)
    with pytest.raises((ValueError, OSError)):
        load_policy(str(folder))
    assert not canary.exists()


def test_pickled_image_adapters_are_not_loaded(tiny_model: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    write_pickled_weights(tmp_path / "images" / "pytorch_lora_weights.bin", canary)
    with pytest.raises(ValueError, match=r"neither pytorch_lora_weights.safetensors nor"):
        load_policy(tiny_model).load_adapter(tmp_path / "images")
    write_pickled_weights(tmp_path / "whole" / "unet" / "diffusion_pytorch_model.bin", canary)
    shutil.copy(Path(tiny_model) / "unet" / "config.json", tmp_path / "whole" / "unet")
    with pytest.raises((ValueError, OSError)):
        load_policy(tiny_model).load_adapter(tmp_path / "whole")
    assert not canary.exists()


def test_pickled_vlm_weights_and_adapter_are_not_loaded(tmp_path: Path) -> None:
    model, canary = save("llava", tmp_path / "model"), tmp_path / "canary"
    policy = load_policy(model)
    write_pickled_weights(tmp_path / "adapter" / "adapter_model.bin", canary)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors. Pickled weights are not loaded"):
        policy.load_adapter(tmp_path / "adapter")
    for weights in Path(model).glob("*.safetensors"):
        weights.unlink()
    write_pickled_weights(Path(model) / "pytorch_model.bin", canary)
    with pytest.raises((ValueError, OSError)):
        load_policy(model)
    assert not canary.exists()


def test_code_in_a_model_folder_is_not_executed(tmp_path: Path) -> None:
    model, canary = Path(save("llava", tmp_path / "model")), tmp_path / "canary"
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mystery", "auto_map": {"AutoConfig": "code.Config"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(f"open({str(canary)!r}, 'w')\nclass Config: pass\n")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_policy(str(model))
    assert not canary.exists()
    sources = [path.read_text() for path in (Path(__file__).parents[2] / "dpo_mm").rglob("*.py")]
    assert len(sources) > 50 and not any("trust_remote_code=True" in source for source in sources)


def test_no_token_is_saved(tiny_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_" + "S3cret" * 6
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, secret)
    train(TrainConfig(tiny_model, pairs, str(tmp_path), steps=2, batch_size=2, save_every=2, eval_fraction=0))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8 and not any(secret.encode() in path.read_bytes() for path in files)


def test_commit_of_a_cached_hub_model_is_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit is read from the hub's cache on disk, which records the commit of `main` at download time."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--org--model"
    (cached / "snapshots" / commit).mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots" / commit / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_commit("org/model") == commit
    assert resolve_commit(str(tmp_path)) is None
