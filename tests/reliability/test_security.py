"""Nothing that comes with a model or an adapter is run, and no secret is written down."""

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
    """Whoever unpickles it makes a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.place,)


def poisoned(file: Path, canary: Path) -> None:
    """A pickle, alone and as torch would write it, in the place of weights."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weight": Canary(canary)}, file)
    with pytest.raises(pickle.UnpicklingError):  # torch itself refuses; ours must not even ask
        torch.load(file, weights_only=True)
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists()  # the canary sings where it is unpickled
    canary.unlink()


def test_pickled_weights_of_a_pipeline_are_not_read(tmp_path: Path) -> None:
    folder, canary = stable_diffusion(tmp_path / "model"), tmp_path / "canary"
    for weights in (folder / "unet").glob("*.safetensors"):
        weights.unlink()
    poisoned(folder / "unet" / "diffusion_pytorch_model.bin", canary)
    with pytest.raises((ValueError, OSError)):
        load_policy(str(folder))
    assert not canary.exists()


def test_pickled_adapters_are_not_read(tiny_model: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    poisoned(tmp_path / "images" / "pytorch_lora_weights.bin", canary)
    with pytest.raises(ValueError, match=r"neither pytorch_lora_weights.safetensors nor"):
        load_policy(tiny_model).load_adapter(tmp_path / "images")
    poisoned(tmp_path / "whole" / "unet" / "diffusion_pytorch_model.bin", canary)
    shutil.copy(Path(tiny_model) / "unet" / "config.json", tmp_path / "whole" / "unet")
    with pytest.raises((ValueError, OSError)):
        load_policy(tiny_model).load_adapter(tmp_path / "whole")
    assert not canary.exists()


def test_pickled_weights_of_a_reader_and_its_adapter_are_not_read(tmp_path: Path) -> None:
    model, canary = save("llava", tmp_path / "model"), tmp_path / "canary"
    reader = load_policy(model)
    poisoned(tmp_path / "adapter" / "adapter_model.bin", canary)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors. Pickled weights are not loaded"):
        reader.load_adapter(tmp_path / "adapter")
    for weights in Path(model).glob("*.safetensors"):
        weights.unlink()
    poisoned(Path(model) / "pytorch_model.bin", canary)
    with pytest.raises((ValueError, OSError)):
        load_policy(model)
    assert not canary.exists()


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
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


def test_no_token_is_written_down(tiny_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_" + "S3cret" * 6
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, secret)
    train(TrainConfig(tiny_model, pairs, str(tmp_path), steps=2, batch_size=2, save_every=2, eval_fraction=0))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8 and not any(secret.encode() in path.read_bytes() for path in files)


def test_the_commit_of_a_hub_model_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache as it lies on disk: what `main` meant on that day is what the run records."""
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
