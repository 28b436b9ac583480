"""A module imports only from its own layer and from the layers above it in LAYERS."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "dpo_mm"
LAYERS = (
    {"__version__", "worlds", "config", "errors", "assets", "process", "printing", "files", "models"},
    {"objectives"},
    {"data"},
    {"policies", "judges", "sources", "doctor"},
    {"training", "mining", "evaluation", "labels"},
    {"recipe", "rounds", "export"},
    {"cli", "pages", "__main__", "__init__"},
)


def layer(module: str) -> int:
    name = module.split(".")[1] if "." in module else "__init__"
    return next(number for number, names in enumerate(LAYERS) if name in names)


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dpo_mm"):
            base = node.module or ""
            names |= {f"{base}.{name.name}" for name in node.names} if base == "dpo_mm" else {base}
        elif isinstance(node, ast.Import):
            names |= {name.name for name in node.names if name.name.startswith("dpo_mm")}
    return names


def imports_at_load(path: Path) -> set[str]:
    """Modules that are imported when this one is, without imports in functions and for type checking."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dpo_mm"):
            base = node.module or ""
            names |= {f"{base}.{n.name}" if is_module(f"{base}.{n.name}") else base for n in node.names}
    return names


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def test_modules_import_only_from_their_layer_or_above() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if "bundled" not in path.relative_to(PACKAGE).parts]
    assert len(files) > 20
    wrong = []
    for path in files:
        module = ".".join(("dpo_mm", *path.relative_to(PACKAGE).with_suffix("").parts))
        wrong += [f"{module} -> {name}" for name in imports(path) if layer(name) > layer(module)]
    assert not wrong


def test_judges_do_not_import_policies() -> None:
    wrong = [path.name for path in (PACKAGE / "judges").glob("*.py") if any("policies" in i for i in imports(path))]
    assert not wrong


def test_module_file_names_are_unique() -> None:
    names = [path.name for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    assert len(names) > 100
    assert sorted(set(names)) == sorted(names)


def test_imports_have_no_cycle() -> None:
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        graph[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = imports_at_load(path)
    done: set[str] = set()

    def visit(module: str, chain: tuple[str, ...]) -> None:
        assert module not in chain, " -> ".join((*chain, module))
        if module not in done:
            for name in graph.get(module, set()) - {module}:
                visit(name, (*chain, module))
            done.add(module)

    for module in graph:
        visit(module, ())
    assert len(done) > 100


def test_files_have_at_most_400_lines() -> None:
    long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long
