"""States of a training on votes, without a training: start, stop, resume, failure, several pages, restarts."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from dpo_mm.errors import TrainingInterrupted
from dpo_mm.labels import training_worker, vote_training
from dpo_mm.labels.store import VoteStore
from dpo_mm.labels.training_worker import train_config, work
from dpo_mm.labels.vote_training import (
    LOCK,
    MIN_WINNERS,
    PLAN,
    RUN,
    STAGE,
    STOP,
    TrainingPlan,
    TrainingStatus,
    VoteTraining,
    read_plan,
    read_record,
    write_record,
)
from dpo_mm.pages.label_page import training_html

IDS = [f"pair-{n}" for n in range(30)]
HOLDER = """
import sys, time, pathlib
from filelock import FileLock
with FileLock(pathlib.Path(sys.argv[1]).parent / "job.lock"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def store(tmp_path: Path) -> VoteStore:
    store = VoteStore(tmp_path / "votes.sqlite", IDS, source="a set")
    for _ in range(MIN_WINNERS + 4):  # repeats do not count
        shown = store.next_pair("Ada")
        assert shown is not None
        store.cast("Ada", shown.id, "left")
    return store


@pytest.fixture
def training(tmp_path: Path) -> VoteTraining:
    settings = {"model": "shapes-sd", "steps": 100}
    plan = TrainingPlan(str(tmp_path / "votes.sqlite"), "a set", settings, str(tmp_path))
    return VoteTraining(tmp_path / "votes-training", plan)


@pytest.fixture
def launched(training: VoteTraining, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rounds whose process was started. None runs."""
    rounds: list[int] = []
    monkeypatch.setattr(training, "_launch", rounds.append)
    return rounds


@pytest.fixture
def hold(training: VoteTraining, launched: list[int]) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Start another process that holds the lock, as the worker of a killed page does."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(training.round_folder(1))]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout is not None and started[-1].stdout.readline() == "held\n"
        write_record(training.round_folder(1) / STAGE, {"stage": "train", "process": started[-1].pid})
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_training_starts_once_and_needs_votes(
    training: VoteTraining, launched: list[int], store: VoteStore, tmp_path: Path
) -> None:
    few = VoteStore(tmp_path / "few.sqlite", IDS, source="a set")
    with pytest.raises(ValueError, match=f"0 pairs with a winner, and training needs {MIN_WINNERS}"):
        training.start(few)
    assert training.status() == TrainingStatus("idle") and not training.folder.exists()
    training.pause()
    with pytest.raises(ValueError, match="no training is running"):
        training.stop()
    with pytest.raises(ValueError, match="no pairs of base and tuned yet"):
        training.offer(is_offered=True)
    training.start(store)
    assert launched == [1] and read_plan(training.round_folder(1)) == training.plan
    assert training.status().state == "interrupted", "its process has not started"


def test_running_training_is_found_stopped_and_resumed(
    training: VoteTraining, launched: list[int], store: VoteStore, hold: Callable[[], subprocess.Popen[str]]
) -> None:
    """It catches a second process, a stop that does not reach the process of another page, and a resumed round 2."""
    training.start(store)
    process = hold()
    restarted = VoteTraining(training.folder, training.plan)
    for page in (training, restarted):
        assert page.status().state == "running"
        with pytest.raises(ValueError, match="running already"):
            page.start(store)
        page.resume_interrupted()
    assert launched == [1]
    restarted.stop()
    assert training.status().state in ("stopping", "stopped")
    process.wait(10)
    assert training.status().state == "stopped"
    training.resume_interrupted()
    assert launched == [1], "a person stopped it"
    training.start(store)
    assert launched == [1, 1] and not (training.round_folder(1) / STOP).exists()


def test_killed_training_resumes_with_the_page(
    training: VoteTraining, launched: list[int], store: VoteStore, hold: Callable[[], subprocess.Popen[str]]
) -> None:
    training.start(store)
    process = hold()
    process.kill()
    process.wait(10)
    assert training.status() == TrainingStatus("interrupted", 1, "train")
    training.resume_interrupted()
    assert launched == [1, 1]
    process = hold()
    training.pause()
    process.wait(10)
    assert training.status().state == "interrupted", "the end of a page is not a person's stop"


def test_two_pages_that_start_at_once_make_one_round(
    training: VoteTraining, launched: list[int], store: VoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "status", lambda: TrainingStatus("idle"))
    training.start(store)
    with pytest.raises(ValueError, match="another page has just started"):
        training.start(store)
    assert launched == [1]


def test_failed_and_finished_rounds_are_followed_by_a_new_one(
    training: VoteTraining, launched: list[int], store: VoteStore
) -> None:
    training.start(store)
    write_record(training.round_folder(1) / STAGE, {"stage": "failed", "message": "beta is 0 <b>"})
    assert training.status() == TrainingStatus("failed", 1, message="beta is 0 <b>")
    assert "Failed: beta is 0 &lt;b&gt;" in training_html(training.status())
    training.start(store)
    assert launched == [1, 2] and training.last_round() == 2
    write_record(training.round_folder(2) / STAGE, {"stage": "ready"})
    assert training.offered() == 0
    training.offer(is_offered=True)
    assert VoteTraining(training.folder, training.plan).offered() == 2
    training.offer(is_offered=False)
    assert training.offered() == 0


def test_progress_is_that_of_the_newest_checkpoint(
    training: VoteTraining, launched: list[int], store: VoteStore
) -> None:
    """It catches an order by name, in which checkpoint-9 is newer than checkpoint-10, and a checkpoint without its log."""
    training.start(store)
    write_record(training.round_folder(1) / STAGE, {"stage": "train"})
    assert "the start of the training" in training_html(training.status())
    for step in (9, 10, 11):
        checkpoint = training.round_folder(1) / RUN / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        log = [{"step": step, "loss": step / 100}, {"step": step, "eval_loss": 7.0}]
        (checkpoint / "trainer_state.json").write_text(
            json.dumps({"max_steps": 20, "log_history": log}) if step < 11 else '{"max_steps"'
        )
    status = training.status()
    assert (status.step, status.steps, status.loss) == (10, 20, 0.1)
    assert "Interrupted at step 10 of 20, loss 0.100" in training_html(status)


def test_folder_with_other_files_is_refused(training: VoteTraining, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="votes-training: has other files"):
        (tmp_path / "votes-training").mkdir()
        (tmp_path / "votes-training" / "thesis.tex").touch()
        VoteTraining(training.folder, training.plan)


@pytest.fixture
def stages(training: VoteTraining, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages that the worker did, none of which does anything."""
    done: list[str] = []
    for name in ("export", "train", "sample"):
        monkeypatch.setattr(training_worker, f"_{name}", lambda plan, folder, name=name: done.append(name))
    training.round_folder(1).mkdir(parents=True)
    write_record(training.round_folder(1) / PLAN, {**vars(training.plan)})
    return done


def test_worker_does_the_stages_that_are_left(
    training: VoteTraining, stages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It catches a stage that is done twice, an interruption that counts as done or failed, and a lost error."""
    folder = training.round_folder(1)

    def interrupt(*arguments: object) -> None:
        raise TrainingInterrupted(15)

    def fail(*arguments: object) -> None:
        raise ValueError("a row is broken\nin two lines")

    do_train = training_worker._train
    monkeypatch.setattr(training_worker, "_train", interrupt)
    work(folder)
    assert stages == ["export"] and training.status() == TrainingStatus("interrupted", 1, "train")
    monkeypatch.setattr(training_worker, "_train", fail)
    work(folder)
    assert training.status() == TrainingStatus("failed", 1, message="a row is broken in two lines")
    write_record(folder / STAGE, {"stage": "train"})
    monkeypatch.setattr(training_worker, "_train", do_train)
    work(folder)
    assert stages == ["export", "train", "sample"] and training.status().state == "ready"
    work(folder)
    assert stages == ["export", "train", "sample"]


def test_second_worker_leaves_the_round_alone(
    training: VoteTraining, stages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_worker, "LOCK_SECONDS", 0.0)
    with FileLock(training.folder / LOCK):
        start = time.monotonic()
        work(training.round_folder(1))
        assert time.monotonic() - start < 10
    assert not stages and read_record(training.round_folder(1) / STAGE) == {}


def test_run_of_a_round_has_checkpoints_and_the_rounds_files(training: VoteTraining) -> None:
    folder = training.round_folder(3)
    config = train_config(training.plan, folder)
    assert (config.steps, config.save_every, config.output_dir) == (100, 5, str(folder / RUN))
    assert config.pairs == str(folder / vote_training.LABELS)
    given = TrainingPlan("v", "p", {"model": "shapes-sd", "save_steps": 40}, ".")
    assert train_config(given, folder).save_every == 40
