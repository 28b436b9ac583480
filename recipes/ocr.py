"""Teach a reader to stop looping, from its own failures.

    python recipes/ocr.py                                 # shipped reader and pages, minutes on 2 CPU cores
    python recipes/ocr.py --baseline sft                  # SFT on the same right transcriptions beside it
    python recipes/ocr.py --preset qwen2_5_vl --questions my_pages.jsonl --compare.questions my_held_out_pages.jsonl

What happens is `dpo_mm.recipe.run_recipe`: ask the model to read pages and keep those where it degenerates (rejected is what
it said, its loop cut three rounds after the truth's own; chosen is the right transcription), train a LoRA with DPO and
an SFT term, read held-out pages with base and tuned, judge both, write a report. The settings are in
recipes/presets/ocr-*.yaml; any of them is a flag.

The method is that of the article behind this project (own degenerate outputs as rejected, after fine-tuning); its beta,
rate and rank are not public, so those here are our own, found on the shipped reader.
"""

import shlex
import sys

from dpo_mm.cli.main import parse_overrides, suppress_library_output
from dpo_mm.recipe import read_recipe, run_recipe


def main(arguments: list[str]) -> None:
    given = parse_overrides(arguments)
    with suppress_library_output():
        recipe = read_recipe("ocr", given.pop("preset", "pages"), given)
        run_recipe(recipe, command=shlex.join(["python", "recipes/ocr.py", *arguments]))


if __name__ == "__main__":
    main(sys.argv[1:])
