"""Every command, killed at random moments and run again, writes the bytes of an unbroken run."""

from __future__ import annotations

import datetime
import hashlib
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpo_mm.evaluation import answer
from tests import forked
from tests.reliability import commands

KILLS = 2
"""Kills per command."""
STATE = ("trainer_state.json", "complete.json")
"""Files of a checkpoint with the state of its run: the Trainer's, and the checksums of all files."""
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


class NewYear(datetime.datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> NewYear:
        return cls(2026, 1, 1, tzinfo=tz)


def command() -> None:
    """Run the command with a clock that stands still, because a report has the minute in which it was written."""
    answer.datetime = SimpleNamespace(datetime=NewYear, UTC=datetime.UTC)  # type: ignore[attr-defined]
    forked.command()


def contents(folder: Path) -> dict[str, str]:
    """Hash of each file by name, without locks."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def checkpoint_of(file: str) -> str:
    """Folder of the checkpoint that a file belongs to. Empty: it belongs to none."""
    return next((str(folder) for folder in Path(file).parents if folder.name.startswith("checkpoint-")), "")


def kill_and_repeat(name: str, inputs: Path, folder: Path) -> list[str]:
    """Run a command to its end, then kill it KILLS times and repeat it. Return what differs or failed."""
    rng, arguments = random.Random(name), commands.commands(inputs, folder / "out")[name]
    environment = commands.environment(folder / "cache")
    problems, expected, duration = [], {}, 0.0
    for kill in range(KILLS + 1):
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "out").mkdir(parents=True)
        if kill:
            process = forked.Forked(*arguments, call=command, env=environment)
            time.sleep(duration * rng.random())
            process.send_signal(number := rng.choice(SIGNALS))
            stopped = process.wait(timeout=120)
            if "Traceback" in stopped.stderr and "interrupted by" in stopped.stderr:
                problems.append(f"{name}, {number.name}: {stopped.stderr[-2000:]}")
        start = time.monotonic()
        done = forked.run(*arguments, call=command, env=environment)
        if done.returncode:
            problems.append(f"{name}, run {kill}: exit status {done.returncode}, {done.stderr[-2000:]}")
        if kill == 0:
            duration, expected = time.monotonic() - start, contents(folder)
        found = contents(folder)
        different = [file for file in expected.keys() | found.keys() if expected.get(file) != found.get(file)]
        if kill and number != signal.SIGKILL:
            # A stopped run saves a checkpoint of its step, in place of an older one. Its state says that the run was stopped.
            in_both = {checkpoint_of(file) for file in expected} & {checkpoint_of(file) for file in found}
            different = [file for file in different if checkpoint_of(file) in in_both]
            different = [file for file in different if not checkpoint_of(file) or Path(file).name not in STATE]
        if different:
            problems.append(f"{name}, run {kill}: other bytes in {', '.join(sorted(different))}")
    return problems


@pytest.mark.slow
def test_killed_commands_give_the_bytes_of_an_unbroken_run(tmp_path: Path) -> None:
    """Mutations that it catches: a file that is not written atomically, a record or a list of shards written too early,
    metadata in a random order, a lock that stays, a temporary file that is taken for a result."""
    commands.write_inputs(tmp_path / "inputs")
    forked.run("--version")  # starts the server, whose time would otherwise be part of the first durations
    names = list(commands.commands(tmp_path, tmp_path))
    assert KILLS * len(names) >= 20
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(kill_and_repeat, name, tmp_path / "inputs", tmp_path / name) for name in names]
        problems = [problem for run in runs for problem in run.result()]
    assert not problems, "\n".join(problems)
