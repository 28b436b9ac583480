"""Every preset parses, what it names exists, and the run's opening lines can be printed from it."""

from __future__ import annotations

import re
from collections.abc import Callable

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

PRESETS = sorted(path.stem for path in presets_folder().glob("*.yaml"))
TINY = {
    "sd15": "stable-diffusion",
    "sdxl": "sdxl",
    "sd3_5_medium": "sd3",
    "flux_dev": "flux-dev",
    "pixart_sigma": "pixart-sigma",
    "sana": "sana",
    "qwen_image": "qwen-image",
    "z_image": "z-image",
    "flux2_klein": "flux2-klein",
}
"""The tiny pipeline that stands for a preset's model."""
OWN = re.compile(r"[a-z_]+(\.[a-z_]+)*:[a-z_]+")
HUB = re.compile(r"[\w.-]+/[\w.-]+")


def recipe(name: str) -> Recipe:
    task, _, preset = name.partition("-")
    return read_recipe(task, preset, {})


def test_every_preset_is_tried() -> None:
    assert len(PRESETS) >= 20
    assert {name.partition("-")[2] for name in PRESETS} >= set(TINY)


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_preset_names_exists(name: str) -> None:
    settings = recipe(name)
    mined = [settings.mine.judges] if settings.mine else []
    judges = [*settings.compare.judges, *(n for one in mined for n in ([one] if isinstance(one, str) else one))]
    assert judges and all(parse_judge_name(judge) or OWN.fullmatch(judge) for judge in judges)
    if isinstance(settings.compare, CompareResponsesConfig):
        assert set(settings.compare.guards) <= set(settings.compare.judges)
    train = settings.train
    names = [train.objective] if isinstance(train.objective, str) else list(train.objective)
    assert set(names) <= set(OBJECTIVES)
    assert train.schedule in {kind.value for kind in SchedulerType}
    assert train.precision in DTYPES and settings.compare.precision == train.precision
    assert train.model == settings.compare.model
    assert train.model in BUNDLED or HUB.fullmatch(train.model)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_where_its_numbers_are_from(name: str) -> None:
    head = [line for line in (presets_folder() / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    words = " ".join(line.lstrip("# ") for line in head)
    assert head
    if recipe(name).train.model not in BUNDLED:
        assert re.search(r"\d{4}\.\d{5}|\bours and not tuned\b|examples/", words, re.IGNORECASE)


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Recipe], object]:
    """What stands for a preset's model: the shipped one, or a tiny one of its family."""
    made: dict[str, object] = {}

    def policy(preset: str, settings: Recipe) -> object:
        model = settings.train.model
        if model not in made:
            if model in BUNDLED:
                made[model] = load_policy(model)
            elif isinstance(settings.compare, CompareResponsesConfig):
                kind = preset if preset in tiny_vlms.BUILDERS else "llava"
                made[model] = VisionLanguage(*tiny_vlms.build(kind), kind)
            else:
                family = BUILDERS[TINY[preset]]
                made[model] = load_policy(str(family.build(tmp_path_factory.mktemp(preset))), resolution=family.size)
        return made[model]

    return policy


@pytest.mark.parametrize("name", PRESETS)
def test_the_effective_beta_of_a_preset_is_printed(name: str, policies: Callable[[str, Recipe], object]) -> None:
    settings = recipe(name)
    policy = policies(name.partition("-")[2], settings)
    assert policy.describe(settings.train)["effective beta"].startswith(f"{settings.train.beta:g} ")  # type: ignore[attr-defined]
