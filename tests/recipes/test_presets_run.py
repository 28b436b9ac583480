"""Every preset with a model of the hub trains two steps on a tiny model of its family with five rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_mm.assets import BUNDLED, presets_folder
from dpo_mm.config import CompareResponsesConfig
from dpo_mm.data.schema import make_image_rows, make_response_rows
from dpo_mm.recipe import read_recipe_file
from dpo_mm.training.run import train
from tests.conftest import noise_image, rows
from tests.contracts import tiny_vlms
from tests.contracts.families import BUILDERS
from tests.recipes.test_presets import TINY, tiny_vlm_of

pytestmark = pytest.mark.slow
PRESETS = [
    path.stem
    for path in sorted(presets_folder().glob("*.yaml"))
    if read_recipe_file(path.stem, {}).train.model not in BUNDLED
]
"""Presets whose model is on the hub. tests/recipes/test_recipes.py runs those with a bundled model."""
SHORT = {"train.steps": "2", "train.accumulate": "1", "train.workers": "0", "train.log_every": "1"}
EVALUATED = {"train.eval_fraction": "0.4"}
"""5 % of five rows are less than one prompt, and presets of images set eval_every, which the error names."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], tuple[str, int | None]]:
    """Folder of the tiny model of a preset, which several presets share, and its resolution."""

    @functools.cache
    def build(kind: str, is_text: bool) -> tuple[str, int | None]:
        folder = tmp_path_factory.mktemp(kind)
        if is_text:
            return tiny_vlms.save(kind, folder / "model"), None
        return str(BUILDERS[kind].build(folder)), BUILDERS[kind].size

    return lambda preset, is_text: build(
        tiny_vlm_of(preset) if is_text else TINY[preset.removesuffix("-mined")], is_text
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Five pairs of images, of edited images and of responses."""
    folder = tmp_path_factory.mktemp("pairs")
    responses = make_response_rows(
        [
            {
                "images": [noise_image(n, 56)],
                "prompt": f"describe {n}",
                "chosen": "a red square",
                "rejected": "blue " * 3,
            }
            for n in range(5)
        ]
    )
    responses.to_parquet(str(folder / "responses.parquet"))
    make_image_rows(rows(5)).to_parquet(str(folder / "images.parquet"))
    make_image_rows([{**row, "image_source": row["image_a"]} for row in rows(5)]).to_parquet(
        str(folder / "edits.parquet")
    )
    return {kind: str(folder / f"{kind}.parquet") for kind in ("responses", "images", "edits")}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_trains(name: str, tiny: Any, files: dict[str, str], tmp_path: Path) -> None:
    preset = read_recipe_file(name, {})
    is_text = isinstance(preset.compare, CompareResponsesConfig)
    model, size = tiny(name.partition("-")[2], is_text)
    kind = "responses" if is_text else "edits" if name.startswith("editing-") else "images"
    given = {"model": model, "output_dir": str(tmp_path / "run"), "train.pairs": files[kind], **SHORT}
    given |= {} if is_text else EVALUATED
    if size:
        given["train.resolution"] = str(size)
    if preset.train.adapter:  # stage two of two: the command of its first comment makes stage one
        first = {"train.objective": "sft", "train.sft_weight": "0", "train.adapter": "none"}
        stage_one = read_recipe_file(name, {**given, **first, "output_dir": str(tmp_path / "first")}).train
        given["train.adapter"] = str(train(stage_one).folder)
    result = train(read_recipe_file(name, given).train)
    assert result.history[-1]["step"] == 2 and any(result.folder.glob("*.safetensors"))
