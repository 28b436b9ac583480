"""A wheel works outside the repository: presets and their judges, bundled models, demos, types."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.wheels import build_wheel

MAX_BYTES = 60e6
"""Size of a wheel with its models and datasets, at most. Package indexes refuse files above 100 MB."""
CHECK = """
import sys
from pathlib import Path
import dpo_mm
from dpo_mm.assets import BUNDLED, demos_folder, resolve_asset, presets_folder
from dpo_mm.judges import JUDGES, load_judge, parse_judge_name
from dpo_mm.recipe import read_recipe

folder = Path(sys.argv[1])
assert folder in Path(dpo_mm.__file__).parents, dpo_mm.__file__
assert all(folder in Path(resolve_asset(name)).parents and Path(resolve_asset(name)).exists() for name in BUNDLED)
assert (demos_folder() / "label.py").is_file()
presets = sorted(presets_folder().glob("*.yaml"))
assert len(presets) == 45, len(presets)
custom = set()
for path in presets:
    task, _, name = path.stem.partition("-")
    custom |= {judge for judge in read_recipe(task, name, {}).compare.judges if parse_judge_name(judge) is None}
assert {judge.partition(":")[0] for judge in custom} == {"custom_judge", "my_judges"}, custom
for judge in custom:
    if judge.startswith("custom_judge"):
        assert load_judge(judge)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a wheel built from the repository."""
    path = build_wheel(tmp_path_factory)
    assert path.stat().st_size < MAX_BYTES
    return path


@pytest.mark.slow
def test_unpacked_wheel_contains_everything_that_presets_use(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    assert (tmp_path / "site" / "dpo_mm" / "py.typed").is_file()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CHECK, str(tmp_path / "site")]
    done = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    help_output = subprocess.run(
        [sys.executable, "-m", "dpo_mm", "--help"], cwd=elsewhere, env=env, capture_output=True
    )
    assert help_output.returncode == 0 and b"quickstart" in help_output.stdout
