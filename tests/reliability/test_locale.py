"""Files are written and read as UTF-8 in every locale."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability import commands

ROOT = Path(__file__).parents[2]


def calls_without_encoding(source: str) -> list[int]:
    """Lines that open a text file without naming its encoding."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        mode = node.args[0 if isinstance(node.func, ast.Attribute) else 1 :][:1]
        is_text_mode = [isinstance(one, ast.Constant) and str(one.value).strip("rwax+t") == "" for one in mode] == [
            True
        ]
        if name == "write_text" or (name == "read_text" and not node.args) or (name == "open" and is_text_mode):
            lines.append(node.lineno)
    return lines


def test_every_text_file_is_opened_with_an_encoding() -> None:
    """Mutation that it catches: a file is written in the locale's encoding, which has no é in LC_ALL=C."""
    assert calls_without_encoding("p.read_text()\nopen(p, 'a')\np.open('w')\np.open('rb')\np.read_text('utf-8')") == [
        1,
        2,
        3,
    ]
    files = [path for folder in ("dpo_mm", "demos", "recipes") for path in (ROOT / folder).rglob("*.py")]
    wrong = {str(path): lines for path in files if (lines := calls_without_encoding(path.read_text(encoding="utf-8")))}
    assert len(files) > 150 and not wrong


def run_commands() -> None:
    """Run commands that write text in this process, and exit with the name of the first that fails."""
    from dpo_mm.cli.main import main

    assert sys.getfilesystemencoding() != "utf-8"
    inputs, out = Path(sys.argv[1]), Path(sys.argv[2])
    for name in ("import", "mine responses", "compare images", "label export", "doctor"):
        sys.argv = ["dpo-mm", *commands.commands(inputs, out)[name]]
        try:
            main()
        except SystemExit as end:
            if end.code:
                sys.exit(f"failed: {name}")


@pytest.mark.slow
def test_commands_run_in_the_c_locale(tmp_path: Path) -> None:
    """Prompts with é and 两 go through the commands in a locale that has only ASCII."""
    commands.write_inputs(tmp_path / "inputs")
    script = "from tests.reliability.test_locale import run_commands; run_commands()"
    environment = commands.environment(tmp_path / "cache", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "inputs"), str(tmp_path / "out")],
        env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    texts = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.suffix in (".jsonl", ".html", ".json")]
    assert sum("café".encode() in text for text in texts) >= 3
