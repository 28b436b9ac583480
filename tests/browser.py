"""Pages served by the command, and Chromium to use them with. Without Gradio, Playwright or Chromium these tests skip."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["Chromium"]


@pytest.fixture(scope="session")
def all_there() -> None:
    if MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)}")


class Server:
    """`dpo-mm demo ...` in a process of its own, started in `folder`."""

    def __init__(self, *arguments: str, folder: Path) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dpo_mm", "demo", *arguments],
            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.said: list[str] = []
        self.address = self._address()
        threading.Thread(target=lambda: self.said.extend(self.process.stdout or ()), daemon=True).start()

    def _address(self) -> str:
        for line in self.process.stdout or ():
            self.said.append(line)
            found = re.search(r"Open (http://127\.0\.0\.1:\d+)", line)
            if found:
                return found[1]
        raise AssertionError("the page did not start:\n" + "".join(self.said))

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def serve(all_there: None, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts a page; ends it after the test."""
    started: list[Server] = []

    def start(*arguments: str) -> Server:
        started.append(Server(*arguments, folder=tmp_path))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.kill()


@pytest.fixture(scope="session")
def browser(all_there: None) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page in a window of its own; a dialog or an error of a script in it fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    opened = context.new_page()
    opened.set_default_timeout(60_000)
    surprises: list[str] = []
    opened.on("dialog", lambda dialog: (surprises.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    yield opened
    context.close()
    assert not surprises


@pytest.fixture
def run_command(all_there: None, tmp_path: Path) -> Callable[..., str]:
    """Runs `dpo-mm ...` to its end; gives what it printed."""

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "dpo_mm", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
