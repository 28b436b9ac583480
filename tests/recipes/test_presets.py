"""Every preset parses, the names in it exist, and a run can print its effective beta."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import SchedulerType

from dpo_mm.assets import BUNDLED, presets_folder
from dpo_mm.config import CompareResponsesConfig
from dpo_mm.judges import parse_judge_name
from dpo_mm.objectives import OBJECTIVES
from dpo_mm.policies.diffusion.diffusion_policy import DTYPES
from dpo_mm.policies.families import load_policy
from dpo_mm.policies.vlm.vlm_policy import VisionLanguage
from dpo_mm.recipe import Recipe, read_recipe
from tests.contracts import tiny_vlms
from tests.contracts.families import BUILDERS

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks"
WHAT_FITS = BENCHMARKS / "what-fits.json"
TIMED = {"sdxl": "SDXL", "flux_dev": "FLUX.1-dev"}
"""Presets whose step was measured on an H100, and their names in scaling.json."""
PRESETS = sorted(path.stem for path in presets_folder().glob("*.yaml"))
TINY = {
    "sd15": "stable-diffusion",
    "sdxl": "sdxl",
    "sd3_5_medium": "sd3",
    "flux_dev": "flux-dev",
    "chroma": "chroma",
    "pixart_sigma": "pixart-sigma",
    "sana": "sana",
    "qwen_image": "qwen-image",
    "qwen_image21": "qwen-image-2.1",
    "longcat_image": "longcat-image",
    "ernie_image": "ernie-image",
    "qwen_image_edit": "qwen-image-edit",
    "krea2": "krea2",
    "hidream": "hidream",
    "z_image": "z-image",
    "flux2_dev": "flux2-dev",
    "flux2_klein": "flux2-klein",
    "flux_kontext": "flux-kontext",
    "instruct_pix2pix": "instruct-pix2pix",
}
"""The tiny pipeline that replaces a preset's model."""
TINY_VLMS = {"nanonets_ocr2": "qwen2_5_vl", "olmocr2": "qwen2_5_vl", "qwen2_5_vl_json": "qwen2_5_vl"}
"""The tiny model of presets that are not named after their family."""
CUSTOM_JUDGE = re.compile(r"[a-z_]+(\.[a-z_]+)*:[a-z_]+")
HUB_MODEL = re.compile(r"[\w.-]+/[\w.-]+")


def tiny_vlm_of(preset: str) -> str:
    """The tiny model that replaces the vision-language model of a preset."""
    kind = TINY_VLMS.get(preset, preset)
    assert kind in tiny_vlms.BUILDERS
    return kind


def recipe(name: str) -> Recipe:
    task, _, preset = name.partition("-")
    return read_recipe(task, preset, {})


def test_every_tiny_pipeline_has_a_preset() -> None:
    assert len(PRESETS) >= 20
    assert {name.partition("-")[2] for name in PRESETS} >= set(TINY)


@pytest.mark.parametrize("name", PRESETS)
def test_names_in_a_preset_exist(name: str) -> None:
    settings = recipe(name)
    mining_judges = [settings.mine.judges] if settings.mine else []
    judges = [
        *settings.compare.judges,
        *(judge for entry in mining_judges for judge in ([entry] if isinstance(entry, str) else entry)),
    ]
    assert judges and all(parse_judge_name(judge) or CUSTOM_JUDGE.fullmatch(judge) for judge in judges)
    if isinstance(settings.compare, CompareResponsesConfig):
        assert set(settings.compare.guards) <= set(settings.compare.judges)
    train = settings.train
    names = [train.objective] if isinstance(train.objective, str) else list(train.objective)
    assert set(names) <= set(OBJECTIVES)
    assert train.schedule in {kind.value for kind in SchedulerType}
    assert train.precision in DTYPES and settings.compare.precision == train.precision
    assert train.model == settings.compare.model
    assert train.model in BUNDLED or HUB_MODEL.fullmatch(train.model)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_cites_the_source_of_its_numbers(name: str) -> None:
    comments = [line for line in (presets_folder() / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    text = " ".join(line.lstrip("# ") for line in comments)
    assert comments
    if recipe(name).train.model not in BUNDLED:
        assert re.search(r"\d{4}\.\d{5}|\bours and not tuned\b|examples/", text, re.IGNORECASE)


def time_of(name: str) -> str:
    """Time of a preset's training as its comment says it: from the measured step of its model, of the same batch."""
    if (model := TIMED.get(name.partition("-")[2])) is None:
        return "not measured"
    step, train = json.loads((BENCHMARKS / "scaling.json").read_text())["measured"][model], recipe(name).train
    assert train.batch_size == step["pairs"] and train.gradient_checkpointing and train.tuning == "lora"
    return f"{train.steps * train.accumulate * step['ms'] / 3.6e6:.1f} hours of steps on an H100"


def test_presets_of_pretrained_models_say_what_to_change_and_what_they_cost() -> None:
    computed = {
        f"{columns['training']:.1f} GiB"
        for model in json.loads(WHAT_FITS.read_text())["models"].values()
        if (columns := model["columns"]["LoRA, checkpointing"])
    }
    names = [name for name in PRESETS if recipe(name).train.model not in BUNDLED]
    assert len(names) > 15
    for name in names:
        head = (presets_folder() / f"{name}.yaml").read_text().partition("title:")[0]
        assert "# Change first: " in head, name
        assert f"Time: {time_of(name)}" in head, name
        gib = re.search(r"# Memory with batch_size 1.*?: ([\d.]+ GiB)", head)
        assert gib[1] in computed if gib else f"dpo-mm train {name} --dry-run" in head, name


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Recipe], object]:
    """Return a preset's bundled model, or a tiny model of the same family."""
    loaded: dict[str, object] = {}

    def policy(preset: str, settings: Recipe) -> object:
        model = settings.train.model
        if model not in loaded:
            if model in BUNDLED:
                loaded[model] = load_policy(model)
            elif isinstance(settings.compare, CompareResponsesConfig):
                kind = tiny_vlm_of(preset)
                loaded[model] = VisionLanguage(*tiny_vlms.build(kind), kind)
            else:
                family = BUILDERS[TINY[preset]]
                loaded[model] = load_policy(str(family.build(tmp_path_factory.mktemp(preset))), resolution=family.size)
        return loaded[model]

    return policy


@pytest.mark.parametrize("name", PRESETS)
def test_effective_beta_of_a_preset_is_in_the_run_summary(name: str, policies: Callable[[str, Recipe], object]) -> None:
    settings = recipe(name)
    policy = policies(name.partition("-")[2], settings)
    assert policy.describe(settings.train)["effective beta"].startswith(f"{settings.train.beta:g} ")  # type: ignore[attr-defined]
