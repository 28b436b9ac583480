"""Commands in README and docs parse: their names, arguments and flags exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from tests.unit.docs.test_tutorials import parse_command

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LAUNCHERS = ("accelerate", "srun", "torchrun")


def commands(page: Path) -> list[list[str]]:
    """Commands of dpo-mm in the blocks of a page, as words. A file of the reader, such as my-recipe.yaml, is a preset instead."""
    found = []
    for block in re.findall(r"```bash[^\n]*\n(.*?)\n *```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in re.split(r"\n|&&|[|>]", block.replace("\\\n", " ")):
            words = shlex.split(line, comments=True)
            if words[:1] and words[0] in LAUNCHERS and "dpo_mm" in words:
                words = ["dpo-mm", *words[words.index("dpo_mm") + 1 :]]
            if words[:1] == ["dpo-mm"] and "…" not in words:
                found.append([re.sub(r"^[\w-]+\.yaml$", "captioner-shapes", word) for word in words])
    return found


def test_every_command_in_the_docs_parses() -> None:
    wrong, count = [], 0
    for page in PAGES:
        for words in commands(page):
            count += 1
            try:
                parse_command(words)
            except (click.ClickException, ValueError, AssertionError) as error:
                wrong.append(f"{page.relative_to(ROOT)}: {shlex.join(words)}: {error}")
    assert count > 150 and wrong == []


def test_wrong_flag_does_not_parse() -> None:
    with pytest.raises(AssertionError, match="no_such_flag"):
        parse_command(["dpo-mm", "train", "captioner-shapes", "--no-such-flag", "1"])
