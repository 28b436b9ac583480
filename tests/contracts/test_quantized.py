"""Contracts of a quantised base under a LoRA, for image generators and vision-language models."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from torch import nn
from transformers import AutoModelForImageTextToText

from dpo_mm.config import TrainConfig
from dpo_mm.evaluation.image_sampling import weights_digest
from dpo_mm.models import quantization
from dpo_mm.models.quantization import check_quantize, stored_size
from dpo_mm.objectives import deltas, sigmoid
from dpo_mm.policies.families import load_policy
from dpo_mm.training.builders import validate_config
from dpo_mm.training.reference import adapter_off
from dpo_mm.training.run import train
from tests.contracts import tiny_vlms
from tests.contracts.families import BUILDERS
from tests.contracts.test_diffusion import encoded_rows


@pytest.fixture(scope="module")
def base(folders: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Path of a family's tiny model."""

    @functools.cache
    def path(family: str) -> str:
        return folders(family) if family in BUILDERS else tiny_vlms.save(family, tmp_path_factory.mktemp(family))

    return path


def quantised_policy(family: str, source: str, quantize: str | None, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A prepared policy with a fresh LoRA, and a batch of encoded rows."""
    options = {"resolution": BUILDERS[family].size} if family in BUILDERS else {}
    policy = load_policy(source, quantize=quantize, device="cpu", **options)
    policy.prepare(TrainConfig(model=source, pairs="p", output_dir="o", beta=0.1, **changes))
    rows = encoded_rows(policy) if policy.modality == "image" else policy.encode(tiny_vlms.rows(family, (1, 1)))
    return policy, policy.collate(rows)


def quantised_layers(module: nn.Module) -> list[str]:
    """Names of the layers with quantised weights."""
    return [name for name, part in module.named_parameters() if hasattr(part, "__tensor_flatten__")]


def assert_trains_and_loads(family: str, source: str, quantize: str, folder: Path) -> None:
    policy, batch = quantised_policy(family, source, quantize)
    reference = adapter_off(policy)(policy.model, batch)
    fresh = policy.log_probs(policy.model, batch)
    assert torch.equal(fresh.chosen, reference.chosen) and torch.equal(fresh.rejected, reference.rejected)
    pairs = len(fresh.chosen)
    assert sigmoid(fresh, reference, beta=1).tolist() == pytest.approx([math.log(2)] * pairs, abs=1e-6)

    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(10):
        log_probs = policy.log_probs(policy.model, batch)
        sigmoid(log_probs, reference, beta=1000 if policy.modality == "image" else 0.1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned = policy.log_probs(policy.model, batch).detach()
    assert (deltas(tuned, reference) > 0).all()
    assert torch.equal(adapter_off(policy)(policy.model, batch).chosen, reference.chosen)

    policy.save(folder)
    fits, same_batch = quantised_policy(family, source, quantize)
    fits.load_weights(folder)
    assert torch.equal(fits.log_probs(fits.model, same_batch).chosen, tuned.chosen)
    upstream, (plain, plain_batch) = upstream_model(policy, source, folder), quantised_policy(family, source, None)
    plain.load_weights(folder)
    expected = plain.log_probs(plain.model, plain_batch).chosen
    torch.testing.assert_close(plain.log_probs(upstream, plain_batch).chosen, expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(expected, tuned.chosen)


def upstream_model(policy: Any, source: str, folder: Path) -> nn.Module:
    """The plain base with the saved LoRA, loaded by diffusers, or by transformers and PEFT."""
    if policy.modality == "text":
        return PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(source), str(folder))
    pipe = DiffusionPipeline.from_pretrained(source)
    pipe.load_lora_weights(str(folder))
    return getattr(pipe, policy.denoiser)


@pytest.mark.parametrize(("family", "quantize"), [("flux-dev", "int8"), ("qwen2_5_vl", "fp8")])
def test_lora_on_a_quantised_base_trains_and_loads_on_the_plain_base(
    family: str, quantize: str, base: Callable[[str], str], tmp_path: Path
) -> None:
    assert_trains_and_loads(family, base(family), quantize, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "qwen-image", "sd3", "sdxl", "z-image"])
def test_other_families_train_on_an_int8_base(family: str, base: Callable[[str], str], tmp_path: Path) -> None:
    assert_trains_and_loads(family, base(family), "int8", tmp_path)


def test_only_the_language_model_is_quantised(base: Callable[[str], str]) -> None:
    """The vision tower, the projector and the head stay in the run's precision, so that the tower can be trained."""
    plain, small = (load_policy(base("qwen2_5_vl"), quantize=name, device="cpu").model for name in (None, "fp8"))
    names = quantised_layers(small)
    assert len(names) == 14 and all(name.startswith("model.language_model.layers.") for name in names)
    linear = sum(plain.get_parameter(name).numel() for name in names)
    scales = 4 * sum(plain.get_parameter(name).shape[0] for name in names)
    assert stored_size(plain) - stored_size(small) == 3 * linear - scales


def test_large_text_encoders_are_quantised_and_the_key_of_encoded_pairs_changes(
    base: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, small = (load_policy(base("sd3"), quantize=name, device="cpu") for name in (None, "int8"))
    assert quantised_layers(small.model) and not quantised_layers(small.pipe.text_encoder_3)
    assert small.fingerprint() == plain.fingerprint()  # the denoiser encodes nothing
    t5 = sum(parameter.numel() for parameter in plain.pipe.text_encoder_3.parameters())
    monkeypatch.setattr(quantization, "LARGE_ENCODER", t5)
    with_t5 = load_policy(base("sd3"), quantize="int8", device="cpu")
    assert quantised_layers(with_t5.pipe.text_encoder_3) and not quantised_layers(with_t5.pipe.vae)
    assert with_t5.fingerprint() != plain.fingerprint()


def test_key_of_reference_log_probs_depends_on_quantize(base: Callable[[str], str]) -> None:
    keys = [load_policy(base("llava"), quantize=q, device="cpu").fingerprint() for q in (None, "int8", "fp8", "int8")]
    assert len(set(keys)) == 3 and keys[1] == keys[3]


def test_quantised_files_and_what_cannot_be_quantised_are_refused(
    base: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(model=base("llava"), pairs="p", output_dir="o", beta=0.1, quantize="int8")
    validate_config(config)
    for changes, message in (
        ({"quantize": "nf5"}, "quantize 'nf5' is unknown; did you mean 'nf4'"),
        ({"tuning": "full"}, "quantize 'int8' needs tuning: lora"),
    ):
        with pytest.raises(ValueError, match=message):
            validate_config(dataclasses.replace(config, **changes))  # type: ignore[arg-type]
    monkeypatch.setitem(quantization.PACKAGES, "nf4", "torchao")
    with pytest.raises(ValueError, match="quantize 'nf4' needs an NVIDIA GPU"):
        check_quantize("nf4", device="cpu")
    monkeypatch.setitem(quantization.PACKAGES, "int8", "not_installed")
    with pytest.raises(ValueError, match=r"quantize 'int8' needs not_installed; pip install 'dpo-mm\[quantized\]'"):
        check_quantize("int8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A10")
    with pytest.raises(ValueError, match=r"quantize 'fp8': this GPU \(A10\) does not have 8-bit floats. Use int8"):
        check_quantize("fp8", device="cuda")
    monkeypatch.undo()
    source = tiny_vlms.save("llava", tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match=r"quantised already \(fp8\). Leave out quantize"):
        load_policy(source, quantize="int8", device="cpu")


@pytest.mark.slow
def test_run_on_a_quantised_base_resumes_to_the_same_bits(
    base: Callable[[str], str], pairs: str, tmp_path: Path
) -> None:
    """With precomputed references, four steps equal two steps and two more after a resume. The card names the quantisation."""
    settings: dict[str, Any] = {
        "reference": "precomputed",
        "fixed_draws_per_row": 1,
        "batch_size": 2,
        "save_every": 2,
        "log_every": 1,
    }
    config = TrainConfig(
        model=base("stable-diffusion"),
        pairs=pairs,
        output_dir=str(tmp_path / "a"),
        quantize="int8",
        steps=4,
        **settings,
    )
    whole = train(config)
    first = dataclasses.replace(config, output_dir=str(tmp_path / "b"), steps=2)
    train(first)
    resumed = train(dataclasses.replace(first, steps=4, resume=True))
    losses, resumed_losses = ([entry["loss"] for entry in run.history if "loss" in entry] for run in (whole, resumed))
    assert losses == resumed_losses and len(losses) == 4 and losses[0] == pytest.approx(math.log(2), abs=1e-6)
    files = [Path(run.folder) / "pytorch_lora_weights.safetensors" for run in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "linear layers in int8" in (whole.folder / "README.md").read_text(encoding="utf-8")
    assert json.loads((whole.folder / "dpo_mm.json").read_text())["quantize"] == "int8"
    plain = train(dataclasses.replace(config, output_dir=str(tmp_path / "c"), quantize=None))
    assert plain.history[3]["loss"] != losses[3]


def test_quantised_base_samples_with_an_adapter_and_refuses_a_whole_model(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """The card that trained on a quantised base can compare: scale 0 is that base, and its images depend on quantize."""
    policy, _ = quantised_policy("stable-diffusion", base("stable-diffusion"), "int8")
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05
    policy.save(tmp_path)
    options: dict[str, Any] = {"device": "cpu", "resolution": BUILDERS["stable-diffusion"].size}
    fresh = load_policy(base("stable-diffusion"), quantize="int8", **options)
    sampler = {"prompts": ["a red square"], "seeds": [1], "steps": 2, "guidance": 1.0, "batch_size": 1}
    untuned = [image.tobytes() for (image,) in fresh.sample(**sampler)]
    digests = [weights_digest(fresh.pipe), weights_digest(load_policy(base("stable-diffusion"), **options).pipe)]
    fresh.load_adapter(tmp_path)
    off, on = ([image.tobytes() for (image,) in fresh.sample(**sampler, scale=scale)] for scale in (0.0, 1.0))
    assert off == untuned != on and digests[0] == weights_digest(fresh.pipe, adapter=False) != digests[1]
    with pytest.raises(ValueError, match=r"is a whole model\. quantize is for a base with a LoRA: leave it out"):
        load_policy(base("llava"), quantize="int8", device="cpu", adapter=base("llava"))
