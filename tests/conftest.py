"""Shared fixtures: a tiny pipeline, preference pairs, and a temporary cache.

The process that only distributes the tests reads this file too, so large libraries are imported where they are used.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from PIL import Image

pytest_plugins = ("tests.browser",)
gc.disable()  # until the tests are collected: imports leave nothing to collect, and each collection visits all modules
LONGEST = ("end_to_end", "demos", "recipes", "reliability", "contracts")
"""Test folders, slowest first."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the number of workers for `-n logical`: cores for the quick tests, and one more for all.

    Each worker imports all libraries, which takes long, and slow tests of pages and servers wait for other processes.
    """
    cores = len(os.sched_getaffinity(0))
    return min(4, cores if "not slow" in config.option.markexpr else cores + 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slowest tests first, so that no core waits for them at the end."""

    def order(item: pytest.Item) -> tuple[bool, int]:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        return "quickstart" not in item.path.name, LONGEST.index(folder) if folder in LONGEST else len(LONGEST)

    items.sort(key=order)


def pytest_collection_finish() -> None:
    """Set the number of threads (see tests/__init__.py), and exclude what is in memory from garbage collection.

    If all imported modules and collected tests were visited, gc.collect() would take a third of a short training run.
    """
    import torch

    torch.set_num_threads(1 if os.environ.get("PYTEST_XDIST_WORKER") else min(2, torch.get_num_threads()))
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None]:
    """After a file's last test, collect its garbage, and exclude the modules that it imported from later collections."""
    yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def temporary_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's cache out of the tests."""
    monkeypatch.setenv("DPO_MM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a Stable Diffusion pipeline with random weights for 32x32 images."""
    from tests.contracts.families import stable_diffusion

    return str(stable_diffusion(tmp_path_factory.mktemp("tiny")))


def noise_image(seed: int, size: int = 32) -> Image.Image:
    """A square image of smooth noise, `size` pixels per edge."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)


def rows(count: int) -> list[dict[str, object]]:
    """Valid rows with scores and votes. The preference alternates between a and b."""
    from dpo_mm.data.image_files import encode_png
    from tests.contracts.families import WORDS

    return [
        {
            "id": f"row-{n}",
            "prompt": WORDS[n % len(WORDS)],
            "image_a": {"bytes": encode_png(noise_image(2 * n)), "path": None},
            "image_b": {"bytes": encode_png(noise_image(2 * n + 1)), "path": None},
            "preference": "ab"[n % 2],
            "score_a": 0.9 if n % 2 == 0 else 0.1,
            "score_b": 0.1 if n % 2 == 0 else 0.9,
            "votes_a": 3 if n % 2 == 0 else 1,
            "votes_b": 1 if n % 2 == 0 else 3,
        }
        for n in range(count)
    ]


@pytest.fixture(scope="session")
def write_pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Write rows to a Parquet file and return its path."""
    from dpo_mm.data.schema import make_image_rows

    def write(rows: list[dict[str, object]], name: str = "pairs.parquet") -> str:
        path = tmp_path_factory.mktemp("pairs") / name
        make_image_rows(rows).to_parquet(str(path))
        return str(path)

    return write


@pytest.fixture(scope="session")
def pairs(write_pairs: Callable[..., str]) -> str:
    """Path of twelve preference pairs."""
    return write_pairs(rows(12))


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "out")
