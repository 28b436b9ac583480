"""Train a text model with a custom judge, here one that evaluates arithmetic expressions.

    python recipes/custom_judge.py                           # bundled arithmetic model, a minute on 2 CPU cores
    python recipes/custom_judge.py --baseline sft            # also trains SFT on the same right responses
    python recipes/custom_judge.py --model my/model --questions tasks.jsonl --judges my_judge:passes \\
        --compare.questions held_out.jsonl --guards none

A judge is any function of responses and ground truths that returns a ratio of hits and total for each response. This one
checks that an expression evaluates to the number. The expression is parsed and evaluated here, never executed as code. A
judge that runs a program against its tests, or compares a summary with its source, has the same form.

`dpo_mm.recipe.run_recipe` runs these steps: generate responses, pair the model's best response with its worst, train a
LoRA on the pairs, compare the base and the tuned model on held-out numbers. The settings are in
recipes/presets/custom_judge-*.yaml, and each of them is a flag.
"""

import ast
import operator
import re
import shlex
import sys
from collections.abc import Sequence

from dpo_mm.cli.command_settings import parse_overrides
from dpo_mm.cli.terminal import run_as_command, suppress_library_output
from dpo_mm.data.schema import Response
from dpo_mm.judges import Ratio
from dpo_mm.recipe import read_recipe, run_recipe

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
ALLOWED = re.compile(r"[0-9+\-*() ]{1,64}")


def value(text: str) -> int | None:
    """Value of an expression of integers, + - * and brackets, or None if it is not one or has no operator."""
    if not ALLOWED.fullmatch(text.strip()):
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        return evaluate(tree) if isinstance(tree, ast.BinOp) else None
    except (SyntaxError, ValueError):
        return None


def evaluate(node: ast.expr) -> int:
    """Evaluate a parsed expression.

    Raises:
        ValueError: if a node is neither an integer nor one of the operators. A power (**) is not allowed.
    """
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](evaluate(node.left), evaluate(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -evaluate(node.operand)
    raise ValueError(f"{ast.dump(node)} is not arithmetic")


def right(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """Rate of responses that evaluate to the number in their ground truth."""
    return [Ratio(float(str(value(r.text)) == t.strip()), 1) for r, t in zip(responses, ground_truths, strict=True)]


def runs(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """Rate of responses that can be evaluated."""
    return [Ratio(float(value(response.text) is not None), 1) for response in responses]


right.by_rule = runs.by_rule = True  # no part of them is learned, so they can be a report's primary metric


def main(arguments: list[str]) -> None:
    overrides = parse_overrides(arguments)
    with suppress_library_output():
        recipe = read_recipe("custom_judge", overrides.pop("preset", "sums"), overrides)
        run_recipe(recipe, command=shlex.join(["python", "recipes/custom_judge.py", *arguments]))


if __name__ == "__main__":
    with run_as_command():
        main(sys.argv[1:])
