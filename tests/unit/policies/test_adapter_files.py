"""Equal runs write adapters of equal bytes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dpo_mm.policies.adapters import sort_metadata, sort_sets


def test_metadata_is_sorted_and_the_tensors_are_unchanged(tmp_path: Path) -> None:
    """Mutation that it catches: the random order of safetensors' metadata, or a header of another length."""
    file, metadata = tmp_path / "lora.safetensors", {"format": "pt", "config": '{"é": "\\\\\\n"}', "a": "\x07\u2028"}
    tensors = {"unet.ü": torch.arange(5.0), "b": torch.ones(3, dtype=torch.int8)}
    written = set()
    for _ in range(10):
        save_file(tensors, file, metadata)
        size = file.stat().st_size
        sort_metadata(file)
        assert file.stat().st_size == size
        written.add(file.read_bytes())
    assert len(written) == 1 and all(torch.equal(load_file(file)[name], tensors[name]) for name in tensors)
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    assert list(header["__metadata__"]) == sorted(metadata)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == metadata


def test_sets_of_a_config_are_sorted(tmp_path: Path) -> None:
    """Mutation that it catches: PEFT turns lists into sets, whose order depends on PYTHONHASHSEED."""
    config = LoraConfig(target_modules=["to_v", "to_q", "to_out.0", "to_k", "proj"])
    assert isinstance(config.target_modules, set)
    sort_sets(config)
    config.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["target_modules"] == ["proj", "to_k", "to_out.0", "to_q", "to_v"]
