"""Damaged and hostile models and adapters are refused by file and reason before anything is built from them."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dpo_mm.models.model_checks import check_finite_tensors, check_safetensors
from dpo_mm.policies.adapter_checks import check_diffusers_lora, check_peft_adapter
from dpo_mm.policies.families import load_policy

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(3)}, buffer)
    return buffer.getvalue()


def entry(file: str, **changes: Any) -> Callable[[Path], None]:
    """A function that changes entries of a JSON file."""

    def change(folder: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text())
        path.unlink()
        path.write_text(json.dumps({**content, **changes}))

    return change


def bytes_of(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A function that changes the bytes of a file."""

    def apply(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (folder / file).unlink()
        (folder / file).write_bytes(change(data))

    return apply


def outside(folder: Path) -> None:
    index = {"weight_map": {"conv_in.weight": "../../other.safetensors"}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def code_in_a_part(folder: Path) -> None:
    entry("model_index.json", unet=["evil_part", "Model"])(folder)
    (folder / "unet" / "evil_part.py").write_text("raise SystemExit('ran')")


def custom_pipeline(folder: Path) -> None:
    entry("model_index.json", _class_name="EvilPipeline")(folder)
    (folder / "pipeline.py").write_text("raise SystemExit('ran')")


HOSTILE: list[tuple[Callable[[Path], None], str]] = [
    (bytes_of(WEIGHTS, lambda data: pickled()), r"\.safetensors: .*Pickled or truncated weights are not loaded"),
    (bytes_of(WEIGHTS, lambda data: data[:-9]), r"\.safetensors: has [\d,]+ bytes, but its header says"),
    (bytes_of(WEIGHTS, lambda data: b""), r"\.safetensors: not a complete safetensors file"),
    (bytes_of(WEIGHTS, lambda data: (2**60).to_bytes(8, "little") + data[8:]), r"\.safetensors: not a complete"),
    (bytes_of("unet/config.json", lambda data: data[: len(data) // 2]), r"config\.json is damaged"),
    (bytes_of("vae/config.json", lambda data: b"[" * 100_000), r"config\.json is damaged"),
    (bytes_of("model_index.json", lambda data: b"[1]"), r"model_index\.json is damaged \(not a JSON object\)"),
    (outside, r"names the file '\.\./\.\./other\.safetensors', which is not in its folder"),
    (entry("model_index.json", _class_name=["pipeline", "Evil"]), r"_class_name .*code"),
    (entry("model_index.json", unet=["evil_library", "Model"]), r"unet comes from 'evil_library'"),
    (entry("model_index.json", unet=[["diffusers"], 5]), r"unet is .* Expected a library and a class"),
    (entry("model_index.json", custom_pipeline="evil"), r"custom_pipeline names custom code"),
    (entry("unet/config.json", auto_map={"AutoModel": "code.Model"}), r"auto_map names custom code"),
    (code_in_a_part, r"unet is custom code \(unet/evil_part\.py\)"),
    (custom_pipeline, r"EvilPipeline with custom code \(pipeline\.py\)"),
    (entry("scheduler/scheduler_config.json", num_train_timesteps=10**12), r"num_train_timesteps is 1e\+12, more than"),
    (entry("unet/config.json", layers_per_block=10**9), r"layers_per_block is 1e\+09, more than"),
    (entry("unet/config.json", layers_per_block=[1, 10**6]), r"layers_per_block is 1e\+06, more than"),
    (entry("text_encoder/config.json", num_hidden_layers=5000), r"num_hidden_layers is 5e\+03, more than"),
    (entry("vae/config.json", block_out_channels="x"), r"model .*, vae: cannot be loaded \(TypeError"),
    (entry("tokenizer/tokenizer_config.json", model_max_length=10**9), r"tokenizer: model_max_length is 1000000000"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_pipeline_is_refused(number: int, tiny_model: str, tmp_path: Path) -> None:
    """Fails if a limit, a type or the origin of a part is checked after something is built."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model", copy_function=os.link))
    damage, message = HOSTILE[number]
    damage(folder)
    begin = time.process_time()
    with pytest.raises(ValueError, match=message):
        load_policy(str(folder))
    assert time.process_time() - begin < 5


def test_weights_that_are_not_finite_are_named() -> None:
    good = torch.full((3,), 6e4, dtype=torch.float16)
    check_finite_tensors({"a": good, "b": torch.full((9,), 3e38)}, "model")  # sums that overflow are looked at again
    for value in ("nan", "inf", "-inf"):
        with pytest.raises(ValueError, match="model: the tensor b has values that are not finite"):
            check_finite_tensors({"a": good, "b": torch.tensor([0.0, float(value)])}, "model")


def test_config_larger_than_its_weights_is_refused(tmp_path: Path) -> None:
    """transformers would fill tensors of the size of the config with random numbers."""
    from tests.contracts.tiny_vlms import save

    model = Path(save("llama", tmp_path / "model"))
    entry("config.json", vocab_size=10**7, hidden_size=10**6, intermediate_size=10**6)(model)
    with pytest.raises(ValueError, match=r"its config describes [\d,]+ weights, but its files have [\d,]+ bytes"):
        load_policy(str(model))


class Tiny(nn.Module):
    """A model with two layers for adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


def peft_adapter(folder: Path, **changes: Any) -> Path:
    """An adapter of the first layer of Tiny, with other settings."""
    folder.mkdir(exist_ok=True)
    weights = {
        "base_model.model.layers.0.lora_A.weight": torch.ones(2, 4),
        "base_model.model.layers.0.lora_B.weight": torch.ones(4, 2),
    }
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["layers.0"], **changes}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 10**9}, "rank 'r' is 1000000000, but its weights have rank 2"),
        ({"r": "2"}, "rank 'r' is '2'"),
        ({"r": True}, "rank 'r' is True"),
        ({"rank_pattern": {"0": 3}}, "rank '0' is 3, but its weights have rank 2"),
        ({"rank_pattern": [1]}, "rank_pattern is .* Expected a JSON object"),
        ({"lora_alpha": float("inf")}, "alpha 'lora_alpha' is inf"),
        ({"target_modules": 5}, "target_modules is 5. Expected names of modules"),
        ({"target_modules": [["a"]]}, "target_modules is .* Expected names"),
        ({"target_modules": "("}, "regular expression for modules is not valid"),
        ({"peft_type": ["LORA"]}, "peft_type is"),
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "megatron_config names a module to import"),
        ({"auto_map": {"a": "b.c"}}, "auto_map names custom code"),
    ],
)  # fmt: skip
def test_settings_of_an_adapter_are_checked(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    check_peft_adapter(peft_adapter(tmp_path / "good"), Tiny())
    with pytest.raises(ValueError, match=message):
        check_peft_adapter(peft_adapter(tmp_path / "bad", **changes), Tiny())


@pytest.mark.parametrize(
    "name", ["target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "rank_pattern"]
)
def test_regular_expressions_that_never_end_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if any of PEFT's patterns reaches `re` in this process unchecked."""
    monkeypatch.setattr("dpo_mm.policies.adapter_checks.SECONDS", 0.5)
    pattern = r"(\w|.)+(\w|.)+(\w|.)+$[x]"
    model = Tiny()
    model.register_module("a" * 40, nn.Linear(1, 1))
    value: Any = {pattern: 2} if name == "rank_pattern" else [pattern] if name == "modules_to_save" else pattern
    with pytest.raises(ValueError, match="takes more than"):
        check_peft_adapter(peft_adapter(tmp_path / "bad", **{name: value}), model)
    monkeypatch.setattr("dpo_mm.policies.adapter_checks.SECONDS", 30)
    check_peft_adapter(peft_adapter(tmp_path / "good", target_modules=r".*layers\.(0|1)"), model)


@pytest.mark.parametrize("kind", ["nan", "rank", "name", "empty", "metadata", "pickle"])
def test_lora_of_diffusers_is_checked(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "pytorch_lora_weights.safetensors"
    weights = {"unet.to_q.lora_A.weight": torch.ones(2, 4), "unet.to_q.lora_B.weight": torch.ones(4, 2)}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.target_modules": ["to_q"]})}
    save_file(weights, file, metadata)
    check_diffusers_lora(file, {"unet": Tiny()})
    if kind == "nan":
        weights["unet.to_q.lora_A.weight"] = torch.full((2, 4), float("nan"))
    elif kind == "rank":
        weights["unet.to_q.lora_A.weight"] = torch.ones(5000, 4)
    elif kind == "name":
        weights["unet.(a+)+$.lora_B.weight"] = torch.ones(4, 2)
    elif kind == "empty":
        weights = {}
    elif kind == "metadata":
        metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 10**9})}
    save_file(weights, file, metadata)
    if kind == "pickle":
        file.write_bytes(pickled())
    with pytest.raises(ValueError, match=r"pytorch_lora_weights\.safetensors: "):
        check_diffusers_lora(file, {"unet": Tiny()})


def test_lora_of_another_model_is_refused(tiny_model: str, tmp_path: Path) -> None:
    """diffusers warns about weights without a place and goes on."""
    from peft import LoraConfig

    from dpo_mm.policies.adapters import save_lora

    pipe = load_policy(tiny_model).pipe  # type: ignore[union-attr]
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    save_lora(pipe, "unet", tmp_path)
    load_policy(tiny_model, adapter=tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    moved = {(key.replace("unet.", "unet.other_") if key == name else key): value for key, value in weights.items()}
    save_file(moved, file)
    with pytest.raises(ValueError, match=r"Is it of another model|cannot be loaded"):
        load_policy(tiny_model, adapter=tmp_path)


def test_safetensors_header_is_checked_against_the_size(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, file)
    assert check_safetensors(file) == 2
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ValueError, match="not a regular file"):
        check_safetensors(tmp_path / "pipe.safetensors")
