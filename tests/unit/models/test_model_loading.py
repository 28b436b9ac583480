"""A base without all of its weights is refused, with the names of the tensors; each library fills them with random numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dpo_mm.assets import resolve_asset
from dpo_mm.models.model_loading import check_report
from dpo_mm.models.quantization import empty_model
from dpo_mm.policies.families import load_policy


def edited(source: str, folder: Path, file: str, change: str) -> str:
    """A copy of a model with the tensors of one file changed."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / file)
    first, second = sorted(tensors)[:2]
    if change == "missing":
        del tensors[first], tensors[second]
    elif change == "shape":
        tensors[first] = torch.zeros(3, 5)
    else:
        tensors["stranger.weight"] = torch.zeros(2)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("change", ["missing", "shape", "does not have"])
@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("shapes-sd", "text_encoder/model.safetensors"),
        ("shapes-sd", "unet/diffusion_pytorch_model.safetensors"),
        ("shapes-sd", "vae/diffusion_pytorch_model.safetensors"),
        ("page-reader", "model.safetensors"),
    ],
)
def test_load_policy_refuses_a_base_with_wrong_weights(model: str, file: str, change: str, tmp_path: Path) -> None:
    broken = edited(resolve_asset(model), tmp_path / "broken", file, change)
    with pytest.raises(ValueError, match=change) as error:
        load_policy(broken)
    tensor = "stranger.weight" if change == "does not have" else "weight"
    assert tensor in str(error.value) and "\n" not in str(error.value)
    if model == "shapes-sd":
        assert file.split("/")[0] in str(error.value)


@pytest.mark.parametrize(
    ("model", "file"), [("shapes-sd", "unet/diffusion_pytorch_model.safetensors"), ("page-reader", "model.safetensors")]
)
@pytest.mark.parametrize("change", ["missing", "does not have"])
def test_load_policy_refuses_wrong_weights_of_a_model_that_it_quantises(
    model: str, file: str, change: str, tmp_path: Path
) -> None:
    broken = edited(resolve_asset(model), tmp_path / "broken", file, change)
    with pytest.raises(ValueError, match=change):
        load_policy(broken, quantize="int8", device="cpu")


def test_check_report_ignores_buffers_that_older_releases_saved() -> None:
    check_report({"unexpected_keys": {"text_model.embeddings.position_ids"}, "missing_keys": set()}, "model 'x'")
    with pytest.raises(ValueError, match=r"model 'x': tensors 4 missing \(a, b, c, \.\.\.\)"):
        check_report({"missing_keys": {"a", "b", "c", "d"}}, "model 'x'")


def test_empty_model_initialises_no_layer_and_counts_tied_weights_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda *_, **__: pytest.fail("a layer was initialised"))
    _, empty = empty_model(AutoModelForCausalLM, str(tmp_path), {})
    shapes, expected = ({name: p.shape for name, p in part.named_parameters()} for part in (empty, model))
    assert shapes == expected and all(parameter.is_meta for parameter in empty.parameters())
