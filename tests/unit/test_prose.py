"""A ratchet for plain English: each pattern has a maximum count, which may only fall.

If a count is above its maximum, rewrite the sentence as CONTRIBUTING.md's style section has it. If it is below, lower
the maximum to the count.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = {
    r"\bpictures?\b": 10,
    r"\bbeside\b": 1,
    r"\bRaises \w+ where\b": 0,
    r"\bunless told otherwise\b": 0,
    r"\b(pair|token|step|prompt|row|image|question|response|answer|process)s? an? (step|prompt|page|pair|row|token|image|question|process|batch)\b": 0,
    r"\bkept\b": 12,
    r"\bas (it is|they are|it was|they were)\b": 4,
    r"\bof (its|their|his|your) own\b": 6,
    r"\b(stands?|stood) (in|at|on|behind|for|beside)\b": 0,
    r"\bgoes? on\b": 0,
    r"\bso many\b": 1,
    r"\bwon't do\b|\bwill do\b": 0,
}
"""Pattern to the number of lines of prose that have it: docs, README, docstrings, comments and strings of the package."""
DOCSTRING_STARTS = r"^(What|Whether|How|Within|Which|Where|Of|So many|That) "
MAX_DOCSTRING_STARTS = 0
NAMES = {"found": 9, "kept": 2, "said": 1, "asked": 1, "drawn": 0, "made": 2}
"""Name to the number of its uses as a variable in the package."""


def files(*patterns: str) -> list[Path]:
    paths = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    return [path for path in paths if "bundled" not in path.parts]


def code() -> list[Path]:
    return files("dpo_mm/**/*.py", "recipes/*.py", "demos/*.py")


@functools.cache
def prose() -> dict[str, list[str]]:
    """Lines of text by file: of Markdown without its code blocks, of Python its strings and comments."""
    texts = {}
    for path in files("README.md", "CONTRIBUTING.md", "docs/**/*.md", "dpo_mm/**/*.md", "recipes/**/*.md", "data/*.md"):
        if path.name != "changelog.md":
            text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.S)
            texts[str(path.relative_to(ROOT))] = text.splitlines()
    for path in code():
        tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
        words = [token.string for token in tokens if token.type in (tokenize.STRING, tokenize.COMMENT)]
        texts[str(path.relative_to(ROOT))] = [
            line for word in words for line in re.sub(r"`[^`\n]*`", "", word).splitlines()
        ]
    return texts


@functools.cache
def docstrings() -> dict[str, str]:
    starts = {}
    for path in code():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                starts[f"{path.relative_to(ROOT)}:{getattr(node, 'name', '')}"] = ast.get_docstring(node) or ""
    return starts


@functools.cache
def variables() -> list[tuple[str, str]]:
    """Place and name of each variable that the package assigns."""
    return [
        (f"{path.relative_to(ROOT)}:{node.lineno}", node.id)
        for path in code()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]


@pytest.mark.parametrize("pattern", TEXT)
def test_prose_uses_the_fields_words(pattern: str) -> None:
    texts = prose()
    assert len(texts) > 150
    hits = [
        f"{path}: {line.strip()}" for path, lines in texts.items() for line in lines if re.search(pattern, line, re.I)
    ]
    assert len(hits) <= TEXT[pattern], "\n".join(hits)


def test_docstrings_start_with_a_verb_or_a_noun() -> None:
    starts = docstrings()
    assert len(starts) > 900
    hits = [f"{place}: {text.splitlines()[0]}" for place, text in starts.items() if re.match(DOCSTRING_STARTS, text)]
    assert len(hits) <= MAX_DOCSTRING_STARTS, "\n".join(hits)


@pytest.mark.parametrize("name", NAMES)
def test_variables_are_named_after_their_content(name: str) -> None:
    hits = [place for place, variable in variables() if variable == name]
    assert len(hits) <= NAMES[name], "\n".join(hits)
