"""Teach a writer of text with a judge of your own: here, one that runs what was written.

    python recipes/custom_judge.py                           # shipped writer of sums, a minute on 2 CPU cores
    python recipes/custom_judge.py --baseline sft            # SFT on the same right answers beside it
    PYTHONPATH=. python recipes/custom_judge.py --model my/model --questions tasks.jsonl --judge my_judge:passes \\
        --compare.questions held_out.jsonl --judges my_judge:passes --guards none

A judge is any function of answers and truths that says so many hits of so many of each. This one is asked whether an
expression reaches the number: the answer is parsed and worked out, never executed. A judge that runs a program against
its tests, or compares a summary with its source, has the same form. What happens is `dpo_mm.recipe.run_recipe`: answers are
drawn, the model's own best is chosen over its own worst, a LoRA learns from them, base and tuned are compared on
held-out numbers. The settings are in recipes/presets/custom_judge-*.yaml; any of them is a flag.
"""

import ast
import operator
import re
import shlex
import sys
from collections.abc import Sequence

from dpo_mm.cli.main import parse_overrides, suppress_library_output
from dpo_mm.data.schema import Response
from dpo_mm.judges import Ratio
from dpo_mm.recipe import read_recipe, run_recipe

SIGNS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
PLAIN = re.compile(r"[0-9+\-*() ]{1,64}")


def value(text: str) -> int | None:
    """What an expression of whole numbers, + - * and brackets comes to; None where it is none, or no sign is in it."""
    if not PLAIN.fullmatch(text.strip()):
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        return worked_out(tree) if isinstance(tree, ast.BinOp) else None
    except (SyntaxError, ValueError):
        return None


def worked_out(part: ast.expr) -> int:
    """The value of a parsed part. Raises ValueError for a part that is neither number nor sign, or a power (**)."""
    if isinstance(part, ast.Constant) and type(part.value) is int:
        return part.value
    if isinstance(part, ast.BinOp) and type(part.op) in SIGNS:
        return SIGNS[type(part.op)](worked_out(part.left), worked_out(part.right))
    if isinstance(part, ast.UnaryOp) and isinstance(part.op, ast.USub):
        return -worked_out(part.operand)
    raise ValueError(f"{ast.dump(part)} is no arithmetic")


def right(answers: Sequence[Response], truths: Sequence[str]) -> list[Ratio]:
    """Whether each answer comes to the number that is its truth."""
    return [Ratio(float(str(value(a.text)) == t.strip()), 1) for a, t in zip(answers, truths, strict=True)]


def runs(answers: Sequence[Response], truths: Sequence[str]) -> list[Ratio]:
    """Whether each answer can be worked out at all."""
    return [Ratio(float(value(answer.text) is not None), 1) for answer in answers]


right.by_rule = runs.by_rule = True  # nothing in them is learned: they may stand at a report's head


def main(arguments: list[str]) -> None:
    given = parse_overrides(arguments)
    with suppress_library_output():
        recipe = read_recipe("custom_judge", given.pop("preset", "sums"), given)
        run_recipe(recipe, command=shlex.join(["python", "recipes/custom_judge.py", *arguments]))


if __name__ == "__main__":
    main(sys.argv[1:])
