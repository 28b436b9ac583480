"""mypy finds the types of every public name in an installed wheel, and reports mistakes in a user's script."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.reliability.test_wheel import wheel as wheel

pytestmark = pytest.mark.slow

SCRIPT = """
from pathlib import Path

import dpo_mm
from datasets import Dataset
from dpo_mm import CompareConfig, CompareResponsesConfig, DPOConfig, DPOTrainer, MineConfig, MineResponsesConfig, TrainConfig

config = TrainConfig(model="shapes-sd", pairs="shapes-faithfulness", output_dir="runs/user", steps=4)
result: dpo_mm.TrainResult = dpo_mm.train(config)
folder: Path = result.folder
compared: dpo_mm.CompareResult = dpo_mm.compare(CompareConfig("shapes-sd", "runs/compare", adapter=str(folder)))
differences: list[float] = [comparison.difference for comparison in compared.comparisons]
mined: Path = dpo_mm.mine(MineConfig("shapes-sd", "shapes-train", "runs/mined", judges="faithfulness")).path
dpo_mm.compare(CompareResponsesConfig("page-reader", "runs/ocr", "pages-held-out"))
dpo_mm.mine(MineResponsesConfig("page-reader", "pages-train", "runs/own", judges="cer"))
policy = dpo_mm.load_policy("shapes-sd")
if policy.modality == "image":
    rows: Dataset = dpo_mm.load_pairs("shapes-faithfulness")
    trainer = DPOTrainer(policy.pipe, args=DPOConfig("runs/class", max_steps=4, loss_type="ipo"), train_dataset=rows)
    losses: list[float] = [entry["loss"] for entry in trainer.train().history]
    copied: Path = trainer.save_model("runs/copy")
    policy.sample(["a red circle"], [0], steps=4, guidance=2.0, batch_size=1)
"""
MISTAKES = """
import dpo_mm

dpo_mm.train(dpo_mm.CompareConfig("a", "b"))
dpo_mm.TrainConfig(model="a", pairs="b", output_dir="c", steps="many")
dpo_mm.load_policy("a").generate([], [], max_new_tokens=1, do_sample=False)
dpo_mm.nothing
dpo_mm.DPOTrainer(None, args=dpo_mm.TrainConfig("a", "b", "c"), train_dataset=None)
"""

SETTINGS = """[mypy]
strict = true
ignore_missing_imports = true
follow_imports = skip
[mypy-dpo_mm.*]
follow_imports = silent
"""
"""Types of other libraries are Any here. Only dpo-mm's types are checked, which takes a tenth of the time."""


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with the wheel and this environment's libraries."""
    folder = tmp_path_factory.mktemp("user") / "env"
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin" / "python"


def check(python: Path, folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    (folder / "user.py").write_text(script)
    (folder / "mypy.ini").write_text(SETTINGS)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--python-executable",
        str(python),
        "--cache-dir",
        str(python.parent / "cache"),
    ]
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    return subprocess.run([*command, "user.py"], cwd=folder, env=env, capture_output=True, text=True)


def test_mypy_accepts_a_user_script_and_reports_mistakes(python: Path, tmp_path: Path) -> None:
    accepted = check(python, tmp_path, SCRIPT)
    assert accepted.returncode == 0, accepted.stdout + accepted.stderr
    rejected = check(python, tmp_path, MISTAKES)
    lines = [line for line in rejected.stdout.splitlines() if ": error:" in line]
    assert [line.split(":")[1] for line in lines] == ["4", "5", "6", "7", "8"], rejected.stdout
