"""Tests of rsLoRA and DoRA: what is saved gives the trained model's outputs in stock diffusers, kohya's formula and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_mm.config import TrainConfig
from dpo_mm.data.schema import make_response_rows
from dpo_mm.policies.adapters import KOHYA_FILE
from dpo_mm.policies.families import load_policy
from dpo_mm.policies.lora_layers import lora_layers
from dpo_mm.training.builders import validate_config
from dpo_mm.training.run import train
from tests.contracts.tiny_vlms import save

SETTINGS: dict[str, Any] = {"steps": 3, "batch_size": 4, "learning_rate": 0.05, "eval_fraction": 0.0, "log_every": 1}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["use_rslora", "use_dora"])
def test_saved_image_adapter_gives_the_trained_pixels(kind: str, tiny_model: str, pairs: str, tmp_path: Path) -> None:
    kohya: dict[str, Any] = {"lora_format": "kohya"} if kind == "use_rslora" else {}
    config = TrainConfig(tiny_model, pairs, str(tmp_path / "out"), lora_rank=8, **{kind: True}, **kohya, **SETTINGS)
    losses = [entry["loss"] for entry in train(config).history if "loss" in entry]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6) and losses[-1] != losses[0]
    policy = load_policy(tiny_model)
    base = next(policy.sample(["red"], [0], steps=2, guidance=1.0, batch_size=1))[0]
    policy.load_adapter(tmp_path / "out")
    ours = next(policy.sample(["red"], [0], steps=2, guidance=1.0, batch_size=1))[0]
    (scale,) = {layer.scaling["default"] for layer in lora_layers(policy.model)}
    assert scale == pytest.approx(16 / 8**0.5 if kind == "use_rslora" else 2.0)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    pipe.load_lora_weights(str(tmp_path / "out"))
    sample: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0}
    upstream = pipe("red", generator=torch.Generator().manual_seed(0), **sample).images[0]
    assert np.array_equal(np.asarray(ours), np.asarray(upstream)) and not np.array_equal(ours, base)
    if kohya:
        weights = load_file(tmp_path / "out" / KOHYA_FILE)
        alpha = next(value for name, value in weights.items() if name.endswith(".alpha"))
        assert float(alpha) / 8 == pytest.approx(scale)  # kohya's scripts divide by the rank


@pytest.mark.parametrize("kind", ["use_rslora", "use_dora"])
def test_saved_text_adapter_gives_the_trained_logits(kind: str, tmp_path: Path) -> None:
    model = save("llama", tmp_path / "model")
    rows = [{"id": str(n), "prompt": f"q {n}", "chosen": "a red", "rejected": "a dot"} for n in range(4)]
    make_response_rows(rows).to_parquet(tmp_path / "pairs.parquet")
    config = TrainConfig(
        model, str(tmp_path / "pairs.parquet"), str(tmp_path / "out"), beta=0.1, lora_rank=8, **{kind: True}, **SETTINGS
    )
    train(config)
    policy: Any = load_policy(model)
    policy.load_adapter(tmp_path / "out")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tmp_path / "out")
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        ours, upstream = policy.model(input_ids=ids).logits, peft.eval()(input_ids=ids).logits
        with policy.base_weights():
            base = policy.model(input_ids=ids).logits
    assert torch.equal(ours, upstream) and not torch.equal(ours, base)
    assert peft.peft_config["default"].use_rslora is (kind == "use_rslora")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True, "lora_format": "kohya"}, "lora_format 'kohya' does not go with use_dora"),
        ({"use_rslora": True, "tuning": "full"}, "use_rslora has no effect, because tuning is full"),
    ],
)
def test_kind_that_the_settings_exclude_is_refused(settings: dict[str, Any], message: str, tiny_model: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_config(TrainConfig(tiny_model, "pairs", "out", **settings))
