"""From votes to the next vote in a browser: train, kill page and process, resume, and label base and tuned."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_mm.labels.pairs import open_pairs
from dpo_mm.labels.store import VoteStore
from dpo_mm.labels.training_worker import work
from dpo_mm.labels.vote_training import MIN_WINNERS, OUTPUT, STAGE, VoteTraining, read_record, run_progress
from tests import fork_server, forked
from tests.demos.test_accessibility import OWN, check_looks
from tests.demos.test_label_page import begin, press

pytestmark = pytest.mark.slow

PAIRS = "shapes-faithfulness"


def wait_until(done: Callable[[], bool], folder: Path) -> None:
    """Wait for the training in `folder`. One that fails, or takes too long, fails the test."""
    deadline = time.monotonic() + 300
    while not done():
        failed = read_record(folder / STAGE).get("stage") == "failed" or time.monotonic() > deadline
        assert not failed, (folder / "output.txt").read_text()[-2000:]
        time.sleep(0.02)


def continue_training() -> None:
    """Run the process of a round, whose folder is the first argument."""
    work(Path(sys.argv[1]))


def page_that_forks_its_training() -> None:
    """Serve a page whose training is forked from the fork server. The first page of the test starts an interpreter."""

    def launch(training: VoteTraining, number: int) -> None:
        folder, environment = training.round_folder(number), dict(os.environ)
        outputs = (str(folder / OUTPUT), str(folder / OUTPUT))
        arguments = ["training_worker", str(folder)]
        request = fork_server.Request(continue_training, arguments, training.plan.working_folder, environment, outputs)
        connection = fork_server.connect()
        connection.sendall(pickle.dumps(request))
        fork_server.receive(connection)

    VoteTraining._launch = launch  # type: ignore[method-assign]
    forked.command()


def test_page_trains_on_votes_survives_a_kill_and_offers_the_next_pairs(
    serve: Callable[..., Any], page: Any, browser: Any, tmp_path: Path
) -> None:
    """It catches a training that others can start, a lost run, and votes on fresh pairs that reach the first file."""
    ids = open_pairs(PAIRS)["id"][:]
    store = VoteStore(tmp_path / "labels.sqlite", ids, source=PAIRS)
    for _ in range(MIN_WINNERS + 4):
        shown = store.next_pair("Eve")
        assert shown is not None
        store.cast("Eve", shown.id, "left")
    (tmp_path / "train.yaml").write_text(
        "model: shapes-sd\nsteps: 8\nbatch_size: 2\nlora_rank: 2\nsave_steps: 1\nlogging_steps: 1\n"
    )
    command = ("label", "--train", "train.yaml", "--max-prompts", "2", "--num-inference-steps", "2")
    server = serve(*command)
    address = lambda: re.search(r"Open (http://\S+)", server.process.stdout)[1]  # type: ignore[index]
    folder = tmp_path / "labels-training" / "1"

    other = browser.new_context().new_page()
    begin(other, server.address, "Mallory")
    config = other.request.get(server.address + "/config").json()
    number = {c["props"].get("elem_id"): c["id"] for c in config["components"]}["train"]
    start = next(d["id"] for d in config["dependencies"] if [number, "click"] in d["targets"])
    body = json.dumps({"data": [], "fn_index": start, "session_hash": "other"})
    headers = {"content-type": "application/json", "x-dpo-mm-host": "1"}
    assert other.request.post(server.address + "/gradio_api/queue/join", data=body, headers=headers).ok
    other.wait_for_timeout(1000)
    assert not other.get_by_text("Train on the votes").is_visible() and not folder.exists()
    other.context.close()

    page.goto(address())
    begin(page, address(), "Ada")
    page.get_by_text("Train on the votes").click()
    page.locator("#train").wait_for()
    check_looks(page, OWN)
    page.locator("#train").click()
    wait_until(lambda: "step" in run_progress(folder / "tuned"), folder)
    worker = int(read_record(folder / STAGE)["process"])
    os.kill(worker, signal.SIGSTOP)  # the page looks every two seconds, and the training must not end before
    page.get_by_text(re.compile("Training: step [1-9]")).wait_for()
    server.kill()
    os.kill(worker, signal.SIGKILL)
    before = {path.name for path in (folder / "tuned").glob("checkpoint-*")}
    assert before and not (folder / "tuned" / "training_log.json").exists()

    server = serve(*command, call=page_that_forks_its_training)
    page.goto(address())
    page.locator(".pair").wait_for()
    wait_until(lambda: read_record(folder / STAGE).get("stage") == "ready", folder)
    log = json.loads((folder / "tuned" / "training_log.json").read_text())
    assert [entry["step"] for entry in log["history"] if "loss" in entry] == list(range(1, 9))

    page.get_by_text("Train on the votes").click()
    page.get_by_text("Fresh pairs of base and tuned are ready").wait_for()
    page.locator("#offer").click()
    page.wait_for_function("() => document.querySelector('.pair')?.dataset.presentation.startsWith('1-')")
    page.locator("h1").click()
    for _ in range(2):
        press(page, "ArrowLeft")
    page.locator(".finished").wait_for()
    page.get_by_text("Ratings of the models").click()
    page.locator(".ratings tbody tr").first.wait_for()
    assert {row.split("\t")[0] for row in page.locator(".ratings tbody tr").all_inner_texts()} == {"shapes-sd", "tuned"}
    assert {vote.annotator for vote in store.votes()} == {"Eve"}
