"""Train a captioner to hallucinate fewer objects, on its own failures.

    python recipes/captioner.py                           # bundled captioner and scenes, minutes on 2 CPU cores
    python recipes/captioner.py --baseline sft            # also trains SFT on the same right captions
    python recipes/captioner.py --preset smolvlm --mine.questions photos.jsonl --mine.judges my_judges:hallucinated

`dpo_mm.recipe.run_recipe` runs these steps: generate captions and select those with hallucinated objects (rejected is the
model's caption, chosen the right one), train a LoRA with DPO and an SFT term, caption held-out images with the base and
the tuned model, score hallucination, recall and length, write a report. The settings are in
recipes/presets/captioner-*.yaml, and each of them is a flag. Recall is a guardrail metric, since a captioner that says
nothing hallucinates nothing.
"""

import shlex
import sys

from dpo_mm.cli.command_settings import parse_overrides
from dpo_mm.cli.terminal import run_as_command, suppress_library_output
from dpo_mm.recipe import read_recipe, run_recipe


def main(arguments: list[str]) -> None:
    overrides = parse_overrides(arguments)
    with suppress_library_output():
        recipe = read_recipe("captioner", overrides.pop("preset", "shapes"), overrides)
        run_recipe(recipe, command=shlex.join(["python", "recipes/captioner.py", *arguments]))


if __name__ == "__main__":
    with run_as_command():
        main(sys.argv[1:])
