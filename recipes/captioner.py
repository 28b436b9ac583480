"""Teach a captioner to stop inventing, from its own failures.

    python recipes/captioner.py                           # shipped captioner and scenes, minutes on 2 CPU cores
    python recipes/captioner.py --baseline sft            # SFT on the same right captions beside it
    python recipes/captioner.py --preset smolvlm --questions photos.jsonl --judge my_judges:invented

What happens is `dpo_mm.recipe.run_recipe`: ask the model for captions and keep those that name what isn't there (rejected is
what it said, chosen the right caption), train a LoRA with DPO and an SFT term, caption held-out pictures with base and
tuned, judge invention, recall and length, write a report. The settings are in recipes/presets/captioner-*.yaml; any of
them is a flag. Recall stands guard: a captioner that says nothing invents nothing.
"""

import shlex
import sys

from dpo_mm.cli.main import parse_overrides, suppress_library_output
from dpo_mm.recipe import read_recipe, run_recipe


def main(arguments: list[str]) -> None:
    given = parse_overrides(arguments)
    with suppress_library_output():
        recipe = read_recipe("captioner", given.pop("preset", "shapes"), given)
        run_recipe(recipe, command=shlex.join(["python", "recipes/captioner.py", *arguments]))


if __name__ == "__main__":
    main(sys.argv[1:])
