"""Training on the votes of a page: one background process per file of votes, which a restarted page finds again.

    votes-training/job.lock                 held by the process that works
    votes-training/1/plan.json              what round 1 does
    votes-training/1/stage.json             how far it is: export, train, sample, ready or failed
    votes-training/1/stop                   a person stopped it, so a restarted page does not resume it
    votes-training/1/labels.parquet         the votes when it started
    votes-training/1/tuned/                 the training run
    votes-training/1/samples/               fresh pairs of base and tuned, and votes.sqlite for the votes on them

`dpo_mm.labels.training_worker` is the process. It continues if the page is killed, and resumes from its last stage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dpo_mm.files.resumable import atomic_write
from dpo_mm.labels.export import tally
from dpo_mm.labels.store import VoteReader
from dpo_mm.printing.printed_text import counted

LOCK, PLAN, STAGE, STOP, OFFERED = "job.lock", "plan.json", "stage.json", "stop", "offered"
LABELS, RUN, SAMPLES, VOTES, OUTPUT = "labels.parquet", "tuned", "samples", "votes.sqlite", "output.txt"
WORKER = "dpo_mm.labels.training_worker"
STAGES = ("export", "train", "sample")
"""Stages of the work. Then the stage is ready, or failed."""
MIN_WINNERS = 10
"""Smallest number of pairs with a winner to train on."""
CHECKPOINTS = 20
"""Number of checkpoints of a run that sets no save_steps. The page shows the progress of the newest."""


@dataclass(frozen=True)
class TrainingPlan:
    """Settings of a round. Paths are absolute.

    Args:
        votes: SQLite file of the votes.
        pairs: dataset that was labelled.
        settings: settings of `TrainConfig`, without pairs and output_dir.
        working_folder: folder in which the page was started.
        prompts: prompts of the fresh images. None: those of the labelled pairs.
        max_prompts: largest number of fresh pairs.
        num_inference_steps, guidance_scale: of the fresh images.
    """

    votes: str
    pairs: str
    settings: Mapping[str, Any]
    working_folder: str
    prompts: str | None = None
    max_prompts: int = 50
    num_inference_steps: int = 15
    guidance_scale: float = 1.5


@dataclass(frozen=True)
class TrainingStatus:
    """Progress of a training.

    Args:
        state: idle, running, stopping, stopped (by a person), interrupted, failed or ready.
        round: number of the round, from 1.
        stage: one of STAGES, if the state is none of idle, failed and ready.
        step, steps: step of the newest checkpoint, of all steps.
        loss: loss at that step.
        message: why it failed.
    """

    state: str
    round: int = 0
    stage: str = ""
    step: int = 0
    steps: int = 0
    loss: float | None = None
    message: str = ""


class VoteTraining:
    """The training on the votes of one file, as the page sees it."""

    def __init__(self, folder: str | Path, plan: TrainingPlan) -> None:
        """Refer to a folder. It is created when a training starts.

        Raises:
            ValueError: if the folder has other files.
        """
        self.folder, self.plan = Path(folder).absolute(), plan
        self._mutex = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        foreign = [name for name in names if not name.isdecimal() and name != LOCK]
        if foreign or (self.folder.exists() and not self.folder.is_dir()):
            raise ValueError(
                f"{self.folder}: has other files ({(foreign or ['a file'])[0]}). Choose another --train-dir"
            )

    def round_folder(self, number: int) -> Path:
        """Return the folder of a round."""
        return self.folder / str(number)

    def last_round(self) -> int:
        """Return the number of the last round, or 0."""
        names = (path.name for path in self.folder.iterdir()) if self.folder.is_dir() else ()
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def is_running(self) -> bool:
        """Return True if a process works on a round, whoever started it."""
        with self._mutex:
            if self._process is not None and self._process.poll() is None:
                return True
            if not self.folder.is_dir():
                return False
            lock = FileLock(self.folder / LOCK)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                return True
            lock.release()
            return False

    def status(self) -> TrainingStatus:
        """Return how far the last round is."""
        number = self.last_round()
        if not number:
            return TrainingStatus("idle")
        folder, is_running = self.round_folder(number), self.is_running()
        record = read_record(folder / STAGE)
        stage, is_stopped = str(record.get("stage", STAGES[0])), (folder / STOP).exists()
        if is_running:
            state = "stopping" if is_stopped else "running"
        elif stage in STAGES:
            state = "stopped" if is_stopped else "interrupted"
        else:
            return TrainingStatus(stage, number, message=str(record.get("message", "")))
        progress = run_progress(folder / RUN) if stage == "train" else {}
        return TrainingStatus(state, number, stage, **progress)

    def start(self, store: VoteReader) -> None:
        """Start a round on the votes, or resume the one that was stopped or interrupted.

        Raises:
            ValueError: if one is running, or the votes are too few.
        """
        with self._mutex:
            status = self.status()
            if status.state in ("running", "stopping"):
                raise ValueError("a training on these votes is running already. Wait for it, or stop it first")
            number = status.round
            if status.state not in ("stopped", "interrupted"):
                check_votes(store)
                number = status.round + 1
                folder = self.round_folder(number)
                try:
                    folder.mkdir(parents=True)
                except FileExistsError:
                    raise ValueError("another page has just started a training on these votes. Wait for it") from None
                write_record(folder / PLAN, dataclasses.asdict(self.plan))
            (self.round_folder(number) / STOP).unlink(missing_ok=True)
            self._launch(number)

    def _launch(self, number: int) -> None:
        """Start the process in a new session, so that the page's end does not end it."""
        command = [sys.executable, "-P", "-m", WORKER, str(self.round_folder(number))]
        with (self.round_folder(number) / OUTPUT).open("ab") as output:
            self._process = subprocess.Popen(
                command,
                cwd=self.plan.working_folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def stop(self) -> None:
        """Stop the process after its step. A later `start` resumes.

        Raises:
            ValueError: if none is running.
        """
        with self._mutex:
            if not self.is_running():
                raise ValueError("no training is running")
            (self.round_folder(self.last_round()) / STOP).touch()
            self.pause()

    def pause(self) -> None:
        """Stop the process after its step, if one is running. A restarted page resumes it."""
        with self._mutex:
            if not self.is_running():
                return
            worker = read_record(self.round_folder(self.last_round()) / STAGE).get("process")
            if self._process is not None and self._process.poll() is None:
                worker = self._process.pid
            if isinstance(worker, int):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGTERM)

    def resume_interrupted(self) -> None:
        """Resume a round whose process was killed, or that ended with the page. One that a person stopped stays so."""
        with self._mutex:
            status = self.status()
            if status.state == "interrupted":
                self._launch(status.round)

    def offered(self) -> int:
        """Return the number of the round whose fresh pairs the page offers, or 0."""
        number = self.last_round()
        return number if number and (self.round_folder(number) / OFFERED).exists() else 0

    def offer(self, *, is_offered: bool) -> None:
        """Offer the fresh pairs of the last round in place of the labelled ones, or end that.

        Raises:
            ValueError: if there are none.
        """
        if self.status().state != "ready":
            raise ValueError("there are no pairs of base and tuned yet")
        marker = self.round_folder(self.last_round()) / OFFERED
        marker.touch() if is_offered else marker.unlink(missing_ok=True)


def check_votes(store: VoteReader) -> None:
    """Check that the votes are enough to train on.

    Raises:
        ValueError: if fewer than MIN_WINNERS pairs have a winner.
    """
    winners = sum(preference["preference"] in ("a", "b") for preference in tally(store.votes()).values())
    if winners < MIN_WINNERS:
        raise ValueError(
            f"{counted(winners, 'pair')} with a winner, and training needs {MIN_WINNERS}. Label more pairs first"
        )


def run_progress(run: Path) -> dict[str, Any]:
    """Return step, steps and loss of a training run, by its newest checkpoint with a log."""
    names = [path.name for path in run.glob("checkpoint-*")] if run.is_dir() else []
    numbers = sorted((int(name.removeprefix("checkpoint-")) for name in names if name[11:].isdecimal()), reverse=True)
    for number in numbers:
        state = read_record(run / f"checkpoint-{number}" / "trainer_state.json")
        if state:
            losses = [entry["loss"] for entry in state.get("log_history", ()) if "loss" in entry]
            return {"step": number, "steps": int(state.get("max_steps", 0)), "loss": losses[-1] if losses else None}
    return {}


def read_record(path: Path) -> dict[str, Any]:
    """Return a JSON object, or {} if it is missing or not complete."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON object at once."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_plan(folder: Path) -> TrainingPlan:
    """Return the plan of a round."""
    return TrainingPlan(**read_record(folder / PLAN))
