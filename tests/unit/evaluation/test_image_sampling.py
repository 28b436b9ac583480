"""Image sampling: no image is generated or scored twice after an interruption, and settings identify an image."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from PIL import Image
from safetensors.torch import save_file

from dpo_mm import judges
from dpo_mm.config import CompareConfig
from dpo_mm.evaluation.compare_images import compare_images
from dpo_mm.evaluation.image_sampling import ImageSampler, SamplingPlan
from dpo_mm.evaluation.image_store import ImageStore
from dpo_mm.policies.adapters import LORA_FILE
from dpo_mm.policies.families import load_policy
from tests.contracts.families import WORDS
from tests.contracts.test_diffusion import config as train_config
from tests.contracts.test_diffusion import randomise_adapter

PLAN = SamplingPlan((WORDS[0], WORDS[0], WORDS[1], WORDS[1]), (1, 2, 3, 4), 2)
CONFIG = CompareConfig(
    model="-",
    output_dir="-",
    judges=("tests.unit.evaluation.test_image_sampling:brightness",),
    num_inference_steps=2,
    batch_size=3,
)
scored_prompts: list[str] = []


def brightness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    scored_prompts.extend(prompts)
    return [float(np.asarray(image).mean()) / 255 for image in images]


def no_number(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return [float("nan")] * len(images)


def too_few(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return [0.5]


@pytest.fixture
def counted(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A policy that lists the images that it generates in `.generated`, and an empty list of the judge's calls."""
    policy = load_policy(tiny_model)
    policy.generated = []
    real = policy.sample

    def sample(prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> Any:
        policy.generated += list(zip(prompts, seeds, strict=True))
        return real(prompts, seeds, **options)

    monkeypatch.setattr(policy, "sample", sample)
    scored_prompts.clear()
    return policy


def hashes(folder: Path) -> dict[tuple[str, int], str]:
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    return {(row["prompt"], row["seed"]): row["sha256"] for row in rows}


def test_only_missing_or_damaged_images_are_generated_again(counted: Any, tmp_path: Path) -> None:
    first = ImageSampler(counted, CONFIG, ImageStore(tmp_path)).generate(PLAN, scale=0.0, label="base")
    before = hashes(tmp_path)
    assert len(counted.generated) == 4 and len(scored_prompts) == 4 and len(before) == 4
    again = ImageSampler(counted, CONFIG, ImageStore(tmp_path)).generate(PLAN, scale=0.0, label="base")
    assert len(counted.generated) == 4 and len(scored_prompts) == 4
    assert np.array_equal(first.scores[CONFIG.judges[0]], again.scores[CONFIG.judges[0]])
    files = [file for file in first.images.files]  # type: ignore[attr-defined]
    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:-20])
    ImageSampler(counted, CONFIG, ImageStore(tmp_path)).generate(PLAN, scale=0.0, label="base")
    assert counted.generated[4:] == [(WORDS[0], 1), (WORDS[0], 2), (WORDS[1], 3)] and len(scored_prompts) == 4
    assert hashes(tmp_path) == before


def test_redrawn_image_has_its_old_batch_and_another_batch_size_another_key(counted: Any, tmp_path: Path) -> None:
    """It catches a damaged image that is redrawn in a batch of its own, where rounding gives other pixels."""
    store = ImageStore(tmp_path)
    images = ImageSampler(counted, CONFIG, store).generate(PLAN, scale=0.0, label="base").images
    images.files[1].write_bytes(b"damaged")  # type: ignore[attr-defined]
    sizes: list[int] = []
    real = counted.sample
    counted.sample = lambda prompts, seeds, **options: sizes.append(len(prompts)) or real(prompts, seeds, **options)
    ImageSampler(counted, CONFIG, store).generate(PLAN, scale=0.0, label="base")
    assert sizes == [3]
    ImageSampler(counted, dataclasses.replace(CONFIG, batch_size=2), store).generate(PLAN, scale=0.0, label="base")
    assert sizes == [3, 2, 2] and len(store.rows) == 8


def test_other_sampling_settings_give_other_images(counted: Any, tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    for change in ({}, {"num_inference_steps": 3}, {"guidance_scale": 1.0}, {}):
        config = dataclasses.replace(CONFIG, **change)
        ImageSampler(counted, config, store).generate(PLAN, scale=0.0, label="base")
    assert len(counted.generated) == 12 and len(set(store.rows)) == 12


def test_base_settings_are_equal_with_and_without_adapter(counted: Any, tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "pictures")
    ImageSampler(counted, CONFIG, store).generate(PLAN, scale=0.0, label="base")
    counted.prepare(train_config())
    randomise_adapter(counted)
    counted.save(tmp_path / "adapter")
    tuned = load_policy(counted.source)
    tuned.load_adapter(tmp_path / "adapter")
    sampler = ImageSampler(tuned, CONFIG, store, str(tmp_path / "adapter"))
    bare, adapted = sampler.settings(0.0), sampler.settings(1.0)
    assert ImageStore.key(bare, "x", 1) == ImageStore.key(
        ImageSampler(load_policy(counted.source), CONFIG, store).settings(0.0), "x", 1
    )
    assert adapted["weights"] != bare["weights"] and adapted["adapter"] and bare["adapter"] is None
    assert bare["scheduler"].split()[0] == type(tuned.scheduler).__name__ and bare["dtype"] == "float32"
    assert all(f"{name} " in bare["libraries"] for name in ("torch", "diffusers", "dpo-mm"))


def save_lora(pipe: Any, folder: Path, parts: dict[str, list[str]]) -> Path:
    """Save a LoRA that changes these modules of these parts of a pipeline, as diffusers' DreamBooth script does."""
    torch.manual_seed(3)
    layers = {}
    for part, targets in parts.items():
        model = getattr(pipe, part)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), model)
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(model, adapter_name="default")
    type(pipe).save_lora_weights(folder, **layers)
    return folder


def save_pipeline(pipe: Any, folder: Path, part: str) -> Path:
    """Save a pipeline with noise on the weights of one part."""
    torch.manual_seed(3)
    for parameter in getattr(pipe, part).parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    pipe.save_pretrained(folder)
    return folder


def generated(policy: Any, scale: float) -> list[bytes]:
    batches = policy.sample(WORDS[:2], [5, 6], steps=2, guidance=2.0, batch_size=2, scale=scale)
    return [image.tobytes() for batch in batches for image in batch]


UNET, TEXT = ["to_q", "to_v"], ["q_proj", "out_proj"]


@pytest.mark.parametrize(
    "save",
    [
        lambda pipe, folder: save_lora(pipe, folder, {"unet": UNET, "text_encoder": TEXT}),
        lambda pipe, folder: save_lora(pipe, folder, {"text_encoder": TEXT}),
        lambda pipe, folder: save_pipeline(pipe, folder, "text_encoder"),
        lambda pipe, folder: save_pipeline(pipe, folder, "vae"),
    ],
    ids=["LoRA of both", "LoRA of the text encoder", "text encoder", "VAE"],
)
def test_base_is_the_base_and_tuned_is_all_of_the_tuned_pipeline(save: Any, tiny_model: str, tmp_path: Path) -> None:
    """Fails if only the denoiser is switched: the base has the text encoder's LoRA, or the tuned VAE is not used."""
    base, policy = load_policy(tiny_model), load_policy(tiny_model)
    expected = generated(base, 1.0)
    policy.load_adapter(save(load_policy(tiny_model).pipe, tmp_path / "adapter"))
    first, tuned, again = (generated(policy, scale) for scale in (0.0, 1.0, 0.0))
    assert first == again == expected and not set(tuned) & set(expected)
    samplers = [ImageSampler(each, CONFIG, ImageStore(tmp_path / "images")) for each in (base, policy)]
    keys = [ImageStore.key(sampler.settings(scale), "x", 1) for sampler in samplers for scale in (0.0, 1.0)]
    assert keys[0] == keys[2] and keys[3] != keys[2]


def test_tuned_pipeline_has_its_own_scheduler(tiny_model: str, tmp_path: Path) -> None:
    """Fails if the base's scheduler generates the images of a pipeline that predicts v."""
    tuned, policy = load_policy(tiny_model), load_policy(tiny_model)
    config = {**tuned.pipe.scheduler.config, "prediction_type": "v_prediction"}
    tuned.pipe.scheduler = type(tuned.pipe.scheduler).from_config(config)
    tuned.pipe.save_pretrained(tmp_path)
    policy.load_adapter(tmp_path)
    assert generated(policy, 1.0) == generated(load_policy(str(tmp_path)), 1.0) != generated(policy, 0.0)
    settings = [ImageSampler(policy, CONFIG, ImageStore(tmp_path / "i")).settings(scale) for scale in (0.0, 1.0)]
    assert settings[0]["scheduler"] != settings[1]["scheduler"]


def test_adapter_that_fits_no_weight_or_another_pipeline_class_raises(tiny_model: str, tmp_path: Path) -> None:
    policy = load_policy(tiny_model)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(ValueError, match=r"is a StableDiffusionXLPipeline, but the model .* is a StableDiffusionPipe"):
        policy.load_adapter(tmp_path / "other")
    save_file({"transformer.x.lora_A.weight": torch.ones(1, 1)}, tmp_path / LORA_FILE)
    with pytest.raises(ValueError, match=r"no weight in .*safetensors fits"):
        policy.load_adapter(tmp_path)


def test_judge_with_changed_card_scores_again(counted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ImageSampler(counted, CONFIG, ImageStore(tmp_path)).generate(PLAN, scale=0.0, label="base")
    monkeypatch.setattr(judges, "judge_card", lambda name: {"name": name, "code_sha256": "another"})
    ImageSampler(counted, CONFIG, ImageStore(tmp_path)).generate(PLAN, scale=0.0, label="base")
    assert len(counted.generated) == 4 and len(scored_prompts) == 8


@pytest.mark.parametrize(
    ("judge", "message"), [("no_number", "returned nan for prompt"), ("too_few", "returned 1 scores for 4")]
)
def test_invalid_scores_raise_with_the_judge_name(judge: str, message: str, counted: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, judges=(f"tests.unit.evaluation.test_image_sampling:{judge}",))
    with pytest.raises(ValueError, match=message):
        ImageSampler(counted, config, ImageStore(tmp_path)).generate(PLAN, scale=0.0, label="base")


def test_balanced_plan_weighs_categories_equally() -> None:
    plan = SamplingPlan(("a", "b", "c", "d"), (1, 2, 3, 4), 1, ("x", "x", "x", "y"), balanced=True)
    assert plan.weights == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1])
    assert SamplingPlan(("a", "b"), (1, 2), 1, ("x", "y")).weights is None
    assert plan.first(1).categories == plan.categories and plan.first(1).balanced


def test_repeated_comparison_generates_nothing_and_gives_the_same_result(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(WORDS) + "\n")
    config = dataclasses.replace(
        CONFIG,
        model=tiny_model,
        output_dir=str(tmp_path / "out"),
        prompts=str(tmp_path / "prompts.txt"),
        images_per_prompt=2,
    )
    found = compare_images(config, title="t", command="c")
    assert found.verdict == "no evidence" and len(scored_prompts) > 0
    assert len(list((tmp_path / "out" / "pictures" / "base").glob("*.png"))) == 2 * len(WORDS)
    monkeypatch.setattr(ImageSampler, "_generate_batch", lambda self, batch, scale: pytest.fail("generated again"))
    again = compare_images(dataclasses.replace(config, save_images=False), title="t", command="c")
    assert again.comparisons == found.comparisons
    assert not (tmp_path / "out" / "pictures").exists() and again.report.exists()
