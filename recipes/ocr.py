"""Train an OCR model to avoid repetition loops, on its own failures.

    python recipes/ocr.py                                 # bundled OCR model and pages, minutes on 2 CPU cores
    python recipes/ocr.py --baseline sft                  # also trains SFT on the same right transcriptions
    python recipes/ocr.py --preset qwen2_5_vl --mine.questions my_pages.jsonl --compare.questions my_held_out_pages.jsonl

`dpo_mm.recipe.run_recipe` runs these steps: transcribe pages and select those on which the model degenerates (rejected is
its response, with the loop truncated to three repeats more than the ground truth has, and chosen is the right
transcription), train a LoRA with DPO and an SFT term, transcribe held-out pages with the base and the tuned model, score
both, write a report. The settings are in recipes/presets/ocr-*.yaml, and each of them is a flag.

The method is that of the article behind this project: the model's own degenerate outputs as rejected, after fine-tuning.
Its beta, learning rate and rank are not public, so ours were found on the bundled OCR model.
"""

import shlex
import sys

from dpo_mm.cli.command_settings import parse_overrides
from dpo_mm.cli.terminal import run_as_command, suppress_library_output
from dpo_mm.recipe import read_recipe, run_recipe


def main(arguments: list[str]) -> None:
    overrides = parse_overrides(arguments)
    with suppress_library_output():
        recipe = read_recipe("ocr", overrides.pop("preset", "pages"), overrides)
        run_recipe(recipe, command=shlex.join(["python", "recipes/ocr.py", *arguments]))


if __name__ == "__main__":
    with run_as_command():
        main(sys.argv[1:])
