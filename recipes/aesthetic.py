"""Train an image generator to generate more aesthetic images that still follow their prompts.

    python recipes/aesthetic.py                           # bundled model and pairs, minutes on 2 CPU cores
    python recipes/aesthetic.py --baseline sft            # also trains SFT on the same chosen images
    python recipes/aesthetic.py --preset sd15 --pairs pairs.parquet --prompts prompts.txt --judges my_judges:score

The workflow is that of faithfulness.py (`dpo_mm.recipe.run_recipe`) with other settings. An aesthetic judge built the
bundled pairs, and only pairs whose chosen image follows the prompt at least as well were included. The primary metric of
the report is the aesthetic judge. The faithfulness judge is a guardrail metric: if it falls, the report calls the gain
over-optimised.
"""

import shlex
import sys

from dpo_mm.cli.command_settings import parse_overrides
from dpo_mm.cli.terminal import run_as_command, suppress_library_output
from dpo_mm.recipe import read_recipe, run_recipe


def main(arguments: list[str]) -> None:
    overrides = parse_overrides(arguments)
    with suppress_library_output():
        recipe = read_recipe("aesthetic", overrides.pop("preset", "shapes"), overrides)
        run_recipe(recipe, command=shlex.join(["python", "recipes/aesthetic.py", *arguments]))


if __name__ == "__main__":
    with run_as_command():
        main(sys.argv[1:])
