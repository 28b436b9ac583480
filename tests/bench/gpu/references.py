"""Reference by the adapter: host time of turning it off and on, and policy and reference in one batch against two."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dpo_mm.policies.lora_layers import lora_layers
from dpo_mm.training.trainer import PreferenceTrainer
from tests.bench.gpu.cells import Cells
from tests.bench.gpu.figures import peak_bytes, seconds_of
from tests.bench.gpu.models import image_config, image_policy, on_meta_device, prepare, vlm, vlm_policy
from tests.bench.vlm_step import config_of

REPEATS = 20


def compare(cells: Cells) -> None:
    """Host time on models without weights, then the batches on one image generator."""
    settings = cells.settings
    for name in settings["images"]:
        cells.measure(f"off and on, {name}", lambda name=name: _image_switches(cells, name))
    for size in settings["sizes"]:
        cells.measure(f"off and on, Qwen2.5-VL-{size}", lambda size=size: _language_switches(cells, size))
    cells.measure("one batch or two", lambda: _batches(cells))


def _image_switches(cells: Cells, name: str) -> dict[str, Any]:
    policy = on_meta_device(name, "bf16", tiny=cells.tiny)
    policy.prepare(image_config(1, precision="fp32"))

    def by_peft() -> None:
        policy.model.disable_adapters()
        policy.model.enable_adapters()

    return _switch_figures(policy, by_peft)


def _language_switches(cells: Cells, size: str) -> dict[str, Any]:
    policy = vlm_policy(vlm("tiny" if cells.tiny else size, "bf16", "meta"), "separate")
    policy.prepare(config_of(1))

    def by_peft() -> None:
        with policy.model.disable_adapter():
            pass

    return _switch_figures(policy, by_peft)


def _switch_figures(policy: Any, by_peft: Callable[[], None]) -> dict[str, Any]:
    def ours() -> None:
        with policy.adapter_off():
            pass

    def by_flag() -> None:
        layers = lora_layers(policy.model)
        for disabled in (True, False):
            for layer in layers:
                layer._disable_adapters = disabled

    median = lambda function: statistics.median(1000 * seconds_of(function, "cpu") for _ in range(REPEATS))
    return {
        "layers": len(lora_layers(policy.model)),
        "ours_ms": median(ours),
        "flag_ms": median(by_flag),
        "peft_ms": median(by_peft),
    }


def _batches(cells: Cells) -> dict[str, Any]:
    """Loss and backward with the reference in a second forward pass, and in the same one, where its rows have no adapter."""
    settings, device = cells.settings, cells.device
    policy, make_rows = image_policy(settings["batch_model"], settings["precision"], device, tiny=cells.tiny)
    config = image_config(settings["pairs"], precision=settings["precision"])
    prepare(policy, config)
    rows = make_rows(settings["pairs"])
    trainer = PreferenceTrainer(policy, config, rows)
    batch = trainer._prepare_inputs(policy.collate(rows))
    twice = trainer._prepare_inputs(policy.collate([*rows, *rows]))
    pairs, kept = len(rows), {}

    def two() -> None:
        with trainer.accelerator.autocast():
            reference = trainer.reference(policy.model, batch)
            own = policy.log_probs(policy.model, batch)
        kept["two"] = _difference(own.chosen, own.rejected, reference.chosen, reference.rejected)
        kept["two"].sum().backward()

    def one() -> None:
        with trainer.accelerator.autocast(), _without_adapter(policy.model, [*[1.0] * pairs, *[0.0] * pairs] * 2):
            both = policy.log_probs(policy.model, twice)
        sides = [part.split(pairs) for part in (both.chosen, both.rejected)]
        kept["one"] = _difference(sides[0][0], sides[1][0], sides[0][1].detach(), sides[1][1].detach())
        kept["one"].sum().backward()

    figures: dict[str, Any] = {}
    for name, function in (("two", two), ("one", one)):
        function()
        times = [1000 * seconds_of(function, device) for _ in range(settings["rounds"])]
        figures |= {f"{name}_ms": statistics.median(times), f"{name}_peak_bytes": peak_bytes(function, device)}
        policy.model.zero_grad(set_to_none=True)
    difference = (kept["one"] - kept["two"]).detach()
    return figures | {"margin": kept["two"].tolist(), "largest_difference": float(difference.abs().max())}


def _difference(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor) -> Tensor:
    return chosen - reference_chosen - rejected + reference_rejected


@contextlib.contextmanager
def _without_adapter(model: Any, weights: list[float]) -> Iterator[None]:
    """Context manager in which the adapter's output is multiplied by a weight per image, (images,)."""

    def scale(_: Any, __: Any, output: Tensor) -> Tensor:
        factors = torch.tensor(weights, device=output.device, dtype=output.dtype)
        return output * factors.repeat_interleave(len(output) // len(weights)).view(-1, *[1] * (output.ndim - 1))

    hooks = [part.register_forward_hook(scale) for layer in lora_layers(model) for part in layer.lora_B.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
