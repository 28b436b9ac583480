"""SIGTERM while pictures are encoded and while pairs are mined: ends at once, keeps what is whole, goes on from there."""

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
from dpo_mm.mining import mine_images
from dpo_mm.training import arrow_shards, encoding
from tests import forked

pytestmark = pytest.mark.slow


def encode(at: int) -> None:
    """The command in shards of 4, asked to stop as it keeps shard number `at`; 0 is never."""
    real, calls = arrow_shards.write_shard, []

    def keep(place: Any, sets: Any) -> None:
        calls.append(place)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        real(place, sets)

    encoding.SHARD = 4
    arrow_shards.write_shard = keep
    forked.command()


def mine(at: int) -> None:
    """The command with a judge that sees red, asked to stop as it judges for the `at`-th time."""
    calls = []

    def judge(images: Any, prompts: Any) -> list[float]:
        calls.append(prompts)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return [image.getpixel((0, 0))[0] for image in images]

    mine_images.load_judge = lambda name: judge
    mine_images.better_of = lambda name: "higher"
    recipe._know_judges = lambda names: None
    forked.command()


def run(call: Callable[[int], None], at: int, *arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    return forked.run(*arguments, call=partial(call, at), env={**os.environ, "DPO_MM_CACHE": str(cache)})


def shards(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("encoded/*/*"))


def test_sigterm_in_encoding(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """12 pairs in shards of 4, stopped in the second one of pictures; the third encoding is another cache's."""
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {tiny_model}\npairs: {pairs}\n")
    train = ["train", str(file), "--output-dir", str(tmp_path / "out"), "--steps", "1", "--eval-fraction", "0"]
    stopped = run(encode, 3, *train, cache=tmp_path / "cut")
    assert stopped.returncode == 143 and "the same command resumes" in stopped.stderr, stopped.stderr[-1500:]
    assert shards(tmp_path / "cut") == ["pairs-00000", "prompts-00000"]
    assert not list((tmp_path / "cut").rglob(".*")) and not (tmp_path / "out").exists()
    gone_on, whole = (run(encode, 0, *train, cache=tmp_path / name) for name in ("cut", "whole"))
    assert gone_on.returncode == whole.returncode == 0, gone_on.stderr[-1500:]
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole") and len(shards(tmp_path / "cut")) == 5
    for name in ("pairs-00000", "pairs-00001", "pairs-00002"):
        one, other = (load_from_disk(str(next((tmp_path / c).glob(f"encoded/*/{name}/*")))) for c in ("cut", "whole"))
        assert one.to_dict() == other.to_dict()


def test_sigterm_in_mining_while_judging(tiny_model: str, tmp_path: Path) -> None:
    """Three shards of one prompt, stopped as the judge looks at the second."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na green star\n")

    def arguments(out: str) -> list[str]:
        given = {
            "model": tiny_model,
            "prompts": str(tmp_path / "prompts.txt"),
            "judges": "red",
            "images-per-prompt": "2",
        }
        given |= {
            "num-inference-steps": "2",
            "shard-size": "1",
            "guidance-scale": "1",
            "min-score-gap": "-1",
            "output-dir": str(tmp_path / out),
        }
        return ["mine", *(part for key, value in given.items() for part in (f"--{key}", value))]

    stopped = run(mine, 2, *arguments("cut"), cache=tmp_path)
    assert stopped.returncode == 143 and "the same command resumes" in stopped.stderr, stopped.stderr[-1500:]
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["mining.json", "shard-00000.parquet"]
    before = (tmp_path / "cut" / "shard-00000.parquet").stat().st_mtime_ns
    gone_on, whole = (run(mine, 0, *arguments(name), cache=tmp_path) for name in ("cut", "whole"))
    assert gone_on.returncode == whole.returncode == 0, gone_on.stderr[-1500:]
    assert (tmp_path / "cut" / "shard-00000.parquet").stat().st_mtime_ns == before
    assert pq.read_table(tmp_path / "cut" / "pairs.parquet").equals(pq.read_table(tmp_path / "whole" / "pairs.parquet"))
