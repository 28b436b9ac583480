"""Each tutorial runs from top to bottom in an empty folder, with smaller sizes, as a reader runs it.

A block with a file name (```python title="judge.py") is written to that file. Other blocks of Python run as a script, and each line of
a block of bash is a command. A comment in the Markdown before a block says what differs:

    <!-- not run: REASON -->     its commands are only parsed
    <!-- exit status 1 -->       its command exits with this status
"""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from dpo_mm import config
from dpo_mm.cli.command_settings import file_and_flags, parse_overrides
from dpo_mm.cli.main import app
from dpo_mm.recipe import read_recipe_file
from tests import forked

TUTORIALS = Path(__file__).parents[3] / "docs" / "tutorials"
IMAGES = (("--images-per-prompt 2", "--max-prompts 4 --images-per-prompt 1 --num-inference-steps 2"),)
SMALLER: dict[str, tuple[tuple[str, str], ...]] = {
    "captioner": (
        ("--max-questions 300", "--max-questions 40"),
        ("--steps 80", "--steps 2 --batch-size 4"),
        ("--max-questions 200", "--max-questions 20"),
        ("[20:24]", "[20:21]"),
    ),
    "custom-judge": (
        ("max_questions: 1000", "max_questions: 60"),
        ("steps: 120", "steps: 2"),
        ("warmup_steps: 5", "warmup_steps: 1"),
        ("responses_per_question: 9", "responses_per_question: 4"),
        ("max_questions: 400", "max_questions: 20"),
    ),
    "first-lora": (
        ("range(200)", "range(24)"),
        ("--steps 120", "--steps 2 --warmup-steps 1 --batch-size 4"),
        ("--max-prompts 36 ", ""),
        *IMAGES,
        ("num_inference_steps=15", "num_inference_steps=2"),
    ),
    "ocr": (
        ("limit=400", "limit=24"),
        ("--steps 40", "--steps 2 --batch-size 4"),
        ("--max-questions 200", "--max-questions 8 --max-new-tokens 40"),
        ("--max-questions 400", "--max-questions 24 --max-new-tokens 100"),
        ("limit=24", "limit=2"),
    ),
    "public-dataset": (
        ("range(320)", "range(48)"),
        ("--steps 100", "--steps 2 --warmup-steps 1 --batch-size 4"),
        *IMAGES,
        ("num_inference_steps=15", "num_inference_steps=2"),
    ),
    "votes": (
        ("[::12]", "[::40]"),
        ("--steps 80", "--steps 2 --warmup-steps 1 --batch-size 4"),
        *IMAGES,
        ("num_inference_steps=15", "num_inference_steps=2"),
    ),
}
"""Text of each tutorial and what the test runs instead."""
BLOCK = re.compile(r"(?:^<!-- (?P<note>[^\n]*) -->\n+)?^```(?P<language>bash|python|yaml)(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.M | re.S)  # fmt: skip
SETTINGS = {field.name for kind in vars(config).values() if dataclasses.is_dataclass(kind) for field in dataclasses.fields(kind)}  # fmt: skip


class Block(NamedTuple):
    """A block of code: the comment before it, its language, the file that it is written to, and its text."""

    note: str
    language: str
    file: str
    body: str

    @property
    def commands(self) -> list[list[str]]:
        """The commands of a block of bash, as words."""
        lines = self.body.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(text: str) -> list[Block]:
    """The blocks of a page, in order."""
    return [
        Block(
            match["note"] or "",
            match["language"],
            (re.findall('title="([^"]+)"', match["info"]) or [""])[0],
            match["body"],
        )
        for match in BLOCK.finditer(text)
    ]


def smaller(text: str, replacements: tuple[tuple[str, str], ...]) -> str:
    """The page with smaller sizes. A replacement that no longer matches is an error."""
    for old, new in replacements:
        assert old in text, f"{old!r} is not in the page. Update SMALLER"
        text = text.replace(old, new)
    return text


@functools.cache
def root_command() -> Any:
    return typer.main.get_command(app)


def parse_command(words: list[str]) -> None:
    """Parse a command without running it. An unknown command, argument or flag is an error."""
    assert words[0] == "dpo-mm", words
    if words[1] == "recipe":
        read_recipe_file(words[2], parse_overrides(words[3:]))
        return
    command: Any = root_command()
    name, rest = words[0], words[1:]
    while hasattr(command, "commands"):
        name, *rest = rest
        command = command.commands[name]
    context = command.make_context(name, rest)
    _, flags = file_and_flags(context, context.params.get("config"))
    unknown = set(parse_overrides(flags)) - SETTINGS
    assert not unknown, unknown


def run_block(block: Block, folder: Path) -> None:
    """Write or run a block."""
    status = int(block.note.rpartition(" ")[2]) if block.note.startswith("exit status") else 0
    if block.file:
        (folder / block.file).write_text(block.body)
    elif block.note.startswith("not run: "):
        for words in block.commands:
            parse_command(words)
    elif block.language == "python":
        (folder / "block.py").write_text(block.body)
        forked.run("block.py", call=forked.script, cwd=folder, check=True)
    else:
        assert block.language == "bash"
        for words in block.commands:
            call = {"dpo-mm": forked.command, "python": forked.script}[words[0]]
            done = forked.run(*words[1:], call=call, cwd=folder)
            assert done.returncode == status, f"{shlex.join(words)}: {done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALLER))
def test_tutorial_runs_from_top_to_bottom(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_MM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "reader"
    folder.mkdir()
    steps = blocks(smaller((TUTORIALS / f"{name}.md").read_text(encoding="utf-8"), SMALLER[name]))
    assert sum(step.language == "bash" for step in steps) >= 3
    assert any("from_pretrained" in step.body for step in steps), "it does not show the adapter being used"
    for step in steps:
        run_block(step, folder)


def test_every_tutorial_is_run_and_has_the_sections_of_its_kind() -> None:
    pages = sorted(path.stem for path in TUTORIALS.glob("*.md") if path.stem != "index")
    assert pages == sorted(SMALLER)
    for page in pages:
        text = (TUTORIALS / f"{page}.md").read_text(encoding="utf-8")
        headings = re.findall("^## (.+)$", text, re.M)
        assert headings[-3:] == ["Check that it worked", "With your own data", "Next steps"] or page == "custom-judge"
        assert all(f"\n| {row} | " in text for row in ("You end with", "Time", "Card", "You need"))


def test_flag_that_does_not_exist_is_an_error() -> None:
    parse_command(["dpo-mm", "train", "faithfulness-sd15", "--pairs", "x", "--vram", "12", "--dry-run"])
    for words in (
        ["train", "config.yaml", "--stepz", "1"],
        ["demo", "label", "--vote", "v"],
        ["recipe", "ocr-smolvlm", "--stepz", "1"],
    ):
        with pytest.raises(Exception, match=r"stepz|--vote"):
            parse_command(["dpo-mm", *words])


def test_every_command_of_the_docs_exists_with_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    """What follows >, | or && in a line is left out, and so are recipes of the reader's own."""
    pages = [*TUTORIALS.parent.rglob("*.md"), TUTORIALS.parents[1] / "README.md"]
    found = [
        (page.name, words[: next((n for n, word in enumerate(words) if word in (">", "|", "&&")), None)])
        for page in pages
        for block in blocks(page.read_text(encoding="utf-8"))
        if block.language == "bash"
        for words in block.commands
        if words[:1] == ["dpo-mm"] and "…" not in words and words[1:2] != ["recipe"]
    ]
    assert len(found) > 120
    for page, words in found:
        try:
            parse_command(words)
        except typer.Exit:  # --version and --help
            continue
        except Exception as error:
            pytest.fail(f"{page}: {' '.join(words)}: {error}")
