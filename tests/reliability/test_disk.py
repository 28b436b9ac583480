"""A disk that is full, or a file that may not grow: existing files are unchanged, and the error is one line."""

from __future__ import annotations

import dataclasses
import re
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
from dpo_mm.evaluation.image_store import append_lines
from dpo_mm.files.checksums import write_checksums
from dpo_mm.files.resumable import atomic_write, temporary_path
from dpo_mm.training.checkpoints import explain_disk_full, move_into_place, what_is_wrong
from dpo_mm.training.run import train
from tests import forked
from tests.reliability import commands

RUN = ["--batch-size", "2", "--save-every", "2", "--log-every", "1", "--eval-fraction", "0", "--learning-rate", "1e-3"]


def command(model: str, pairs: str, out: Path, *more: str) -> list[str]:
    recipe = out.parent / "recipe.yaml"
    recipe.write_text(f"model: {model}\npairs: {pairs}\n")
    return ["train", str(recipe), "--output-dir", str(out), *RUN, *more]


@contextmanager
def small_disk(folder: Path, kibibytes: int) -> Iterator[Path | None]:
    """Mount a file system of this size. Yields None if the machine does not allow it."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={kibibytes}k", "dpo-mm-test", str(folder)]
    if sys.platform != "linux" or subprocess.run(["mount", *options], capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def limit_file_size(size: int | None, call: Callable[[], None] = forked.command) -> None:
    """Run a call in which no file may grow beyond `size` bytes. Only for a new process."""
    if size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    call()


def write_beyond_the_limit() -> None:
    """Write more than 4 KiB to the file of the first argument in three ways, and print the error of each."""
    path, tensor = Path(sys.argv[1]), torch.zeros(2**16)
    writers: tuple[Callable[[], Any], ...] = (
        lambda: torch.save(tensor, path),
        lambda: save_file({"many": tensor}, path),
        lambda: path.write_bytes(bytes(2**16)),
    )
    for write in writers:
        try:
            with explain_disk_full(path):
                write()
        except OSError as error:
            print(error)


@pytest.mark.slow
def test_full_disk_leaves_the_previous_checkpoint_unchanged(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """Mutation that it catches: torch's or safetensors' error is taken for a bug and ends the run with a traceback."""
    first = command(tiny_model, pairs, tmp_path / "first", "--steps", "2")
    forked.run(*first, check=True)
    checkpoint = tmp_path / "first" / "checkpoint-2"
    size = sum(path.stat().st_size for path in checkpoint.rglob("*"))
    largest = max(path.stat().st_size for path in checkpoint.rglob("*"))
    with small_disk(tmp_path / "disk", 3 * size // 2048) as disk:
        out = (disk or tmp_path / "disk") / "out"
        out.mkdir()
        subprocess.run(["cp", "-r", str(checkpoint), str(out)], check=True)
        resume = command(tiny_model, pairs, tmp_path / "first", "--steps", "4", "--resume")
        resume[resume.index("--output-dir") + 1] = str(out)
        done = forked.run(*resume, call=partial(limit_file_size, None if disk else largest - 1))
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
        assert "checkpoint-4" in errors[0] and "Earlier checkpoints are unchanged" in errors[0]
        assert [path.name for path in out.iterdir()] == ["checkpoint-2"]
        assert what_is_wrong(out / "checkpoint-2") is None


@pytest.mark.slow
def test_full_disk_names_file_and_fix_in_every_command(tmp_path: Path) -> None:
    """Each command writes to a disk with room for its first file or two."""
    commands.write_inputs(tmp_path / "inputs")
    names = commands.commands(tmp_path, tmp_path)
    for name in names:
        with small_disk(tmp_path / name.replace(" ", "-"), 12) as disk:
            if disk is None:
                pytest.skip("needs the right to mount a small disk")
            arguments = commands.commands(tmp_path / "inputs", disk / "out")[name]
            (disk / "out").mkdir()
            (disk / "fill").write_bytes(bytes(2000))
            done = forked.run(*arguments, env=commands.environment(tmp_path / "cache"))
            errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
            assert re.match(
                rf"error: could not write {disk}/.*: .*(No space|disk is full).*\. .*run the same", errors[0]
            ), errors


@pytest.mark.slow
def test_write_error_of_each_library_names_the_path(tmp_path: Path) -> None:
    """Runs in a separate process whose files may not grow beyond 4 KiB."""
    done = forked.run(str(tmp_path / "file"), call=partial(limit_file_size, 4096, write_beyond_the_limit))
    errors = done.stdout.splitlines()
    assert len(errors) == 3 and all(f"could not write {tmp_path / 'file'}: " in line for line in errors), done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_disk_is_one_error_with_the_file_and_the_fix(tmp_path: Path) -> None:
    """Mutation that it catches: "No space left on device", without the file, or with the name of a temporary file."""
    full = r": No space left on device\. Free space or choose another folder, and run the same command again$"
    with pytest.raises(OSError, match=f"^could not write /dev/full{full}"):
        append_lines(Path("/dev/full"), [{"a": 1}])
    for folder, shown in ((tmp_path, tmp_path), (temporary_path(tmp_path / "result"), tmp_path)):
        folder.mkdir(exist_ok=True)
        with (
            pytest.raises(OSError, match=f"^could not write {shown / 'a.json'}{full}"),
            atomic_write(folder / "a.json") as file,
        ):
            file.symlink_to("/dev/full")
            file.write_bytes(bytes(2**16))
        assert not list(folder.glob("*.json"))


def test_error_of_another_file_is_not_reported_as_a_full_disk(tmp_path: Path) -> None:
    """Mutation that it catches: an input that is missing is called a file that could not be written."""
    with pytest.raises(FileNotFoundError, match=r"directory: '/no/input'"), atomic_write(tmp_path / "out" / "a.json"):
        Path("/no/input").read_bytes()


def test_other_errors_are_not_reported_as_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), explain_disk_full(tmp_path):
        raise RuntimeError("shapes do not fit")


def test_new_result_replaces_the_previous_one_entry_by_entry(tmp_path: Path) -> None:
    for name, word in (("old", "old"), ("aside", "new")):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet" / f"{word}.txt").write_text(word)
        (tmp_path / name / "card.md").write_text(word)
    (tmp_path / "old" / "checkpoint-2").mkdir()
    write_checksums(tmp_path / "old")
    move_into_place(tmp_path / "aside", tmp_path / "old")
    assert (tmp_path / "old" / "card.md").read_text() == "new"
    assert [path.name for path in (tmp_path / "old" / "unet").iterdir()] == ["new.txt"]
    assert (tmp_path / "old" / "checkpoint-2").exists() and not any((tmp_path / "aside").iterdir())


@pytest.mark.slow
def test_only_complete_checkpoints_replace_older_ones(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    """With save_total_limit 1 and a broken newest checkpoint, a complete one is written before anything is deleted."""
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
