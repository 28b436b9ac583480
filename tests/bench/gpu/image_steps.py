"""Steps of image generators, against the published loop if there is one."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.bench.diffusion_step import Parts, Setup, flops, largest_speedups, our_step, prepare_bench, step_gflops
from tests.bench.gpu.cells import Cells
from tests.bench.gpu.figures import step_figures
from tests.bench.gpu.models import image_config, image_policy, image_size, on_meta_device, prepare
from tests.bench.step_flops import denoiser_gflops

WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def against_published(cells: Cells) -> None:
    """Published loop, online and precomputed reference, on one model with the same rows."""
    settings, device = cells.settings, cells.device
    size = image_size(settings["model"], tiny=cells.tiny)
    setup = Setup(settings["pairs"], device, settings["precision"], settings["checkpointing"], draws=1)
    gflops = flops(size)
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare_bench(size, setup, Path(folder))
        cells.measure("loss_on_one_draw", lambda: bench.loss)
        for name, step in bench.steps.items():
            parts = bench.parts[name]

            def variant(step: Any = step, parts: Parts = parts) -> dict[str, Any]:
                parts.on = False
                figures = step_figures(step, device, rounds=settings["rounds"], clear=bench.clear)
                parts.on = True
                parts.seconds.clear()
                for _ in range(settings["rounds"]):
                    step()
                    bench.clear()
                return figures | {"parts_ms": {part: 1000 * min(each) for part, each in parts.seconds.items()}}

            cells.measure(name, variant)
    checkpointing = settings["checkpointing"]
    steps = step_gflops(gflops, checkpointing=checkpointing)
    cells.measure(
        "flops",
        lambda: {
            "step_gflop": {name: value * settings["pairs"] for name, value in steps.items()},
            "allow": largest_speedups(gflops, checkpointing=checkpointing),
        },
    )


def without_published(cells: Cells) -> None:
    """Online reference and precomputed reference, without cuDNN's attention first, and then with what torch chooses."""
    settings, device = cells.settings, cells.device

    def flops_of_a_step() -> dict[str, Any]:
        denoiser = denoiser_gflops(on_meta_device(settings["model"], settings["precision"], tiny=cells.tiny))
        parts = {"denoiser": denoiser, "autoencoder": 0.0, "text": 0.0}
        steps = step_gflops(parts, checkpointing=settings["checkpointing"])
        return {"step_gflop": {name: settings["pairs"] * steps[name] for name in ("online", "precomputed")}}

    policy, make_rows = image_policy(settings["model"], settings["precision"], device, tiny=cells.tiny)
    settings_of_run = {"precision": settings["precision"], "gradient_checkpointing": settings["checkpointing"]}
    config = image_config(settings["pairs"], **settings_of_run)
    precomputed = image_config(settings["pairs"], **settings_of_run, reference="precomputed", fixed_draws_per_row=1)
    prepare(policy, config)
    rows = make_rows(settings["pairs"])
    clear = lambda: policy.model.zero_grad(set_to_none=True)

    def variant(config: Any, backends: Any) -> dict[str, Any]:
        with sdpa_kernel(backends) if backends else contextlib.nullcontext():
            parts = Parts(device)
            parts.on = False
            step = our_step(policy, config, rows, parts)
            return step_figures(step, device, rounds=settings["rounds"], clear=clear)

    cells.measure("online, without cuDNN attention", lambda: variant(config, WITHOUT_CUDNN))
    cells.measure("precomputed, without cuDNN attention", lambda: variant(precomputed, WITHOUT_CUDNN))
    cells.measure("online", lambda: variant(config, None))
    cells.measure("flops", flops_of_a_step)
