"""SIGTERM and Ctrl-C: one mechanism for every command, a true message, and the command that resumes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest

from dpo_mm.cli.terminal import command_line, resuming_command, run_as_command
from dpo_mm.errors import TrainingInterrupted
from dpo_mm.process.interruption import complete_part, stop_on_signal

SIGNALS = [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Check that every test leaves the handlers of the signals as they were."""
    before = [signal.signal(number, handler) for number, handler in DEFAULTS]
    yield
    assert [signal.getsignal(number) for number, _ in DEFAULTS] == [handler for _, handler in DEFAULTS]
    for (number, _), handler in zip(DEFAULTS, before, strict=True):
        signal.signal(number, handler)


DEFAULTS = ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler))


@pytest.mark.parametrize(("number", "status", "name"), SIGNALS)
@pytest.mark.parametrize("saved", ["", "2 shards are in out"])
def test_message_says_what_is_saved_and_what_resumes(
    number: int, status: int, name: str, saved: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutations that it catches: one signal is not handled, work is called saved without any, an argument is not quoted."""
    monkeypatch.setattr(sys, "argv", ["dpo-mm", "mine", "my config.yaml"])
    with pytest.raises(SystemExit) as stopped, run_as_command(), stop_on_signal(lambda: saved):
        os.kill(os.getpid(), number)
    assert stopped.value.code == status
    known = f"{saved}, and the same command resumes" if saved else "Nothing was saved. Run the same command again"
    assert capsys.readouterr().err == f"interrupted by {name}. {known}: dpo-mm mine 'my config.yaml'\n"


@pytest.mark.parametrize(("number", "status", "name"), SIGNALS)
def test_part_is_completed_first(number: int, status: int, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutations that it catches: the part is cut off, the signal is lost at its end, or the outer message replaces its own."""
    steps = []
    with pytest.raises(TrainingInterrupted) as stopped, stop_on_signal(lambda: "outer"):
        with complete_part(lambda: f"{len(steps)} steps are saved") as stop:
            for step in range(4):
                if stop.requested:
                    break
                if step == 1:
                    os.kill(os.getpid(), number)
                steps.append(step)
        steps.append(9)
    assert steps == [0, 1] and stopped.value.code == status
    assert str(stopped.value) == f"interrupted by {name}. 2 steps are saved, and the same command resumes"
    assert capsys.readouterr().err.count("interrupted") == 1


def test_second_signal_has_its_default_effect(capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation that it catches: a user who presses Ctrl-C twice waits for the end of a long step."""
    with pytest.raises(TrainingInterrupted), complete_part():
        os.kill(os.getpid(), signal.SIGTERM)
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == [signal.SIG_DFL] * 2


def test_signal_that_a_launcher_sends_again_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation that it catches: torchrun passes Ctrl-C on to its processes, which the terminal has sent it already."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingInterrupted), complete_part() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert resuming_command() == ""  # the launcher's command is not known


def test_ignored_signal_stays_ignored() -> None:
    """Mutation that it catches: nohup has no effect."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_on_signal():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_command_line_of_a_script_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["recipes/ocr.py", "--output_dir", "a b"])
    assert command_line() == "python recipes/ocr.py --output_dir 'a b'"
    monkeypatch.setattr(sys, "argv", ["/usr/lib/dpo_mm/__main__.py", "train", "c.yaml"])
    assert command_line() == "dpo-mm train c.yaml"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            ValueError("Caught ValueError in DataLoader worker process 1.\nOriginal Traceback (most recent call last):\n"
                       '  File "x.py", line 1\nValueError: /cache/pairs-00000 has changed. Run again\n'),
            "error: /cache/pairs-00000 has changed. Run again",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "error: DataLoader worker (pid 7) is killed by signal: Killed. Set workers: 0, or free memory",
        ),
    ],
)  # fmt: skip
def test_error_of_a_worker_process_is_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation that it catches: the worker's traceback is printed."""
    with pytest.raises(SystemExit) as stopped, run_as_command():
        raise error
    assert stopped.value.code == 2 and capsys.readouterr().err == f"{line}\n"
