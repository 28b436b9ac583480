"""Pages served by the command, and Chromium to use them with. Without Gradio, Playwright or Chromium these tests skip."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import forked

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
    """`dpo-mm demo ...` in a process of its own, forked in `folder`."""

    def __init__(self, *arguments: str, folder: Path) -> None:
        self.process = forked.Forked("demo", *arguments, cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        self.address = self._address()

    def _address(self) -> str:
        deadline = time.monotonic() + 300
        while self.process.poll() is None and time.monotonic() < deadline:
            found = re.search(r"Open (http://127\.0\.0\.1:\d+)", self.process.stdout)
            if found:
                return found[1]
            time.sleep(0.02)
        raise AssertionError("the page did not start:\n" + self.process.stdout + self.process.stderr)

    def kill(self) -> None:
        self.process.kill()


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
def serve_once(all_there: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts a page that several tests open; each has a window, and so a session, of its own."""
    started: dict[tuple[str, ...], Server] = {}

    def start(*arguments: str) -> Server:
        if arguments not in started:
            started[arguments] = Server(*arguments, folder=tmp_path_factory.mktemp("page"))
        assert started[arguments].process.poll() is None, "a test before this one ended the page"
        return started[arguments]

    yield start
    for server in started.values():
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
        return forked.run(*arguments, cwd=tmp_path, check=True).stdout

    return run
