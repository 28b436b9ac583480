"""Teach an image generator to draw prettier pictures, without disobeying its prompt for it.

    python recipes/aesthetic.py                           # shipped model and pairs, minutes on 2 CPU cores
    python recipes/aesthetic.py --baseline sft            # SFT on the same chosen pictures beside it
    python recipes/aesthetic.py --preset sd15 --pairs pairs.parquet --prompts prompts.txt --judges my_judges:score

The same walk as faithfulness.py (`dpo_mm.recipe.run_recipe`), other strings: the shipped pairs were judged by beauty, and a
pair was kept only where the prettier picture follows its prompt at least as well. The report's headline is the
aesthetic judge; the faithfulness judge stands guard, and a gain that costs obedience is called over-optimised.
"""

import shlex
import sys

from dpo_mm.cli.main import parse_overrides, suppress_library_output
from dpo_mm.recipe import read_recipe, run_recipe


def main(arguments: list[str]) -> None:
    given = parse_overrides(arguments)
    with suppress_library_output():
        recipe = read_recipe("aesthetic", given.pop("preset", "shapes"), given)
        run_recipe(recipe, command=shlex.join(["python", "recipes/aesthetic.py", *arguments]))


if __name__ == "__main__":
    main(sys.argv[1:])
