"""Train an image generator to follow its prompt.

    python recipes/faithfulness.py                        # bundled model and pairs, minutes on 2 CPU cores
    python recipes/faithfulness.py --baseline sft         # also trains SFT on the same chosen images
    python recipes/faithfulness.py --preset sd15 --pairs pairs.parquet --prompts prompts.txt --judges my_judges:score

`dpo_mm.recipe.run_recipe` runs these steps in twenty lines: mine pairs (if the preset has a mine section), train a LoRA
with Diffusion-DPO, generate images with the base and the tuned model from the same seeds on held-out prompts, score both,
write a report. The settings are in recipes/presets/faithfulness-*.yaml. Each of them is a flag: --steps 300 for every
section, or --compare.seed 1 for one.

Departures from Diffusion-DPO (Wallace et al. 2023, 2311.12908): a LoRA instead of full fine-tuning, so the reference has
the same weights with the adapter disabled, and a shorter run at a higher learning rate.
"""

import shlex
import sys

from dpo_mm.cli.command_settings import parse_overrides
from dpo_mm.cli.terminal import run_as_command, suppress_library_output
from dpo_mm.recipe import read_recipe, run_recipe


def main(arguments: list[str]) -> None:
    overrides = parse_overrides(arguments)
    with suppress_library_output():
        recipe = read_recipe("faithfulness", overrides.pop("preset", "shapes"), overrides)
        run_recipe(recipe, command=shlex.join(["python", "recipes/faithfulness.py", *arguments]))


if __name__ == "__main__":
    with run_as_command():
        main(sys.argv[1:])
