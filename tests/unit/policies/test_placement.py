"""Components are on the device one after the other: text encoders, autoencoder, denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dpo_mm.config import TrainConfig
from dpo_mm.policies.diffusion import diffusion_policy, placement
from dpo_mm.training.builders import build_policy
from dpo_mm.training.encoding import encode_splits


def test_encoding_has_one_kind_of_component_on_the_device_at_a_time(
    tiny_model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is recorded, not real. The peak is that of the largest component, not the sum."""
    monkeypatch.setenv("DPO_MM_CACHE", str(tmp_path))
    size: dict[str, int] = {}
    present: set[str] = set()
    seen: list[tuple[str, set[str]]] = []

    def record(modules: Mapping[str, nn.Module], device: torch.device) -> None:
        size.update({name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()})
        present.difference_update(modules)
        present.update(modules if device.type != "cpu" else ())

    monkeypatch.setattr(placement, "move", record)
    monkeypatch.setattr(diffusion_policy, "move", record)
    policy: Any = build_policy(TrainConfig(model=tiny_model, pairs=pairs, output_dir="o"))
    assert present == set()
    policy.home = torch.device("meta")
    monkeypatch.setattr(type(policy), "device", torch.device("cpu"))
    for name in ("encode_prompts", "encode_images"):
        encoded = getattr(policy, name)
        monkeypatch.setattr(
            policy, name, lambda *args, name=name, encode=encoded: seen.append((name, set(present))) or encode(*args)
        )
    splits = encode_splits(policy, TrainConfig(model=tiny_model, pairs=pairs, output_dir="o"))
    assert len(splits.rows) == 12 and present == set()
    assert {(name, *components) for name, components in seen} == {
        ("encode_prompts", "text_encoder"),
        ("encode_images", "vae"),
    }
    policy.free_encoders()
    assert present == {"unet"} and policy.vae is None and policy.pipe.text_encoder is None and policy.home is None
    assert max(size.values()) < sum(size.values())
