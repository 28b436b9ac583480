from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import dpo_mm

PUBLIC = [
    "OBJECTIVES",
    "CompareConfig",
    "CompareResponsesConfig",
    "CompareResult",
    "Comparison",
    "DPOConfig",
    "DPOTrainer",
    "JudgeConfig",
    "LogProbs",
    "MineConfig",
    "MineResponsesConfig",
    "MineResult",
    "RelabelConfig",
    "RelabelResult",
    "ScoreResult",
    "TrainConfig",
    "TrainResult",
    "TrainingInterrupted",
    "__version__",
    "compare",
    "load_pairs",
    "load_policy",
    "load_responses",
    "mine",
    "relabel",
    "score",
    "train",
]


def test_public_names_are_frozen_and_importable() -> None:
    assert dpo_mm.__all__ == PUBLIC
    assert set(dir(dpo_mm)) == set(PUBLIC)
    assert all(getattr(dpo_mm, name) is not None for name in dpo_mm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dpo_mm.nothing


def test_lazy_imports_equal_the_imports_for_type_checkers() -> None:
    tree = ast.parse(Path(dpo_mm.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {
        name.name: str(node.module) for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names
    }
    assert imported == dpo_mm._MODULES
    assert set(imported) == set(dpo_mm.__all__) - {"__version__"}


def test_import_loads_no_heavy_library() -> None:
    code = "import sys, dpo_mm; print([m for m in ('torch', 'numpy', 'diffusers', 'transformers') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_command_line_loads_no_heavy_library() -> None:
    code = "import sys, dpo_mm.cli.main, dpo_mm.recipe, dpo_mm.labels.pairs; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_names_that_scripts_import_exist() -> None:
    """Benchmarks and scripts are run by hand, so this test checks their imports, those in functions included."""
    root = Path(__file__).parents[2]
    scripts = [
        path
        for folder in ("tests/bench", "tests/bench/gpu", "docs", "data", "demos", "recipes")
        for path in (root / folder).glob("*.py")
    ]
    assert len(scripts) > 25
    missing = []
    for path in scripts:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dpo_mm"):
                module = importlib.import_module(str(node.module))
                inside = {submodule.name for submodule in pkgutil.iter_modules(getattr(module, "__path__", []))}
                missing += [
                    f"{path.name}: {node.module}.{n.name}"
                    for n in node.names
                    if not hasattr(module, n.name) and n.name not in inside
                ]
    assert not missing
