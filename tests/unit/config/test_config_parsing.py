from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from dpo_mm import config as config_module
from dpo_mm.config import TRAINER_NAMES, CompareConfig, MineConfig, TrainConfig, as_dict, train_config
from dpo_mm.config.config_parsing import config_from_mapping, read_yaml
from dpo_mm.config.setting_limits import LIMITS
from dpo_mm.judges import parse_judge_name
from dpo_mm.mining.mine_images import parse_judges
from dpo_mm.recipe import presets, read_recipe, run_recipe
from dpo_mm.training.objective_settings import sft_baseline_config

PLAIN: dict[str, Any] = {"model": "m", "pairs": "p", "output_dir": "o"}


def test_config_from_mapping_texts_become_typed_values() -> None:
    config = config_from_mapping(
        TrainConfig,
        {
            **PLAIN,
            "steps": "12",
            "learning_rate": "1e-4",
            "resume": "true",
            "lora_targets": "to_q,to_k",
            "objective": "sigmoid",
        },
        source="flags",
    )
    assert (config.steps, config.learning_rate, config.resume, config.lora_targets) == (
        12,
        1e-4,
        True,
        ("to_q", "to_k"),
    )
    mixed = config_from_mapping(TrainConfig, {**PLAIN, "objective": {"sigmoid": 0.8, "hinge": 0.2}}, source="flags")
    assert mixed.objective == {"sigmoid": 0.8, "hinge": 0.2}
    assert config_from_mapping(
        TrainConfig, {**PLAIN, "objective_kwargs": "label_smoothing:0.1"}, source="flags"
    ).objective_kwargs == {"label_smoothing": 0.1}
    assert config_from_mapping(TrainConfig, {**PLAIN, "revision": "none"}, source="flags").revision is None
    assert config_from_mapping(
        CompareConfig, {"model": "m", "output_dir": "o", "scales": [0.5, 2]}, source="f"
    ).scales == (0.5, 2.0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", -1, "seed is -1. Expected a value from 0 to 4294967295"),
        ("seed", 2**32, "seed is 4294967296"),
        ("accumulate", 0, "accumulate is 0. Expected a value at least 1"),
        ("eval_fraction", 1.0, r"eval_fraction is 1.0. Expected a value in \[0, 1\)"),
        ("learning_rate", float("nan"), "learning_rate is nan. Expected a finite number"),
        ("beta", float("inf"), "beta is inf"),
    ],
)
def test_number_outside_its_range_is_refused(name: str, value: float, message: str) -> None:
    """Catches limits that are not checked, and the upper limit of a half-open range that is allowed."""
    with pytest.raises(ValueError, match=message):
        TrainConfig(**PLAIN, **{name: value})


def test_every_limit_is_of_a_setting() -> None:
    kinds = [kind for name, kind in vars(config_module).items() if name.endswith("Config")]
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert set(LIMITS) <= fields
    assert TrainConfig(**PLAIN, seed=2**32 - 1).seed == 2**32 - 1


def undescribed(source: str) -> tuple[list[str], int]:
    """Fields of dataclasses called ...Config without a text below them, and the number of all such fields."""
    fields, missing = 0, []
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef) or not node.name.endswith("Config"):
            continue
        for field, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                fields += 1
                text = getattr(getattr(following, "value", None), "value", None)
                if not isinstance(text, str) or len(text.split()) < 3:
                    missing.append(f"{node.name}.{field.target.id}")
    return missing, fields


def test_every_setting_has_a_description() -> None:
    kinds = [kind for name, kind in vars(config_module).items() if name.endswith("Config")]
    files = sorted(Path(train_config.__file__).parent.glob("*_config*.py"))
    missing, fields = undescribed("\n".join(file.read_text() for file in files))
    assert missing == []
    assert fields == sum(len(dataclasses.fields(kind)) for kind in kinds) > 130
    assert undescribed('class AConfig:\n    a: int\n    b: int = 1\n    """What b does."""\n') == (["AConfig.a"], 2)


TRAINER_VALUES = {
    "max_steps": 7,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 5,
    "optim": "adafactor",
    "lr_scheduler_type": "cosine",
    "eval_steps": 11,
    "save_steps": 13,
    "logging_steps": 17,
    "dataloader_num_workers": 2,
}


@pytest.mark.parametrize(("name", "value"), TRAINER_VALUES.items())
def test_config_from_mapping_trainer_name_sets_its_field(name: str, value: Any) -> None:
    field = TRAINER_NAMES[name]
    for given in (value, str(value)):
        config = config_from_mapping(TrainConfig, {**PLAIN, name: given}, source="my.yaml")
        assert getattr(config, field) == value != getattr(TrainConfig, field)
        assert config == config_from_mapping(TrainConfig, {**PLAIN, field: given}, source="my.yaml")
    with pytest.raises(
        ValueError, match=rf"^my\.yaml: {name} and {field} are the same setting\. Give only one of them$"
    ):
        config_from_mapping(TrainConfig, {**PLAIN, field: value, name: value}, source="my.yaml")
    with pytest.raises(ValueError, match=f"'{name}' is not a setting"):
        config_from_mapping(CompareConfig, {"model": "m", "output_dir": "o", name: value}, source="my.yaml")


def test_trainer_names_are_fields_of_both_and_in_the_docs() -> None:
    from transformers import TrainingArguments

    assert list(TRAINER_VALUES) == list(TRAINER_NAMES) and len(set(TRAINER_NAMES.values())) == 9
    assert set(TRAINER_NAMES) <= {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(TRAINER_NAMES.values()) <= {field.name for field in dataclasses.fields(TrainConfig)}
    assert not set(TRAINER_NAMES) & {field.name for field in dataclasses.fields(TrainConfig)}
    page = (Path(__file__).parents[3] / "docs" / "reference" / "settings.md").read_text()
    table = page.partition("| name of the Trainer | setting |\n|---|---|\n")[2].partition("\n\n")[0]
    rows = [tuple(cell.strip("| `") for cell in line.strip("|").split("|")) for line in table.splitlines()]
    assert dict(rows) == TRAINER_NAMES


def test_read_recipe_trainer_name_overrides_the_preset(tmp_path: Path) -> None:
    preset = read_recipe("ocr", "pages", {})
    assert preset.train.steps != 7 and preset.mine is not None
    for flag in ("max_steps", "train.max_steps"):
        assert read_recipe("ocr", "pages", {flag: "7"}).train.steps == 7
    recipe = read_recipe("ocr", "pages", {"per_device_train_batch_size": "3"})
    assert recipe.train.batch_size == 3 and recipe.compare == preset.compare and recipe.mine == preset.mine
    for flag in ("num_train_epochs", "train.num_train_epochs"):  # replaces the preset's steps
        train = read_recipe("ocr", "pages", {flag: "2"}).train
        assert (train.num_train_epochs, train.steps) == (2, TrainConfig.steps)
    with pytest.raises(ValueError, match="flags: max_steps and steps are the same setting"):
        read_recipe("ocr", "pages", {"steps": "7", "max_steps": "8"})
    with pytest.raises(ValueError, match=r"'compare\.max_steps' is not a setting"):
        read_recipe("ocr", "pages", {"compare.max_steps": "8"})


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
def test_config_from_mapping_wrong_value_is_named_in_the_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_mapping(TrainConfig, values, source="my.yaml")


def test_read_yaml_bad_file_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_yaml(tmp_path / "nothing.yaml")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="expected settings"):
        read_yaml(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1, 2\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        read_yaml(tmp_path / "broken.yaml")


def test_read_recipe_flag_reaches_each_section_that_has_it(tmp_path: Path) -> None:
    recipe = read_recipe(
        "faithfulness", "shapes", {"seed": "3", "train.steps": "7", "output_dir": str(tmp_path), "max_prompts": "5"}
    )
    assert (recipe.train.seed, recipe.compare.seed, recipe.train.steps, recipe.compare.max_prompts) == (3, 3, 7, 5)
    assert recipe.compare.adapter == str(tmp_path / "adapter") == recipe.train.output_dir
    with pytest.raises(ValueError, match="did you mean 'steps'"):
        read_recipe("faithfulness", "shapes", {"stepz": "7"})
    with pytest.raises(ValueError, match=r"train\.stepz"):
        read_recipe("faithfulness", "shapes", {"train.stepz": "7"})
    with pytest.raises(ValueError, match="preset 'shape' of faithfulness is unknown; did you mean 'shapes'"):
        read_recipe("faithfulness", "shape", {})
    with pytest.raises(ValueError, match="expected 'sft'"):
        read_recipe("faithfulness", "shapes", {"baseline": "rl"})


def test_read_recipe_every_preset_loads() -> None:
    names = [
        (task, name)
        for task in ("faithfulness", "aesthetic", "captioner", "ocr", "editing", "custom_judge")
        for name in presets(task)
    ]
    assert len(names) >= 33
    for task, name in names:
        assert read_recipe(task, name, {}).train.beta > 0


@pytest.mark.parametrize("task", ["aesthetic", "faithfulness"])
def test_mined_presets_compare_with_other_judges_than_they_mine_with(task: str) -> None:
    recipe = read_recipe(task, "sd15-mined", {})
    assert isinstance(recipe.mine, MineConfig) and isinstance(recipe.compare, CompareConfig)
    mined, compared = {*parse_judges(recipe.mine.judges), *parse_judges(recipe.mine.guards)}, set(recipe.compare.judges)
    assert len(mined) == 3 and len(compared) == 2 and not mined & compared
    assert all(parse_judge_name(name) for name in mined | compared)
    assert recipe.train.pairs == str(Path(recipe.mine.output_dir) / "pairs.parquet")


@pytest.mark.parametrize("flag", ["mine.judges", "compare.judges"])
def test_run_recipe_unknown_judge_is_refused_before_anything_runs(flag: str, tmp_path: Path) -> None:
    recipe = read_recipe("ocr", "pages", {flag: "degenerate", "output_dir": str(tmp_path / "out")})
    with pytest.raises(ValueError, match="judge 'degenerate' is unknown; did you mean 'degeneration'"):
        run_recipe(recipe, command="")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train.metric_for_best_model": "eval_acc"}, "known: eval_loss, .*, samples/JUDGE with one of sample_judges"),
        ({"train.adapter": "nothing.safetensors"}, "adapter 'nothing.safetensors' does not exist"),
        ({"compare.questions": "nothing.jsonl"}, "questions 'nothing.jsonl': no such file"),
        ({"compare.side_sets": "nothing.jsonl"}, "side_sets: questions 'nothing.jsonl': no such file"),
    ],
)
def test_run_recipe_wrong_later_step_is_refused_before_mining(
    flags: dict[str, str], message: str, tmp_path: Path
) -> None:
    few = {"compare.max_questions": "4", "output_dir": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=message):
        run_recipe(read_recipe("captioner", "shapes", {**few, **flags}), command="")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("metric", [None, "samples/aesthetic", "eval_rewards/accuracies"])
def test_sft_baseline_chooses_its_best_weights_by_what_it_measures(metric: str | None) -> None:
    baseline = sft_baseline_config(TrainConfig("m", "p", "o", metric_for_best_model=metric))
    assert baseline.metric_for_best_model == ("eval_loss" if metric == "eval_rewards/accuracies" else metric)


@pytest.mark.parametrize(
    ("gpu", "has_bf16", "expected"), [(False, False, "fp32"), (True, True, "bf16"), (True, False, "fp16")]
)
def test_auto_precision_is_the_best_that_the_machine_has(
    gpu: bool, has_bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches emulated bf16, and a config that records "auto": its run on another machine would have another precision."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation
    )
    assert TrainConfig("m", "p", "o").precision == expected
    assert as_dict(CompareConfig("m", "p", "o"))["precision"] == expected
    assert TrainConfig("m", "p", "o", precision="fp32").precision == "fp32"
    if gpu and not has_bf16:
        with pytest.raises(
            ValueError, match=r"precision bf16: this GPU \(Tesla T4\) does not have it. Use fp16 or fp32"
        ):
            TrainConfig("m", "p", "o", precision="bf16")
