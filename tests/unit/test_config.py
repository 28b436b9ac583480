from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpo_mm.config import CompareConfig, MineConfig, TrainConfig, config_from_mapping, read_yaml
from dpo_mm.judges import parse_judge_name
from dpo_mm.mining.mine_images import parse_judges
from dpo_mm.recipe import presets, read_recipe, run_recipe

PLAIN: dict[str, Any] = {"model": "m", "pairs": "p", "output_dir": "o"}


def test_strings_become_what_the_setting_is() -> None:
    got = config_from_mapping(
        TrainConfig,
        {
            **PLAIN,
            "steps": "12",
            "learning_rate": "1e-4",
            "resume": "true",
            "lora_targets": "to_q,to_k",
            "objective": "sigmoid",
        },
        where="flags",
    )
    assert (got.steps, got.learning_rate, got.resume, got.lora_targets) == (12, 1e-4, True, ("to_q", "to_k"))
    mixed = config_from_mapping(TrainConfig, {**PLAIN, "objective": {"sigmoid": 0.8, "hinge": 0.2}}, where="flags")
    assert mixed.objective == {"sigmoid": 0.8, "hinge": 0.2}
    assert config_from_mapping(
        TrainConfig, {**PLAIN, "objective_kwargs": "label_smoothing:0.1"}, where="flags"
    ).objective_kwargs == {"label_smoothing": 0.1}
    assert config_from_mapping(TrainConfig, {**PLAIN, "revision": "none"}, where="flags").revision is None
    assert config_from_mapping(
        CompareConfig, {"model": "m", "output_dir": "o", "scales": [0.5, 2]}, where="f"
    ).scales == (0.5, 2.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**PLAIN, "learning_rat": 1}, r"my\.yaml: 'learning_rat' is not a setting; did you mean 'learning_rate'"),
        ({**PLAIN, "steps": "many"}, "steps: expected int, got 'many'"),
        ({**PLAIN, "steps": 1.5}, "steps: expected int, got 1.5"),
        ({**PLAIN, "resume": "perhaps"}, "resume: expected bool"),
        ({**PLAIN, "objective_kwargs": "label_smoothing"}, "objective_kwargs"),
        ({"pairs": "p"}, "model and output_dir missing"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_mapping(TrainConfig, values, where="my.yaml")


def test_files_that_are_no_recipes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_yaml(tmp_path / "nothing.yaml")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="expected settings"):
        read_yaml(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1, 2\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        read_yaml(tmp_path / "broken.yaml")


def test_flags_reach_the_parts_that_have_them(tmp_path: Path) -> None:
    got = read_recipe(
        "faithfulness", "shapes", {"seed": "3", "train.steps": "7", "output_dir": str(tmp_path), "max_prompts": "5"}
    )
    assert (got.train.seed, got.compare.seed, got.train.steps, got.compare.max_prompts) == (3, 3, 7, 5)
    assert got.compare.adapter == str(tmp_path / "adapter") == got.train.output_dir
    with pytest.raises(ValueError, match="did you mean 'steps'"):
        read_recipe("faithfulness", "shapes", {"stepz": "7"})
    with pytest.raises(ValueError, match=r"train\.stepz"):
        read_recipe("faithfulness", "shapes", {"train.stepz": "7"})
    with pytest.raises(ValueError, match="preset 'shape' of faithfulness is unknown; did you mean 'shapes'"):
        read_recipe("faithfulness", "shape", {})
    with pytest.raises(ValueError, match="expected 'sft'"):
        read_recipe("faithfulness", "shapes", {"baseline": "rl"})


def test_every_preset_loads() -> None:
    found = [
        (task, name)
        for task in ("faithfulness", "aesthetic", "captioner", "ocr", "custom_judge")
        for name in presets(task)
    ]
    assert len(found) == 23
    for task, name in found:
        assert read_recipe(task, name, {}).train.beta > 0


@pytest.mark.parametrize("task", ["aesthetic", "faithfulness"])
def test_what_a_model_makes_of_itself_is_judged_by_others(task: str) -> None:
    recipe = read_recipe(task, "sd15-mined", {})
    assert isinstance(recipe.mine, MineConfig) and isinstance(recipe.compare, CompareConfig)
    mined, compared = {*parse_judges(recipe.mine.judges), *parse_judges(recipe.mine.guards)}, set(recipe.compare.judges)
    assert len(mined) == 3 and len(compared) == 2 and not mined & compared
    assert all(parse_judge_name(name) for name in mined | compared)
    assert recipe.train.pairs == str(Path(recipe.mine.output_dir) / "pairs.parquet")


@pytest.mark.parametrize("flag", ["mine.judges", "compare.judges"])
def test_an_unkncustom_judge_is_refused_before_anything_runs(flag: str, tmp_path: Path) -> None:
    recipe = read_recipe("ocr", "pages", {flag: "degenerate", "output_dir": str(tmp_path / "out")})
    with pytest.raises(ValueError, match="judge 'degenerate' is unknown; did you mean 'degeneration'"):
        run_recipe(recipe, command="")
    assert not (tmp_path / "out").exists()
