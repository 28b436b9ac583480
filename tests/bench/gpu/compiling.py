"""The setting `compile` on and off: time of a step, seconds of compiling, graphs, memory and loss."""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import torch._dynamo
from torch._dynamo.utils import counters

from dpo_mm.config import TrainConfig
from dpo_mm.training import compilation
from dpo_mm.training.pair_stream import PairStream
from dpo_mm.training.trainer import PreferenceTrainer
from tests.bench.gpu.cells import Cells
from tests.bench.gpu.figures import step_figures
from tests.bench.gpu.models import image_config, image_policy, prepare, vlm, vlm_policy, vlm_rows
from tests.bench.vlm_step import config_of


def images(cells: Cells) -> None:
    """An image generator."""
    settings = cells.settings

    def make(options: dict[str, Any]) -> tuple[Any, TrainConfig, list[Any]]:
        policy, make_rows = image_policy(settings["model"], settings["precision"], cells.device, tiny=cells.tiny)
        return policy, image_config(settings["pairs"], **options), make_rows(settings["pairs"])

    _off_and_on(cells, make)


def responses(cells: Cells) -> None:
    """A vision-language model with each layout of a pair."""
    settings = cells.settings

    def make(options: dict[str, Any], layout: str) -> tuple[Any, TrainConfig, list[Any]]:
        size = "tiny" if cells.tiny else settings["size"]
        policy = vlm_policy(vlm(size, settings["precision"], cells.device), layout)
        return policy, config_of(settings["pairs"], **options), policy.encode(vlm_rows(settings))

    for layout in settings["layouts"]:
        _off_and_on(cells, lambda options, layout=layout: make(options, layout), f", {layout}")


def _off_and_on(cells: Cells, make: Any, label: str = "") -> None:
    settings = cells.settings

    def run(on: bool) -> dict[str, Any]:
        policy, config, rows = make({"precision": settings["precision"], "compile": on})
        prepare(policy, config)
        torch._dynamo.reset()
        counters.clear()
        start = time.perf_counter()
        stream = PairStream(rows, seed=0, length=len(rows))
        with (
            mock.patch.object(compilation, "BACKEND", settings["backend"]),
            compilation.compiled(policy, config, stream) as plan,
        ):
            seconds = time.perf_counter() - start
            trainer = PreferenceTrainer(policy, config, rows)

            def step() -> float:
                batch = trainer._prepare_inputs(policy.collate(rows))
                loss = trainer.compute_loss(policy.model, batch)
                loss.backward()
                trainer._metrics["train"].clear()
                return float(loss.detach())

            clear = lambda: policy.model.zero_grad(set_to_none=True)
            figures = step_figures(step, cells.device, rounds=settings["rounds"], clear=clear)
        graphs = {"graphs": counters["stats"]["unique_graphs"], "breaks": dict(counters["graph_break"])}
        return figures | ({"compile_s": seconds, "plan": plan["compile"], **graphs} if on else {})

    cells.measure(f"off{label}", lambda: run(False))
    cells.measure(f"on{label}", lambda: run(True))
