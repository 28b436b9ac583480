"""Merged exports of adapters on models in half precision, and of one adapter on another, give what the policy gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpo_mm.config import TrainConfig, as_dict
from dpo_mm.export.exporting import export
from dpo_mm.files.checksums import write_checksums
from dpo_mm.policies.families import load_policy
from dpo_mm.training.builders import build_policy
from dpo_mm.training.checkpoints import CONFIG_FILE
from tests.contracts import tiny_vlms
from tests.contracts.test_start_adapter import move, text_start

CASES = [("fp32", "stacked"), ("bf16", "continued"), ("bf16", "stacked")]


def policies(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """The base, a run's result on it, and the merged export, each loaded from its files. The result differs from its start."""
    policy: Any = build_policy(config)
    policy.prepare(config)
    move(policy, 0.05 if policy.modality == "text" else 0.02)
    (folder / "run").mkdir()
    policy.save(folder / "run")
    (folder / "run" / CONFIG_FILE).write_text(json.dumps(as_dict(config)))
    write_checksums(folder / "run")
    assert export(str(folder / "run"), "merged", str(folder / "merged"))["precision"] == config.precision
    places: dict[str, tuple[str, Path | None]] = {
        "base": (config.model, None),
        "run": (config.model, folder / "run"),
        "merged": (str(folder / "merged"), None),
    }
    return {
        name: load_policy(model, precision=config.precision, adapter=adapter, device="cpu")
        for name, (model, adapter) in places.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "result"), CASES)
def test_merged_pipeline_gives_the_pixels_of_the_policy(precision: str, result: str, tmp_path: Path) -> None:
    """Within 1 of 255 per pixel in float32. In bfloat16, which rounds the merged weights, within 2 of 255 on average."""
    config = TrainConfig(
        "shapes-sd", "-", "-", adapter="shapes-sd-faithful", adapter_result=result, precision=precision
    )
    images = {
        name: np.stack([
            np.asarray(image, dtype=int)
            for batch in policy.sample(["a red star", "two blue circles"], [5, 6], steps=3, guidance=3.0, batch_size=2)
            for image in batch
        ])
        for name, policy in policies(config, tmp_path).items()
    }  # fmt: skip
    error = np.abs(images["merged"] - images["run"])
    assert error.max() <= 1 if precision == "fp32" else error.mean() <= 2
    assert np.abs(images["base"] - images["run"]).mean() > 10


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "result"), CASES)
def test_merged_text_model_gives_the_tokens_of_the_policy(precision: str, result: str, tmp_path: Path) -> None:
    """In float32 the same tokens and log-probs within 1e-4 nats. In bfloat16 log-probs within 0.05 nats: the tokens are near ties."""
    model, adapter = text_start("llama", tmp_path)
    config = TrainConfig(model, "-", "-", beta=0.1, adapter=adapter, adapter_result=result, precision=precision)
    responses, log_probs = {}, {}
    for name, policy in policies(config, tmp_path).items():
        batch = policy.collate(policy.encode(tiny_vlms.rows("llama", (0, 0))))
        with torch.no_grad():
            log_probs[name] = policy.log_probs(policy.model, batch).chosen
        asked = policy.generate([[], []], ["a red star", "two"], max_new_tokens=12, do_sample=False, batch_size=2)
        responses[name] = [response.text for response in asked]
    assert precision == "bf16" or responses["merged"] == responses["run"] != responses["base"]
    tolerance = 1e-4 if precision == "fp32" else 0.05
    torch.testing.assert_close(log_probs["merged"], log_probs["run"], atol=tolerance, rtol=0)
    assert (log_probs["base"] - log_probs["run"]).abs().max() > 0.5
