"""Settings in `--help` and `--print-config`, presets by name, and commands without a file."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from dpo_mm.cli import main as cli
from dpo_mm.cli.settings_help import CONFIGS, commented_config
from dpo_mm.config import TrainConfig
from dpo_mm.config.config_parsing import config_from_mapping
from dpo_mm.config.descriptions import describe_settings, yaml_value
from dpo_mm.recipe import presets, read_recipe, read_recipe_file, step_settings


@dataclass(frozen=True)
class ExampleConfig:
    """Settings."""

    # Data
    model: str
    """Which."""
    rate: float | None = None

    # Training
    names: tuple[str, ...] = ("a", "b")
    """Several,
    in order."""
    weights: dict[str, float] = field(default_factory=dict)


def help_of(command: str) -> str:
    result = CliRunner().invoke(cli.app, [command, "--help"], prog_name="dpo-mm", env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    return result.output


def printed_config(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, ["train", *arguments, "--print-config"])
    assert result.exit_code == 0, result.output
    return result.output


def test_descriptions_are_types_defaults_and_the_text_below_each_field() -> None:
    settings = describe_settings(ExampleConfig)
    assert [tuple(setting) for setting in settings] == [
        ("model", "str", dataclasses.MISSING, "Which.", "Data"),
        ("rate", "float | None", None, "", "Data"),
        ("names", "tuple[str, ...]", ("a", "b"), "Several, in order.", "Training"),
        ("weights", "dict[str, float]", {}, "", "Training"),
    ]
    assert [yaml_value(setting.default) for setting in settings] == ["required", "null", "[a, b]", "{}"]


def test_yaml_value_is_read_back() -> None:
    for value in (None, True, "null", "a: b", "#x", "1e-4", 2, 0.5, [1.5, 2.0], {"sft": 0.25}):
        assert yaml.safe_load(yaml_value(value)) == value


@pytest.mark.parametrize("command", CONFIGS)
def test_help_lists_every_setting_once_with_its_default(command: str) -> None:
    text = help_of(command)
    without_spaces = "".join(text.split())  # long words are broken at their hyphens
    for kind in CONFIGS[command]:
        for setting in describe_settings(kind):
            assert f"  --{setting.name.replace('_', '-')} " in text, setting.name
            assert "".join(setting.description.split()).replace("null:", "none:") in without_spaces, setting.name
    assert "--learning-rate FLOAT" in text or command not in ("train", "verify")
    assert "[default:none]" in without_spaces


def test_printed_config_names_every_setting_and_gives_the_config_back() -> None:
    text = commented_config(
        {"model": "m", "pairs": "p", "output_dir": "o", "lora_targets": ("to_q", "to_k"), "beta": "auto"}
    )
    given = config_from_mapping(TrainConfig, yaml.safe_load(text), source="printed")
    assert given == TrainConfig("m", "p", "o", lora_targets=("to_q", "to_k"), beta="auto")
    lines = text.splitlines()
    everything = [line.removeprefix("# ") for line in lines if line.removeprefix("# ").partition(":")[0] in vars(given)]
    assert [line.partition(":")[0] for line in everything] == [entry.name for entry in dataclasses.fields(TrainConfig)]
    defaults = config_from_mapping(TrainConfig, yaml.safe_load("\n".join(everything)), source="printed")
    assert dataclasses.replace(defaults, precision="fp32") == dataclasses.replace(given, precision="fp32")


def test_print_config_of_a_preset_has_its_values_and_the_flags() -> None:
    values = yaml.safe_load(printed_config("faithfulness-sdxl", "--steps", "7"))
    assert values["model"] == "stabilityai/stable-diffusion-xl-base-1.0" and values["beta"] == 5000
    assert values["steps"] == "7" or values["steps"] == 7
    assert values["output_dir"] == "runs/faithfulness-sdxl/adapter"
    assert "# lora_format: diffusers" in printed_config("faithfulness-sdxl")
    assert "model: ..." in printed_config()


def test_presets_command_lists_every_preset() -> None:
    result = CliRunner().invoke(cli.app, ["presets"])
    tasks = ("aesthetic", "faithfulness", "captioner", "ocr", "custom_judge")
    for task, name in itertools.chain.from_iterable([(task, name) for name in presets(task)] for task in tasks):
        assert f"{task}-{name}" in result.output
    bundled, pretrained = result.output.split("Pretrained models")
    assert "captioner-shapes" in bundled and "captioner-smolvlm" in pretrained and "captioner-smolvlm" not in bundled


def test_judge_list_prints_every_judge() -> None:
    from dpo_mm.judges.table import JUDGES

    printed = CliRunner().invoke(cli.app, ["judge", "list"]).output
    assert [name for name in JUDGES if f"{name} " not in printed] == [] and "degeneration rate (lower)" in printed


def test_preset_of_a_task_is_the_recipe_of_its_full_name() -> None:
    assert read_recipe("ocr", "pages", {"seed": "3"}) == read_recipe_file("ocr-pages", {"seed": "3"})


def test_steps_of_a_recipe_share_its_folders() -> None:
    recipe: dict[str, Any] = {"title": "t", "output_dir": "out", "mine": {}, "train": {}, "compare": {}}
    assert step_settings(recipe, "mine", source="r") == {"output_dir": str(Path("out/mined"))}
    assert step_settings(recipe, "train", source="r") == {
        "output_dir": str(Path("out/adapter")),
        "pairs": str(Path("out/mined/pairs.parquet")),
    }
    assert step_settings(recipe, "compare", source="r") == {"output_dir": "out", "adapter": str(Path("out/adapter"))}
    given = {"output_dir": "out", "mine": {}, "train": {"pairs": "mine.parquet", "output_dir": "elsewhere"}}
    assert step_settings(given, "train", source="r") == {"pairs": "mine.parquet", "output_dir": "elsewhere"}
    assert step_settings({"model": "m"}, "train", source="r") == {"model": "m"}
    with pytest.raises(ValueError, match="r: it has no section mine, only train"):
        step_settings({"train": {}}, "mine", source="r")


def test_train_takes_flags_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpo_mm.training import run

    monkeypatch.setattr(
        run, "dry_run", lambda settings: {"steps": str(settings.steps), "rate": str(settings.learning_rate)}
    )
    flags = ["--model", "shapes-sd", "--pairs", "shapes-faithfulness", "--output-dir", "out", "--max-steps", "9"]
    result = CliRunner().invoke(cli.app, ["train", "--dry-run", *flags, "--learning-rate", "1e-3"])
    assert result.exit_code == 0 and "9" in result.output and "0.001" in result.output
    missing = CliRunner().invoke(cli.app, ["train", "--model", "m"])
    assert (
        str(missing.exception)
        == "flags: pairs and output_dir missing. Give them in the file or as --pairs, --output-dir"
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train --learning", ["--learning-rate"]),
        ("train faithfulness-sdxl --steps 3 --dry", ["--dry-run"]),
        ("compare --questions-", []),
        ("compare --quest", ["--questions"]),
        ("compare --prom", ["--prompts"]),
        ("recipe custom", ["custom_judge-sums"]),
        ("train aesthetic-sd15-", ["aesthetic-sd15-mined"]),
        ("mine --help --pro", []),
    ],
)
def test_shell_completes_settings_and_presets(words: str, expected: list[str]) -> None:
    """Mutation: complete the options of the command only."""
    line = f"dpo-mm {words}"
    settings = {"_DPO_MM_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    result = CliRunner().invoke(cli.app, prog_name="dpo-mm", env=settings)
    assert result.output.split() == expected


def test_unknown_preset_is_refused_in_one_line() -> None:
    result = CliRunner().invoke(cli.app, ["train", "faithfulnes-sdxl"])
    assert str(result.exception) == (
        "faithfulnes-sdxl: no such file, and no preset of that name. `dpo-mm presets` lists the presets"
    )
    result = CliRunner().invoke(cli.app, ["recipe", "missing.yaml"])
    assert "no such file, and no preset" in str(result.exception)
