"""The setting `compile` on and off: time of a step, seconds until the first is done, memory and loss."""

from __future__ import annotations

import dataclasses
from typing import Any

from dpo_mm.config import TrainConfig
from dpo_mm.training.trainer import PreferenceTrainer
from tests.bench.gpu.cells import Cells, Skipped
from tests.bench.gpu.figures import step_figures
from tests.bench.gpu.models import image_config, image_policy, prepare, vlm, vlm_policy, vlm_rows
from tests.bench.vlm_step import config_of

HAS_SETTING = "compile" in {field.name for field in dataclasses.fields(TrainConfig)}


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

    for layout in ("separate", "shared_prefix"):
        _off_and_on(cells, lambda options, layout=layout: make(options, layout), f", {layout}")


def _off_and_on(cells: Cells, make: Any, label: str = "") -> None:
    settings = cells.settings

    def run(**options: Any) -> dict[str, Any]:
        if options and not HAS_SETTING:
            raise Skipped("TrainConfig has no setting `compile` at this commit")
        policy, config, rows = make({"precision": settings["precision"], **options})
        prepare(policy, config)
        trainer = PreferenceTrainer(policy, config, rows)

        def step() -> float:
            batch = trainer._prepare_inputs(policy.collate(rows))
            loss = trainer.compute_loss(policy.model, batch)
            loss.backward()
            trainer._metrics["train"].clear()
            return float(loss.detach())

        clear = lambda: policy.model.zero_grad(set_to_none=True)
        return step_figures(step, cells.device, rounds=settings["rounds"], clear=clear)

    cells.measure(f"off{label}", run)
    cells.measure(f"on{label}", lambda: run(compile=True))
