"""LoRAs that other scripts write as the start of a run: kohya's files, text encoders, several ranks, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from dpo_mm.config import TrainConfig
from dpo_mm.policies.adapter_sources import find_adapter
from dpo_mm.policies.adapters import KOHYA_FILE, LORA_FILE, kohya_weights, saved_lora
from dpo_mm.policies.families import load_policy, policy_class
from dpo_mm.policies.lora_layers import FROZEN, lora_layers
from dpo_mm.training.builders import build_policy, validate_config
from dpo_mm.training.run import dry_run
from tests.contracts import tiny_vlms
from tests.contracts.families import WORDS


def config(model: str, adapter: Any, **changes: Any) -> TrainConfig:
    return TrainConfig(model=model, pairs="-", output_dir="-", adapter=str(adapter), **changes)


def adapt(part: Any, targets: list[str], **settings: Any) -> None:
    torch.manual_seed(3)
    inject_adapter_in_model(LoraConfig(r=3, target_modules=targets, init_lora_weights=False, **settings), part)


def kohya_file(model: str, folder: Path) -> Path:
    """A LoRA of denoiser, convolutions (LoCon) and text encoder with several ranks and alphas, in kohya's format."""
    pipe: Any = load_policy(model).pipe
    patterns = {"rank_pattern": {"to_v": 2, "conv1": 4}, "alpha_pattern": {"to_k": 1.5, "conv1": 2}}
    adapt(pipe.unet, ["to_q", "to_k", "to_v", "conv1"], lora_alpha=6, **patterns)
    adapt(pipe.text_encoder, ["q_proj", "out_proj", "fc1"], lora_alpha=2)
    parts = {"lora_unet": pipe.unet, "lora_te_text_model": pipe.text_encoder}
    file = folder / "mine.safetensors"
    save_file(
        {k: v for prefix, part in parts.items() for k, v in kohya_weights(saved_lora(part), prefix).items()}, file
    )
    return file


def stock_embeds(model: str, *, adapter: Path | None = None) -> torch.Tensor:
    pipe: Any = DiffusionPipeline.from_pretrained(model)
    if adapter:
        pipe.load_lora_weights(str(adapter.parent), weight_name=adapter.name)
    with torch.no_grad():
        return pipe.encode_prompt(WORDS[:1], "cpu", 1, False)[0]


def test_kohya_file_with_a_text_encoder_is_continued_and_saved_whole(tiny_model: str, tmp_path: Path) -> None:
    """The prompts are encoded with the text encoder's LoRA, and the result has all parts with their ranks and alphas."""
    start = kohya_file(tiny_model, tmp_path)
    settings = config(tiny_model, start, lora_format="kohya")
    policy: Any = build_policy(settings)
    expected = stock_embeds(tiny_model, adapter=start)
    assert torch.equal(policy.encode_prompts(WORDS[:1])["embeds"], expected)
    assert not torch.allclose(expected, stock_embeds(tiny_model))
    assert policy.fingerprint() != load_policy(tiny_model).fingerprint()
    policy.free_encoders()
    policy.prepare(settings)
    (tmp_path / "out").mkdir()
    policy.save(tmp_path / "out")
    theirs, ours = load_file(start), load_file(tmp_path / "out" / KOHYA_FILE)
    assert theirs.keys() == ours.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in theirs if "alpha" not in name
    )
    again: Any = load_policy(tiny_model, adapter=tmp_path / "out")
    assert torch.equal(again.encode_prompts(WORDS[:1])["embeds"], expected)
    attached: Any = load_policy(tiny_model, adapter=start)
    for one, other in ((again.pipe.unet, attached.pipe.unet), (policy.pipe.unet, attached.pipe.unet)):
        scales = [
            {name: layer.scaling["default"] for name, layer in each.named_modules() if hasattr(layer, "scaling")}
            for each in (one, other)
        ]
        assert scales[0] == scales[1] and len({*scales[0].values()}) > 2
    policy.load_weights(tmp_path / "out")


def test_merged_text_encoder_lora_encodes_like_the_attached_one(tiny_model: str, tmp_path: Path) -> None:
    start = kohya_file(tiny_model, tmp_path)
    policy: Any = build_policy(config(tiny_model, start, adapter_result="stacked"))
    expected = stock_embeds(tiny_model, adapter=start)
    torch.testing.assert_close(policy.encode_prompts(WORDS[:1])["embeds"], expected, atol=1e-5, rtol=1e-5)
    assert not lora_layers(policy.pipe.unet) and not lora_layers(policy.pipe.text_encoder)


def test_dora_is_trained_next_to_a_frozen_copy(tmp_path: Path) -> None:
    model, adapter = text_adapter(tmp_path, use_dora=True, lora_dropout=0.3)
    policy: Any = build_policy(config(model, adapter, beta=0.1))
    rows = policy.encode(tiny_vlms.rows("llama", (0, 0)))
    policy.prepare(config(model, adapter, beta=0.1))
    policy.model.train()
    batch = policy.collate(rows)
    with torch.no_grad(), policy.adapter_off():
        before = policy.log_probs(policy.model, batch).chosen
    assert torch.equal(policy.log_probs(policy.model, batch).chosen, before)
    trained = [name for name, parameter in policy.model.named_parameters() if parameter.requires_grad]
    assert any("magnitude" in name for name in trained) and not any(FROZEN in name for name in trained)


def text_adapter(folder: Path, **settings: Any) -> tuple[str, Path]:
    """A tiny language model, and an adapter as TRL or LLaMA-Factory saves it."""
    model = tiny_vlms.save("llama", folder / "model")
    lora = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    adapted = get_peft_model(tiny_vlms.build("llama")[0], LoraConfig(**{"init_lora_weights": False, **lora}))
    adapted.save_pretrained(str(folder / "adapter"))
    return model, folder / "adapter"


@pytest.mark.parametrize(
    ("lora", "settings", "message"),
    [
        ({}, {"lora_rank": 8}, "lora_rank is 8, but adapter '.*' has 3. Leave lora_rank out"),
        ({}, {"lora_alpha": 8}, "lora_alpha is 8, but adapter '.*' has 6"),
        ({}, {"lora_targets": ("k_proj",)}, "lora_targets are not those of adapter"),
        ({"modules_to_save": ["lm_head"]}, {}, "has modules_to_save, which cannot be trained next to a frozen copy"),
        ({"bias": "lora_only"}, {}, "has bias lora_only, which cannot be trained"),
        ({}, {"train_vision_tower": True}, "train_vision_tower: adapter '.*' has no layer in the vision tower"),
    ],
)
def test_adapter_that_does_not_fit_the_settings_is_refused(
    lora: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model, adapter = text_adapter(tmp_path, **lora)
    with pytest.raises(ValueError, match=message):
        build_policy(config(model, adapter, beta=0.1, **settings))


def test_modules_to_save_are_merged_with_stacked(tmp_path: Path) -> None:
    model, adapter = text_adapter(tmp_path, modules_to_save=["lm_head"])
    head = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in head if "lm_head" in name)
    save_file({**head, name: head[name] + 1}, adapter / "adapter_model.safetensors")
    policy: Any = build_policy(config(model, adapter, beta=0.1, adapter_result="stacked"))
    assert torch.equal(policy.model.lm_head.weight, head[name] + 1) and not isinstance(policy.model, PeftModel)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "has no adapter_config.json and no safetensors file"),
        (
            lambda folder: [save_file({"a": torch.ones(1)}, folder / f"{n}.safetensors") for n in "ab"],
            r"has 2 safetensors files \(a.safetensors, b.safetensors\). Name the file",
        ),
        (lambda folder: (folder / "model_index.json").write_text("{}"), "is a whole model. Give it as model"),
        (lambda folder: (folder / LORA_FILE).write_bytes(b"x" * 40), "not a complete safetensors file"),
        (
            lambda folder: save_file({"lora_unet_a.hada_w1_a": torch.ones(2, 2)}, folder / LORA_FILE),
            "has LoHa weights .*hada_w1_a",
        ),
        (
            lambda folder: save_file(
                {"lora_unet_a.lora_down.weight": torch.ones(2, 2), "lora_unet_a.dora_scale": torch.ones(2)},
                folder / LORA_FILE,
            ),
            "dora_scale",
        ),
        (
            lambda folder: save_file(
                {"text_encoder_9.x.lora_A.weight": torch.ones(2, 2), "unet.x.lora_A.weight": torch.ones(2, 2)},
                folder / LORA_FILE,
            ),
            "text_encoder_9.x.lora_A.weight",
        ),
        (
            lambda folder: save_file(
                {
                    "unet.mid_block.nothing.lora_A.weight": torch.ones(2, 2),
                    "unet.mid_block.nothing.lora_B.weight": torch.ones(2, 2),
                },
                folder / LORA_FILE,
            ),
            "nothing",
        ),
        (
            lambda folder: save_file(
                {"lora_unet_x.lora_down.weight": torch.ones(2, 2), "lora_unet_x.something": torch.ones(2, 2)},
                folder / LORA_FILE,
            ),
            "something|lora_up",
        ),
    ],
)
def test_files_that_are_no_adapter_of_the_model_are_refused_in_one_line(
    make: Callable[[Path], Any], message: str, tiny_model: str, tmp_path: Path
) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        validate_config(config(tiny_model, tmp_path))
        build_policy(config(tiny_model, tmp_path))
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


def test_adapter_of_another_family_or_size_is_refused(tiny_model: str, tmp_path: Path) -> None:
    model, adapter = text_adapter(tmp_path)
    with pytest.raises(ValueError, match="adapter"):
        build_policy(config(tiny_model, adapter))
    image = kohya_file(tiny_model, tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        build_policy(config(model, image, beta=0.1))
    weights = {
        name: torch.cat([value, value], 1) if "to_q.lora_down" in name.replace("_to_q.", ".to_q.") else value
        for name, value in load_file(image).items()
    }
    save_file(weights, image)
    with pytest.raises(ValueError, match=r"adapter .*size mismatch"):
        build_policy(config(tiny_model, image))


def test_missing_adapter_and_unreachable_hub_id_are_named() -> None:
    with pytest.raises(ValueError, match=r"model 'my models' does not exist\. Expected a folder"):
        policy_class("my models")
    with pytest.raises(ValueError, match=r"adapter 'nowhere' does not exist\. Expected a folder"):
        find_adapter("nowhere")
    with pytest.raises(ValueError, match="adapter 'owner/name' is neither a folder nor reachable on the hub"):
        find_adapter("owner/name")


@pytest.mark.slow
def test_dry_run_names_the_adapter(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    start = kohya_file(tiny_model, tmp_path)
    for result, how in (
        ("continued", "trained further, rank 3"),
        ("stacked", "merged into the model, with a new LoRA"),
    ):
        changes = {"pairs": pairs, "adapter_result": result, "output_dir": str(tmp_path / "out")}
        summary = dry_run(TrainConfig(**{**vars(config(tiny_model, start)), **changes}))
        assert f"{start}, sha256 " in summary["adapter"] and how in summary["adapter"]
        assert json.dumps(summary)
