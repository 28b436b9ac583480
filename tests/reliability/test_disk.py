"""A disk that is really full, or a file that may not grow: what was there stays, the message is one line, and it resumes."""

from __future__ import annotations

import dataclasses
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_mm.config import TrainConfig
from dpo_mm.training.checkpoints import explain_disk_full, move_into_place, what_is_wrong
from dpo_mm.training.run import train
from tests import forked

RUN = ["--batch-size", "2", "--save-every", "2", "--log-every", "1", "--eval-fraction", "0", "--learning-rate", "1e-3"]


def command(model: str, pairs: str, out: Path, *more: str) -> list[str]:
    recipe = out.parent / "recipe.yaml"
    recipe.write_text(f"model: {model}\npairs: {pairs}\n")
    return ["train", str(recipe), "--output-dir", str(out), *RUN, *more]


@contextmanager
def small_disk(folder: Path, kibibytes: int) -> Iterator[Path | None]:
    """A file system of this size, where the machine lets us mount one, else None."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={kibibytes}k", "dpo-mm-test", str(folder)]
    if sys.platform != "linux" or subprocess.run(["mount", *options], capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def no_larger_than(size: int | None, call: Callable[[], None] = forked.command) -> None:
    """In a new process: a call, and none of its files grows past this."""
    if size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    call()


def write_too_much() -> None:
    """Write more than 4 KiB to the file of the first argument in three ways; print the error of each."""
    place, many = Path(sys.argv[1]), torch.zeros(2**16)
    ways: tuple[Callable[[], Any], ...] = (
        lambda: torch.save(many, place),
        lambda: save_file({"many": many}, place),
        lambda: place.write_bytes(bytes(2**16)),
    )
    for write in ways:
        try:
            with explain_disk_full(place):
                write()
        except OSError as error:
            print(error)


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint_before(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """Mutation that it catches: taking torch's or safetensors' own errors for a bug, and dying with a traceback."""
    first = command(tiny_model, pairs, tmp_path / "first", "--steps", "2")
    forked.run(*first, check=True)
    checkpoint = tmp_path / "first" / "checkpoint-2"
    size = sum(path.stat().st_size for path in checkpoint.rglob("*"))
    largest = max(path.stat().st_size for path in checkpoint.rglob("*"))
    with small_disk(tmp_path / "disk", 3 * size // 2048) as disk:
        out = (disk or tmp_path / "disk") / "out"
        out.mkdir()
        subprocess.run(["cp", "-r", str(checkpoint), str(out)], check=True)
        goes_on = command(tiny_model, pairs, tmp_path / "first", "--steps", "4", "--resume")
        goes_on[goes_on.index("--output-dir") + 1] = str(out)
        done = forked.run(*goes_on, call=partial(no_larger_than, None if disk else largest - 1))
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
        assert "checkpoint-4" in errors[0] and "Earlier checkpoints are unchanged" in errors[0]
        assert [path.name for path in out.iterdir()] == ["checkpoint-2"]
        assert what_is_wrong(out / "checkpoint-2") is None


@pytest.mark.slow
def test_each_librarys_error_is_one_that_names_the_place(tmp_path: Path) -> None:
    """In a process of its own, whose files may not grow past 4 KiB."""
    done = forked.run(str(tmp_path / "file"), call=partial(no_larger_than, 4096, write_too_much))
    said = done.stdout.splitlines()
    assert len(said) == 3 and all(f"could not write {tmp_path / 'file'}: " in line for line in said), done.stderr


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), explain_disk_full(tmp_path):
        raise RuntimeError("shapes do not fit")


def test_a_result_replaces_the_one_before_part_by_part(tmp_path: Path) -> None:
    for name, word in (("old", "old"), ("aside", "new")):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet" / f"{word}.txt").write_text(word)
        (tmp_path / name / "card.md").write_text(word)
    (tmp_path / "old" / "checkpoint-2").mkdir()
    move_into_place(tmp_path / "aside", tmp_path / "old")
    assert (tmp_path / "old" / "card.md").read_text() == "new"
    assert [path.name for path in (tmp_path / "old" / "unet").iterdir()] == ["new.txt"]
    assert (tmp_path / "old" / "checkpoint-2").exists() and not any((tmp_path / "aside").iterdir())


@pytest.mark.slow
def test_only_whole_checkpoints_push_out_older_ones(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """Retention of 1, and what is newest is broken: it is replaced by a whole one before anything is deleted."""
    config = TrainConfig(
        tiny_model, pairs, str(tmp_path), steps=4, batch_size=2, save_every=2, eval_fraction=0, learning_rate=1e-3
    )
    train(config)
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    weights = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    train(dataclasses.replace(config, resume=True, save_total_limit=1))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert what_is_wrong(tmp_path / "checkpoint-4") is None
    after = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(weights[name], after[name]) for name in weights)
