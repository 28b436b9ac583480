"""Imports point up the list of DESIGN: a module imports only from layers above its own, or beside it."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "dpo_mm"
LAYERS = (
    {"__init__", "worlds", "config", "errors", "progress", "resumable", "assets"},
    {"objectives"},
    {"data"},
    {"policies", "judges", "sources", "doctor"},
    {"training", "mining", "evaluation", "labels"},
    {"recipe"},
    {"cli", "demo_server", "__main__"},
)
MOVING = {
    0: {"shipped"},
    2: {"schema", "pictures", "pairs", "prompts", "questions"},
    3: {"provenance"},
    4: {"reference", "encoding", "shards", "kept", "collate", "beta", "setup", "checkpoints", "guards", "drift", "card"}
    | {"memory", "trainer", "own_failures", "verify", "scoring", "relabel"},
    6: {"terminal", "page_commands", "pages"},
}
"""Modules that still stand at the root, by the layer they belong to."""


def layer(module: str) -> int:
    name = module.split(".")[1] if "." in module else "__init__"
    return next(number for number, names in enumerate(LAYERS) if name in names | MOVING.get(number, set()))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dpo_mm"):
            base = node.module or ""
            found |= {f"{base}.{name.name}" for name in node.names} if base == "dpo_mm" else {base}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith("dpo_mm")}
    return found


def test_imports_point_up() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if "bundled" not in path.relative_to(PACKAGE).parts]
    assert len(files) > 20
    wrong = []
    for path in files:
        module = ".".join(("dpo_mm", *path.relative_to(PACKAGE).with_suffix("").parts))
        wrong += [f"{module} -> {name}" for name in imports(path) if layer(name) > layer(module)]
    assert not wrong


def test_judges_see_no_policy() -> None:
    wrong = [path.name for path in (PACKAGE / "judges").glob("*.py") if any("policies" in i for i in imports(path))]
    assert not wrong


def test_files_keep_their_size() -> None:
    long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long
