"""Contracts of a start from an adapter, for every image family and for text."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from dpo_mm.config import TrainConfig
from dpo_mm.data.schema import make_response_rows
from dpo_mm.objectives import sigmoid
from dpo_mm.policies.families import load_policy
from dpo_mm.policies.vlm.vlm_policy import VisionLanguage
from dpo_mm.training.builders import build_policy
from dpo_mm.training.reference import adapter_off
from dpo_mm.training.run import train
from tests import forked
from tests.contracts import tiny_vlms
from tests.contracts.families import BUILDERS
from tests.contracts.test_diffusion import (
    copy_with_denoiser,
    encoded_rows,
    generate_images,
    randomise_adapter,
    upstream_images,
    upstream_pipeline,
)

RESULTS = ("continued", "stacked")
QUICK = ("stable-diffusion", "llama", "qwen2_5_vl")
"""Families of the quick tests. The others are slow."""
LN2 = torch.tensor(2.0).log()


def families(names: list[str]) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


class Start(NamedTuple):
    """A family's model, an adapter of it, and the policy that saved the adapter."""

    model: str
    adapter: str
    policy: Any


@pytest.fixture(scope="module")
def starts(folders: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Start]:
    @functools.cache
    def start(family: str) -> Start:
        model, adapter = folders(family), tmp_path_factory.mktemp("adapter")
        policy: Any = load_policy(model, resolution=BUILDERS[family].size)
        policy.prepare(TrainConfig(model=model, pairs="-", output_dir="-", lora_rank=3, lora_alpha=6))
        randomise_adapter(policy)
        policy.save(adapter)
        return Start(model, str(adapter), policy)

    return start


class Attached(NamedTuple):
    """Encoded rows of a family, their log-probs under the policy that saved its adapter, and the model in stock diffusers."""

    rows: list[dict[str, Any]]
    log_probs: torch.Tensor
    upstream: Any


@pytest.fixture(scope="module")
def attached(starts: Callable[[str], Start]) -> Callable[[str], Attached]:
    @functools.cache
    def of_family(family: str) -> Attached:
        model, _, policy = starts(family)
        policy.frames = BUILDERS[family].frames
        rows = encoded_rows(policy, 2)
        with torch.no_grad():
            log_probs = policy.log_probs(policy.model, policy.collate(rows)).chosen
        return Attached(rows, log_probs, upstream_pipeline(model, BUILDERS[family]))

    return of_family


def move(policy: Any, by: float = 0.05) -> None:
    """Change what trains of a policy."""
    generator = torch.Generator().manual_seed(5)
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data += by * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("family", families(sorted(BUILDERS)))
def test_image_run_starts_at_the_adapter_and_saves_what_stock_diffusers_loads(
    family: str,
    result: str,
    starts: Callable[[str], Start],
    attached: Callable[[str], Attached],
    tmp_path: Path,
) -> None:
    (model, adapter, _), size = starts(family), BUILDERS[family].size
    rows, expected, upstream = attached(family)
    config = TrainConfig(
        model=model, pairs="-", output_dir="-", adapter=adapter, adapter_result=result, resolution=size
    )
    policy: Any = build_policy(config)
    policy.frames = BUILDERS[family].frames
    policy.prepare(config)
    batch = policy.collate(rows)
    reference, ours = adapter_off(policy)(policy.model, batch), policy.log_probs(policy.model, batch)
    assert torch.equal(sigmoid(ours, reference, beta=5000), LN2.expand(2))
    torch.testing.assert_close(ours.chosen, expected, atol=0 if result == "continued" else 1e-6, rtol=0)
    move(policy)
    assert torch.equal(adapter_off(policy)(policy.model, batch).chosen, reference.chosen)
    assert not torch.allclose(policy.log_probs(policy.model, batch).chosen, ours.chosen)
    policy.save(tmp_path)
    pipe = copy_with_denoiser(upstream, upstream)
    exec("\n".join(policy.usage_snippet("-", str(tmp_path))[1:]), {"pipe": pipe, "PeftModel": PeftModel})
    parts = [upstream_images(policy, pipe, count=1, steps=2), *generate_images(policy, 1.0, count=1, steps=2)]
    stock, ours_images = ([np.asarray(image, dtype=int) for image in part] for part in parts)
    tolerance = 0 if result == "continued" else 1  # a merged start is that of two adapters within rounding
    assert max(np.abs(a - b).max() for a, b in zip(stock, ours_images, strict=True)) <= tolerance


@pytest.mark.slow
def test_run_on_a_quantised_base_starts_at_the_adapter(starts: Callable[[str], Start], tmp_path: Path) -> None:
    model, adapter, _ = starts("flux-dev")
    config = TrainConfig(
        model=model, pairs="-", output_dir="-", adapter=adapter, quantize="int8", resolution=BUILDERS["flux-dev"].size
    )
    policy: Any = build_policy(config)
    rows = encoded_rows(policy, 2)
    policy.prepare(config)
    batch = policy.collate(rows)
    reference, ours = adapter_off(policy)(policy.model, batch), policy.log_probs(policy.model, batch)
    assert torch.equal(sigmoid(ours, reference, beta=5000), LN2.expand(2))
    move(policy)
    moved = policy.log_probs(policy.model, batch).chosen
    assert torch.equal(adapter_off(policy)(policy.model, batch).chosen, reference.chosen)
    assert not torch.allclose(moved, ours.chosen)
    policy.save(tmp_path)
    again: Any = load_policy(model, quantize="int8", adapter=tmp_path, resolution=BUILDERS["flux-dev"].size)
    again.config = config
    with torch.no_grad():
        torch.testing.assert_close(again.log_probs(again.model, batch).chosen, moved.detach())


def text_start(family: str, folder: Path) -> tuple[str, str]:
    """Save a text model and an adapter of it, as PEFT does."""
    model, processor = tiny_vlms.build(family)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    policy = VisionLanguage(model, processor, family)
    policy.prepare(TrainConfig(model="-", pairs="-", output_dir="-", beta=0.1, lora_rank=3, lora_alpha=6))
    move(policy)
    policy.save(folder / "adapter")
    return str(folder / "model"), str(folder / "adapter")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A text model and an adapter of it. No test changes their files."""
    return text_start("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("family", families(sorted((*tiny_vlms.IMAGES, "llama"))))
def test_text_run_starts_at_the_adapter_and_saves_what_stock_peft_loads(family: str, tmp_path: Path) -> None:
    """Sequences are separate, because test_vlm holds that a shared prefix gives the same. They are checked in the first run."""
    model, adapter = text_start(family, tmp_path)
    images = (1, 2) if family in tiny_vlms.IMAGES else (0, 0)
    attached = PeftModel.from_pretrained(tiny_vlms.build(family)[0], adapter).eval()
    checked: Any = None
    for result in RESULTS:
        start: dict[str, Any] = {"adapter": adapter, "adapter_result": result}
        config = TrainConfig(model=model, pairs="-", output_dir="-", beta=0.1, pair_layout="separate", **start)
        policy: Any = build_policy(config)
        if checked:
            policy.token_log_probs, policy.features_are_exact = checked.token_log_probs, checked.features_are_exact
        else:
            encoded = policy.encode(tiny_vlms.rows(family, images))
        checked = policy
        batch = policy.collate(encoded)
        policy.prepare(config)
        policy.model.train()
        reference, ours = adapter_off(policy)(policy.model, batch), policy.log_probs(policy.model, batch)
        assert torch.equal(sigmoid(ours, reference, beta=0.1), LN2.expand(2))
        with torch.no_grad():
            expected = policy.log_probs(attached, batch).chosen
        torch.testing.assert_close(ours.chosen, expected, atol=1e-5, rtol=0 if result == "continued" else 1e-6)
        move(policy)
        assert torch.equal(adapter_off(policy)(policy.model, batch).chosen, reference.chosen)
        after = policy.log_probs(policy.model, batch).chosen
        assert not torch.allclose(after, ours.chosen)
        saved = tmp_path / result
        policy.save(saved)
        upstream = tiny_vlms.build(family)[0]
        if result == "stacked":
            upstream = PeftModel.from_pretrained(upstream, saved / "start_adapter").merge_and_unload()
        stock = PeftModel.from_pretrained(upstream, saved).eval()
        torch.testing.assert_close(policy.log_probs(stock, batch).chosen, after, atol=1e-5, rtol=1e-6)
    loaded: Any = load_policy(model, adapter=saved)  # of the stacked run: `attached` is of one that is not
    torch.testing.assert_close(policy.log_probs(loaded.model, batch).chosen, after, atol=1e-5, rtol=1e-6)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def first_losses(folder: Path) -> list[float]:
    log = json.loads((folder / "training_log.json").read_text())["history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def response_pairs(folder: Path) -> str:
    make_response_rows(tiny_vlms.rows("llama", (0,) * 6)).to_parquet(str(folder / "pairs.parquet"))
    return str(folder / "pairs.parquet")


SHORT: dict[str, Any] = {
    "steps": 3, "batch_size": 2, "log_every": 1, "save_every": 2, "eval_fraction": 0.0, "learning_rate": 1e-2
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["adapter_off", "precomputed", "moving_average", "synced"])
@pytest.mark.parametrize("modality", ["image", "text"])
def test_every_reference_starts_at_the_adapter_and_a_resumed_run_gives_the_same_bits(
    modality: str,
    reference: str,
    starts: Callable[[str], Start],
    llama: tuple[str, str],
    pairs: str,
    tmp_path: Path,
) -> None:
    if modality == "image":
        model, adapter, _ = starts("stable-diffusion")
        settings = {"pairs": pairs, **({"fixed_draws_per_row": 1} if reference == "precomputed" else {})}
    else:
        model, adapter = llama
        settings = {"pairs": response_pairs(tmp_path), "beta": 0.1}
    settings |= {"model": model, "adapter": adapter, "reference": reference, **SHORT}
    whole = train(TrainConfig(**settings, output_dir=str(tmp_path / "whole"))).folder
    assert (
        first_losses(whole)[0] == pytest.approx(math.log(2), abs=1e-7)
        and first_losses(whole)[1] != first_losses(whole)[0]
    )
    (tmp_path / "cut").mkdir()
    (whole / "checkpoint-2").rename(tmp_path / "cut" / "checkpoint-2")
    cut = train(TrainConfig(**settings, output_dir=str(tmp_path / "cut"), resume=True)).folder
    ours, again, start = tensors(whole), tensors(cut), tensors(Path(adapter))
    assert ours.keys() == again.keys() == start.keys() and all(torch.equal(ours[name], again[name]) for name in ours)
    assert any(not torch.equal(ours[name], start[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sigmoid", "sft"])
def test_two_processes_give_the_losses_of_one_from_an_adapter(
    objective: str, llama: tuple[str, str], tmp_path: Path
) -> None:
    """The responses have unequal lengths. Catches a loss that depends on how rows are spread over processes."""
    model, adapter = llama
    settings = {"model": model, "adapter": adapter, "pairs": response_pairs(tmp_path), "objective": objective, **SHORT}
    settings |= {"beta": 0.1} if objective == "sigmoid" else {}
    train(TrainConfig(**{**settings, "batch_size": 4}, output_dir=str(tmp_path / "one")))
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(settings))
    forked.run_together("train", str(tmp_path / "two.yaml"), "--output-dir", str(tmp_path / "two"))
    one, two = (first_losses(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 3 and one == pytest.approx(two, rel=1e-4)
    assert objective == "sft" or one[0] == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["image", "text"])
def test_full_tuning_starts_at_the_merged_adapter(
    modality: str, starts: Callable[[str], Start], llama: tuple[str, str], pairs: str, tmp_path: Path
) -> None:
    if modality == "image":
        (model, adapter, _), settings = starts("stable-diffusion"), {"pairs": pairs}
    else:
        model, adapter = llama
        settings = {"pairs": response_pairs(tmp_path), "beta": 0.1}
    settings |= {"model": model, "adapter": adapter, "tuning": "full", **SHORT, "learning_rate": 1e-5}
    folder = train(TrainConfig(**settings, output_dir=str(tmp_path / "out"))).folder
    assert first_losses(folder)[0] == pytest.approx(math.log(2), abs=1e-7)
    whole: Any = load_policy(model, adapter=folder)
    weights = dict(whole.model.named_parameters())
    base, merged = (
        dict(load_policy(model).model.named_parameters()),
        build_policy(TrainConfig(**settings, output_dir="-")),
    )
    moved, expected = (
        sum((weights[name] - tensor).norm() for name, tensor in parameters)
        for parameters in (base.items(), merged.model.named_parameters())
    )
    assert 0 < expected < 0.1 * moved, "the result is near the merged start, not near the base"
