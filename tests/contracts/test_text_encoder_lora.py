"""LoRA on text encoders: Stable Diffusion and SDXL train it, save what stock libraries load, and resume to the same bits."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from dpo_mm.config import TrainConfig
from dpo_mm.objectives import sigmoid
from dpo_mm.policies.adapters import KOHYA_FILE, LORA_FILE
from dpo_mm.policies.diffusion.text_encoder_lora import encoders_of, trained_model
from dpo_mm.policies.families import load_policy
from dpo_mm.training.builders import build_policy, validate_config
from dpo_mm.training.reference import adapter_off
from dpo_mm.training.run import dry_run, train
from tests.contracts.families import BUILDERS, WORDS
from tests.contracts.test_diffusion import encoded_rows, generate_images, upstream_images
from tests.unit.training.test_trainer import first_difference, weights

FAMILIES = {"stable-diffusion": ("text_encoder",), "sdxl": ("text_encoder", "text_encoder_2")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny pipeline per family. Encoders have two layers, because SDXL does not use the output of the last one."""
    made = {}
    for name, encoders in FAMILIES.items():
        folder = BUILDERS[name].build(tmp_path_factory.mktemp(name))
        for encoder in encoders:
            model: Any = getattr(transformers, json.loads((folder / "model_index.json").read_text())[encoder][1])
            config = model.config_class.from_pretrained(folder / encoder, num_hidden_layers=2)
            torch.manual_seed(0)
            model(config).save_pretrained(folder / encoder)
        made[name] = str(folder)
    return made


def prepared(folder: str, **changes: Any) -> Any:
    config = TrainConfig(folder, "-", "-", train_text_encoder=True, lora_rank=4, lora_alpha=8, **changes)
    policy = build_policy(config)
    policy.prepare(config)
    return policy


def token_rows(policy: Any) -> list[dict[str, Any]]:
    tokens = policy.stored_prompts([WORDS[n % len(WORDS)] for n in range(4)])
    return [{**row, "prompt": {k: v[n] for k, v in tokens.items()}} for n, row in enumerate(encoded_rows(policy))]


def move(modules: Any, by: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in (p for module in modules for p in module.parameters() if p.requires_grad):
        parameter.data += by * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_is_the_base_and_each_encoder_trains(family: str, folders: dict[str, str]) -> None:
    """Catches embeddings of another layer than the pipeline's, an encoder without gradient, and a reference with its LoRA."""
    policy = prepared(folders[family])
    assert policy.trained_encoders == FAMILIES[family]
    batch, cached = policy.collate(token_rows(policy)), policy.collate(encoded_rows(policy))
    reference = adapter_off(policy)(policy.model, batch)
    plain = load_policy(folders[family])
    plain.prepare(TrainConfig(folders[family], "-", "-"))
    expected = adapter_off(plain)(plain.model, cached)
    assert torch.equal(reference.chosen, expected.chosen) and torch.equal(reference.rejected, expected.rejected)
    ours = policy.log_probs(policy.model, batch)
    assert sigmoid(ours, reference, beta=5000).tolist() == pytest.approx([math.log(2)] * 4, abs=1e-6)
    for encoder in encoders_of(policy).values():
        before = policy.log_probs(policy.model, batch)
        move([encoder], 0.5)
        after = policy.log_probs(policy.model, batch)
        assert not torch.equal(after.chosen, before.chosen)
        after.chosen.sum().backward()
        used = [p for n, p in encoder.named_parameters() if p.requires_grad and p.grad is not None and p.grad.any()]
        assert used and {p.dtype for p in used} == {torch.float32}
    again = adapter_off(policy)(policy.model, batch)
    assert torch.equal(again.chosen, reference.chosen)
    trained = {n for n, p in trained_model(policy).named_parameters() if p.requires_grad}
    assert {name.split(".")[1] for name in trained if name.startswith("encoders")} == set(FAMILIES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_pipelines_load_the_saved_encoders(family: str, folders: dict[str, str], tmp_path: Path) -> None:
    policy = prepared(folders[family], lora_format="kohya")
    denoiser_only = [np.asarray(image, dtype=int) for part in generate_images(policy, 1.0) for image in part]
    move([trained_model(policy)])
    policy.save(tmp_path)
    ours = [np.asarray(image, dtype=int) for part in generate_images(policy, 1.0) for image in part]
    assert max(np.abs(a - b).max() for a, b in zip(ours, denoiser_only, strict=True)) > 5
    names = load_file(tmp_path / LORA_FILE)
    assert {name.partition(".")[0] for name in names} == {"unet", *FAMILIES[family]}
    prefixes = {re.match(r"lora_(unet|te\d?)", name)[0] for name in load_file(tmp_path / KOHYA_FILE)}  # type: ignore[index]
    assert prefixes == {"lora_unet", *(["lora_te"] if len(FAMILIES[family]) == 1 else ["lora_te1", "lora_te2"])}
    for file in (LORA_FILE, KOHYA_FILE):
        pipe: Any = DiffusionPipeline.from_pretrained(folders[family], safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        pipe.load_lora_weights(str(tmp_path), weight_name=file)
        stock = [np.asarray(image, dtype=int) for image in upstream_images(policy, pipe)]
        assert max(np.abs(a - b).max() for a, b in zip(stock, ours, strict=True)) == 0, file


@pytest.mark.slow
def test_runs_resume_to_the_same_bits_and_sample_with_the_trained_encoders(
    folders: dict[str, str], pairs: str, tmp_path: Path
) -> None:
    """With the empty prompt and samples, whose text encoders stay where they train. A moving reference includes the encoders."""
    settings: dict[str, Any] = {
        "model": folders["sdxl"], "pairs": pairs, "train_text_encoder": True, "steps": 3, "batch_size": 2, "log_every": 1,
        "save_every": 2, "eval_fraction": 0.2, "learning_rate": 1e-2, "proportion_empty_prompts": 0.2,
        "reference": "moving_average", "sample_prompts": str(tmp_path / "prompts.txt"), "num_inference_steps": 2,
    }  # fmt: skip
    (tmp_path / "prompts.txt").write_text(f"{WORDS[0]}\n")
    whole = train(TrainConfig(**settings, output_dir=str(tmp_path / "whole")))
    assert whole.history[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert whole.settings["text encoders"].startswith("LoRA on text_encoder, text_encoder_2")
    (tmp_path / "cut").mkdir()
    (whole.folder / "checkpoint-2").rename(tmp_path / "cut" / "checkpoint-2")
    cut = train(TrainConfig(**settings, output_dir=str(tmp_path / "cut"), resume=True))
    assert first_difference(weights(whole.folder), weights(cut.folder)) is None
    assert any(
        "text_encoder_2" in name and value.any() for name, value in weights(cut.folder).items() if "lora_B" in name
    )
    continued = build_policy(TrainConfig(**{**settings, "adapter": str(whole.folder), "output_dir": "-"}))
    rows = token_rows(continued)
    continued.prepare(TrainConfig(**{**settings, "adapter": str(whole.folder), "output_dir": "-"}))
    batch = continued.collate(rows)  # type: ignore[arg-type]
    before = adapter_off(continued)(continued.model, batch)
    assert torch.equal(before.chosen, continued.log_probs(continued.model, batch).chosen)
    move([trained_model(continued)])
    assert torch.equal(before.chosen, adapter_off(continued)(continued.model, batch).chosen)


@pytest.mark.slow
def test_plan_counts_the_encoders(folders: dict[str, str], pairs: str, tmp_path: Path) -> None:
    def trained(**changes: Any) -> int:
        summary = dry_run(TrainConfig(folders["sdxl"], pairs, str(tmp_path / "out"), **changes), vram=8)
        assert summary["fits"].startswith("fits 8 GB")
        return int(re.search(r"([\d,]+) trained", summary["tuning"])[1].replace(",", ""))  # type: ignore[index]

    assert trained(train_text_encoder=True) > trained() > 0


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "flux-dev",
            {},
            "train_text_encoder: Flux trains no text encoder, only StableDiffusion and StableDiffusionXL do",
        ),
        ("sdxl", {"reference": "frozen_copy"}, "train_text_encoder: reference frozen_copy copies the denoiser only"),
        ("sdxl", {"tuning": "full"}, "train_text_encoder has no effect, because tuning is full"),
    ],
)
def test_text_encoders_that_cannot_train_are_refused(
    family: str, changes: dict[str, Any], message: str, folders: dict[str, str], tmp_path: Path
) -> None:
    model = folders.get(family) or str(BUILDERS[family].build(tmp_path))
    with pytest.raises(ValueError, match=re.escape(message)):
        validate_config(TrainConfig(model, "-", "-", train_text_encoder=True, **changes))
