"""The JSON schema accepts what the commands accept, and refuses what editors should underline."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from dpo_mm.assets import presets_folder
from dpo_mm.cli.main import app
from dpo_mm.config.json_schema import recipe_schema


def errors(text: str) -> list[str]:
    validator = jsonschema.Draft202012Validator(recipe_schema())
    return [error.message for error in validator.iter_errors(yaml.safe_load(text))]


@pytest.mark.parametrize("preset", sorted(presets_folder().glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_are_valid(preset: Any) -> None:
    assert errors(preset.read_text()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {step: 3}", "'step' was unexpected"),
        ("train: {steps: 0}", "0 is less than the minimum of 1"),
        ("train: {steps: many}", "'many' is not of type 'integer'"),
        ("compare: {judges: 3}", "3 is not valid under any of the given schemas"),
        ("mine: {overwrite: 5}", "5 is not of type 'boolean'"),
        ("baseline: dpo", "'dpo' is not one of ['sft', None]"),
    ],
)
def test_mistakes_are_found(text: str, message: str) -> None:
    (error,) = errors(text)
    assert message in error


@pytest.mark.parametrize(
    "text",
    [
        "train: {learning_rate: 1e-4, max_steps: 3, beta: auto, objective: {sigmoid: 1, sft: 0.5}, max_length: null}",
        "compare: {judges: 'a,b', side_sets: [more.txt, {prompts: p.txt, judges: [aesthetic]}], scales: [0.5]}",
        "compare: {questions: q.jsonl, side_sets: [more.jsonl, {questions: p.jsonl, judges: [cer], max_questions: 9}]}",
    ],
)
def test_forms_that_the_commands_accept_are_valid(text: str) -> None:
    assert errors(text) == []


def test_command_prints_the_schema_with_descriptions_and_defaults() -> None:
    printed = json.loads(CliRunner().invoke(app, ["schema"]).output)
    steps = printed["properties"]["train"]["properties"]["steps"]
    assert steps["default"] == 1000 and steps["description"] == "Number of optimizer steps."
