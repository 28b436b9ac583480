"""SIGTERM while images are encoded and while pairs are mined.

The command exits at once, leaves the complete shards, and the same command resumes from them.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import load_from_disk

from dpo_mm import recipe
from dpo_mm.judges import score_checks
from dpo_mm.mining import mine_images
from dpo_mm.training import arrow_shards, encoding
from tests import forked

pytestmark = pytest.mark.slow


def encode_and_stop(at: int) -> None:
    """Run the command with shards of 4 rows and send SIGTERM when it writes shard number `at` (0: never)."""
    write_shard, calls = arrow_shards.write_shard, []

    def write_and_stop(path: Any, shard: Any) -> None:
        calls.append(path)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        write_shard(path, shard)

    encoding.SHARD = 4
    arrow_shards.write_shard = write_and_stop
    forked.command()


def mine_and_stop(at: int) -> None:
    """Run the command with a judge that scores red, and send SIGTERM when it scores for the `at`-th time (0: never)."""
    calls = []

    def judge(images: Any, prompts: Any) -> list[float]:
        calls.append(prompts)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return [image.getpixel((0, 0))[0] for image in images]

    score_checks.load_judge = lambda name: judge
    score_checks.better_of = lambda name: "higher"
    score_checks.takes_sources = lambda name: False
    mine_images.judge_digests = lambda names: dict.fromkeys(names, "hash of the judge")
    recipe._check_judges = lambda *_: None
    forked.command()


def run(call: Callable[[int], None], at: int, *arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    return forked.run(*arguments, call=partial(call, at), env={**os.environ, "DPO_MM_CACHE": str(cache)})


def shards(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("encoded/*/*"))


def test_sigterm_while_encoding_leaves_complete_shards_and_resumes(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """12 pairs in shards of 4, stopped in the second shard of images. A run with another cache gives the expected shards."""
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {tiny_model}\npairs: {pairs}\n")
    train = ["train", str(file), "--steps", "1", "--eval-fraction", "0", "--output-dir"]
    stopped = run(encode_and_stop, 3, *train, str(tmp_path / "out"), cache=tmp_path / "cut")
    assert stopped.returncode == 143 and "the same command resumes" in stopped.stderr, stopped.stderr[-1500:]
    assert shards(tmp_path / "cut") == ["pairs-00000", "prompts-00000"]
    assert not list((tmp_path / "cut").rglob(".*")) and not (tmp_path / "out").exists()
    resumed, whole = (
        run(encode_and_stop, 0, *train, str(tmp_path / folder), cache=tmp_path / name)
        for folder, name in (("out", "cut"), ("again", "whole"))
    )
    assert resumed.returncode == whole.returncode == 0, resumed.stderr[-1500:]
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole") and len(shards(tmp_path / "cut")) == 5
    for name in ("pairs-00000", "pairs-00001", "pairs-00002"):
        first, second = (
            load_from_disk(str(next((tmp_path / c).glob(f"encoded/*/{name}/*")))) for c in ("cut", "whole")
        )
        assert first.to_dict() == second.to_dict()


def test_sigterm_while_judging_leaves_complete_shards_and_resumes(tiny_model: str, tmp_path: Path) -> None:
    """Three shards of one prompt each, stopped when the judge scores the second."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na green star\n")

    def arguments(out: str) -> list[str]:
        settings = {
            "model": tiny_model,
            "prompts": str(tmp_path / "prompts.txt"),
            "judges": "red",
            "images-per-prompt": "2",
        }
        settings |= {
            "num-inference-steps": "2",
            "shard-size": "1",
            "guidance-scale": "1",
            "min-score-gap": "0",
            "output-dir": str(tmp_path / out),
        }
        return ["mine", *(part for key, value in settings.items() for part in (f"--{key}", value))]

    stopped = run(mine_and_stop, 2, *arguments("cut"), cache=tmp_path)
    assert stopped.returncode == 143 and "the same command resumes" in stopped.stderr, stopped.stderr[-1500:]
    names = [".shard-00000.parquet.checksum", "mining.json", "shard-00000.parquet"]
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == names
    before = (tmp_path / "cut" / "shard-00000.parquet").stat().st_mtime_ns
    resumed, whole = (run(mine_and_stop, 0, *arguments(name), cache=tmp_path) for name in ("cut", "whole"))
    assert resumed.returncode == whole.returncode == 0, resumed.stderr[-1500:]
    assert (tmp_path / "cut" / "shard-00000.parquet").stat().st_mtime_ns == before
    assert pq.read_table(tmp_path / "cut" / "pairs.parquet").equals(pq.read_table(tmp_path / "whole" / "pairs.parquet"))
