"""Tune an image editor on its own best and worst edits.

    python recipes/editing.py                             # bundled editor and edits, minutes on 2 CPU cores
    python recipes/editing.py --baseline sft              # also trains SFT on the same chosen images
    python recipes/editing.py --preset flux_kontext --mine.prompts edits --compare.prompts held_out

`dpo_mm.recipe.run_recipe` runs these steps in twenty lines: edit the images of the prompt list several times with the base
model, pair an edit that follows its instruction with one that does not, train a LoRA with Diffusion-DPO, edit held-out images
with the base and the tuned model from the same seeds, score both, write a report. One judge reads whether the instruction is
followed, the other whether the rest of the image is preserved. The settings are in recipes/presets/editing-*.yaml.

Departures from Diffusion-DPO (Wallace et al. 2023, 2311.12908): the image to edit is part of the prompt, a LoRA instead of
full fine-tuning, and pairs of the model's own images instead of human choices.
"""

import shlex
import sys

from dpo_mm.cli.command_settings import parse_overrides
from dpo_mm.cli.terminal import run_as_command, suppress_library_output
from dpo_mm.recipe import read_recipe, run_recipe


def main(arguments: list[str]) -> None:
    overrides = parse_overrides(arguments)
    with suppress_library_output():
        recipe = read_recipe("editing", overrides.pop("preset", "shapes"), overrides)
        run_recipe(recipe, command=shlex.join(["python", "recipes/editing.py", *arguments]))


if __name__ == "__main__":
    with run_as_command():
        main(sys.argv[1:])
