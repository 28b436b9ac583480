"""Commands for recipes: `dpo-mm presets` and `dpo-mm recipe`."""

from __future__ import annotations

from typing import Annotated

import typer

from dpo_mm.cli.command_settings import SETTINGS_AS_FLAGS, parse_overrides
from dpo_mm.cli.terminal import report_command, suppress_library_output
from dpo_mm.printing.printed_text import print_rows


def preset_names(incomplete: str) -> list[str]:
    """Names of presets that complete a word in a shell."""
    from dpo_mm.assets import presets_folder

    return sorted(file.stem for file in presets_folder().glob("*.yaml") if file.stem.startswith(incomplete))


def list_presets() -> None:
    """List the presets.

    `recipe`, `train`, `mine` and `compare` accept them by name.
    """
    from dpo_mm.assets import BUNDLED, presets_folder
    from dpo_mm.config.config_parsing import read_yaml

    recipes = {file.stem: read_yaml(file) for file in sorted(presets_folder().glob("*.yaml"))}
    titles = {name: one["title"] + ", a shorter run" * name.endswith("-quickstart") for name, one in recipes.items()}
    bundled = [name for name, one in recipes.items() if one["train"]["model"] in BUNDLED]
    print("Bundled models and data, minutes on 2 CPU cores:\n")
    print_rows({name: titles[name] for name in bundled})
    print("\nPretrained models, for your data. Their results have not been measured:\n")
    print_rows({name: titles[name] for name in recipes if name not in bundled})


def print_schema() -> None:
    """Print the JSON schema of recipe files.

    Editors complete and check settings with it: dpo-mm schema > recipe.schema.json
    """
    import json

    from dpo_mm.config.json_schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=1))


def run_preset(
    context: typer.Context,
    recipe: Annotated[
        str,
        typer.Argument(
            help="Name of a preset, or YAML file with the sections train and compare.", autocompletion=preset_names
        ),
    ],
) -> None:
    """Mine pairs, train and compare in one run.

    Mining is left out if the recipe has no section mine. --baseline sft also trains SFT on the chosen side and compares both. --rounds 3 repeats the steps while they help. --output-dir is the folder of all results. Every setting is a flag too: --steps 300 for every step of the recipe that has it, --compare.seed 1 for one.
    """
    from dpo_mm.recipe import read_recipe_file, run_recipe

    settings = read_recipe_file(recipe, parse_overrides(context.args))
    with suppress_library_output(training=True):
        run_recipe(settings, command=report_command())


def add_commands(app: typer.Typer) -> None:
    """Add the commands to an app."""
    app.command("presets")(list_presets)
    app.command("schema")(print_schema)
    app.command("recipe", context_settings=SETTINGS_AS_FLAGS)(run_preset)
