"""docs/reference/models.md has the results of the contract tests: every family, and a reason for each cell without a pass."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

from dpo_mm.policies.families import FAMILIES

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("draw_families", ROOT / "docs" / "draw_families.py")
assert SPEC and SPEC.loader
draw = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(draw)


def rows(name: str) -> list[dict[str, str]]:
    """A table of the page by its marker, one dict per row."""
    block = draw.PAGE.read_text().partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines() if line[:1] == "|"]
    head, _, *body = lines
    return [dict(zip(head, line, strict=True)) for line in body]


def test_models_page_has_every_family() -> None:
    assert {row["class"].strip("`") for row in rows("images")} == set(FAMILIES)


def test_models_page_cell_is_a_pass_or_has_a_reason() -> None:
    notes = draw.PAGE.read_text()
    for name, kind in draw.KINDS.items():
        table = rows(name)
        assert table and set(kind.columns) < set(table[0])
        for row in table:
            for column in kind.columns:
                found = re.fullmatch(rf"{draw.GREEN}( \[\d+\])?", row[column])
                assert found, f"{row['tiny pipeline']}, {column}: {row[column]}"
                assert found[1] is None or f"\n{found[1].strip()} " in notes


def test_models_page_column_is_a_contract_test() -> None:
    for kind in draw.KINDS.values():
        tests = ast.walk(ast.parse((ROOT / kind.tests).read_text()))
        assert set(kind.columns.values()) <= {node.name for node in tests if isinstance(node, ast.FunctionDef)}


def test_image_family_files_are_short() -> None:
    for name in FAMILIES.values():
        module = name.partition(":")[0].replace(".", "/")
        assert len((ROOT / f"{module}.py").read_text().splitlines()) <= 120


def result(test: str, passed: bool, reason: str | None = None) -> object:
    return draw.Result(test, "some", passed, None, reason)


def test_models_page_cell_is_the_result_of_its_tests() -> None:
    notes: list[str] = []
    assert draw.cell([result("a", True), result("a", True)], notes) == draw.GREEN
    assert draw.cell([result("a", True), result("a", False)], notes) == draw.RED == draw.cell([], notes)
    assert draw.cell([result("a", True, "for it has no such file")], notes) == f"{draw.GREEN} [1]"
    assert draw.cell([result("a", True, "another"), result("a", True)], notes) == f"{draw.GREEN} [2]"
    assert notes == ["for it has no such file", "another"]
