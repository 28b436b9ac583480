"""Run parts, each in a new process, and write one JSON file per part."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from dpo_mm.cli.terminal import suppress_library_output
from dpo_mm.files.content_key import content_hash
from dpo_mm.files.resumable import atomic_write
from tests.bench.gpu.cells import BrokenDevice, Cells
from tests.bench.gpu.parts import PARTS, choose, settings_of

ROOT = Path(__file__).parents[3]
PACKAGES = ("torch", "transformers", "diffusers", "peft", "accelerate", "datasets", "trl", "bitsandbytes")
NO_GPU = "no GPU: nothing was measured. With --tiny every part runs on a CPU, to test it"


def device() -> str:
    """Where parts run: cuda, or cpu if there is no GPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def _about_code() -> dict[str, Any]:
    """The commit and a hash of the source, which tells changed files too."""
    files = sorted(path for folder in ("dpo_mm", "tests/bench") for path in (ROOT / folder).rglob("*.py"))
    source = content_hash({str(path.relative_to(ROOT)): path.read_bytes() for path in files})
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {"commit": git.stdout.strip() or None, "source": source}


@functools.cache
def _about_machine() -> dict[str, Any]:
    versions: dict[str, str | None] = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    if device() == "cpu":
        return {"device": "cpu", "versions": versions}
    card = torch.cuda.get_device_properties(0)
    versions["cudnn"] = str(torch.backends.cudnn.version())
    return {"device": f"{card.name}, {card.total_memory / 2**30:.0f} GiB", "versions": versions}


def identity(name: str, *, tiny: bool) -> dict[str, Any]:
    """What decides the results of a part."""
    settings = json.loads(json.dumps(settings_of(name, tiny=tiny)))
    return {"part": name, "tiny": tiny, **_about_code(), **_about_machine(), "settings": settings}


def is_done(file: Path, expected: dict[str, Any]) -> bool:
    """True if a file has all cells of a part with this identity."""
    try:
        stored = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return "seconds" in stored and all(stored.get(name) == value for name, value in expected.items())


def run_part(out: Path, name: str, *, tiny: bool) -> None:
    """Measure a part in this process. Its file is written after each cell, and has `seconds` if it is complete."""
    about, file, start = identity(name, tiny=tiny), out / f"{name}.json", time.monotonic()
    transformers.utils.logging.set_verbosity_error()

    def save(cells: dict[str, Any], **more: Any) -> None:
        with atomic_write(file) as temporary:
            question = {"question": PARTS[name].question}
            temporary.write_text(json.dumps({**about, **question, **more, "cells": cells}, indent=1) + "\n")

    cells = Cells(device(), tiny, about["settings"], save)
    save({})
    with suppress_library_output():
        try:
            PARTS[name].measure(cells)
        except BrokenDevice as error:
            save(cells.values, error=str(error))
            raise
    save(cells.values, seconds=round(time.monotonic() - start, 1))


def _in_new_process(out: Path, name: str, tiny: bool, limit: float) -> None:
    """Run a part in a new process. Raises RuntimeError as `run_command`."""
    options = ["--one", name, *(["--tiny"] if tiny else [])]
    run_command([sys.executable, "-m", "tests.bench.gpu", str(out), *options], out / f"{name}.log", limit)


def run_command(command: list[str], log: Path, limit: float) -> None:
    """Run a command on the first GPU, and end it and the processes that it started.

    Args:
        command: program and arguments.
        log: file of its output, which is removed if it succeeds.
        limit: seconds.

    Raises:
        RuntimeError: with the end of its output if it fails, or if it takes too long.
    """
    cards = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": cards[0]}  # with several, a Trainer would use all
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"ended after {limit:g} s. The cells until then are in the file") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        raise RuntimeError(f"exit code {code}: {' '.join(last)[:300]} ({log})")
    log.unlink()


def run_parts(
    out: Path,
    names: list[str] | None,
    *,
    tiny: bool,
    limit: float,
    run: Callable[[Path, str, bool, float], None] = _in_new_process,
) -> int:
    """Run parts that are not done.

    Args:
        out: folder of the files.
        names: names of parts, or their beginnings. None: all.
        tiny: True for tiny shapes.
        limit: seconds of a part.
        run: runs one part.

    Returns:
        Number of parts that failed.
    """
    chosen = choose(names) if names else list(PARTS)
    if device() == "cpu" and not tiny:
        print(NO_GPU)
        return 0
    out = out.resolve()  # parts run in the repository's folder
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in chosen:
        file = out / f"{name}.json"
        if is_done(file, identity(name, tiny=tiny)):
            print(f"{name}: done before", flush=True)
            continue
        try:
            run(out, name, tiny, limit)
        except RuntimeError as error:
            failed += 1
            print(f"{name}: {error}", flush=True)
        else:
            print(f"{name}: {summary(json.loads(file.read_text()))}", flush=True)
    return failed


def summary(result: dict[str, Any]) -> str:
    """One line on a part: its seconds, and its cells with time, error or reason."""
    cells = []
    for name, cell in result["cells"].items():
        if "error" in cell:
            cells.append(f"{name}: {cell['error'][:80]}")
        elif "skipped" in cell:
            cells.append(f"{name}: skipped")
        elif "ms" in cell:
            cells.append(f"{name}: {cell['ms']:.0f} ms")
    return f"{result['seconds']:.0f} s{'; ' if cells else ''}{'; '.join(cells)}"


def print_parts() -> None:
    for name, part in PARTS.items():
        print(f"{name:20} {part.question}")
