"""Teach an image generator to draw what it is asked for.

    python recipes/faithfulness.py                        # shipped model and pairs, minutes on 2 CPU cores
    python recipes/faithfulness.py --baseline sft         # SFT on the same chosen pictures beside it
    python recipes/faithfulness.py --preset sd15 --pairs pairs.parquet --prompts prompts.txt --judges my_judges:score

What happens is `dpo_mm.recipe.run_recipe`, twenty lines: mine pairs (where the preset says so), train a LoRA with
Diffusion-DPO, draw base and tuned from the same seeds on held-out prompts, judge both, write a report. The settings are
in recipes/presets/faithfulness-*.yaml; any of them is a flag: --steps 300, or --compare.seed 1 for one step alone.

Departures from Diffusion-DPO (Wallace et al. 2023, 2311.12908): a LoRA instead of full fine-tuning, so that the
reference is the same weights with the adapter off, and a shorter run at a higher rate.
"""

import shlex
import sys

from dpo_mm.cli.main import parse_overrides, suppress_library_output
from dpo_mm.recipe import read_recipe, run_recipe


def main(arguments: list[str]) -> None:
    given = parse_overrides(arguments)
    with suppress_library_output():
        recipe = read_recipe("faithfulness", given.pop("preset", "shapes"), given)
        run_recipe(recipe, command=shlex.join(["python", "recipes/faithfulness.py", *arguments]))


if __name__ == "__main__":
    main(sys.argv[1:])
