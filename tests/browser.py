"""Fixtures that serve a demo page and open it in Chromium.

Tests with these fixtures are skipped if Gradio, Playwright or Chromium is missing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import forked

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
"""Programs, the lightest first."""
VIEWPORT = {"width": 1280, "height": 1000}
CHROMIUM = next((path for name in BROWSERS if (path := shutil.which(name))), None)
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["Chromium"]


@pytest.fixture(scope="session")
def browser_installed() -> None:
    """Skip the test if a program that it needs is missing."""
    if MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)}")


class Server:
    """`dpo-mm demo ...` in a forked process with `folder` as its working directory."""

    def __init__(self, *arguments: str, folder: Path, call: Callable[[], None] = forked.command) -> None:
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self.process = forked.Forked("demo", *arguments, call=call, cwd=folder, env=env)
        self.address = self._address()

    def _address(self) -> str:
        deadline = time.monotonic() + 300
        while self.process.poll() is None and time.monotonic() < deadline:
            address = re.search(r"Open (http://127\.0\.0\.1:\d+)", self.process.stdout)
            if address:
                return address[1]
            time.sleep(0.02)
        raise AssertionError("the page did not start:\n" + self.process.stdout + self.process.stderr)

    def kill(self) -> None:
        self.process.kill()


def free_port() -> int:
    """The first free port of those of this process. So most pages of a session have the same address, one after the other."""
    first = 20_000 + os.getpid() % 120 * 100
    for port in range(first, first + 100):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                listener.bind(("127.0.0.1", port))
                return port
    raise OSError(f"no port from {first} is free")


@pytest.fixture
def serve(browser_installed: None, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start a page, and stop it after the test."""
    servers: list[Server] = []

    def start(*arguments: str, **options: Any) -> Server:
        servers.append(Server(*arguments, "--port", str(free_port()), folder=tmp_path, **options))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.kill()


@pytest.fixture(scope="session")
def serve_once(browser_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Start a page that several tests open. Each test has a separate window, and so a separate session."""
    servers: dict[tuple[str, ...], Server] = {}

    def start(*arguments: str) -> Server:
        if arguments not in servers:
            servers[arguments] = Server(*arguments, folder=tmp_path_factory.mktemp("page"))
        assert servers[arguments].process.poll() is None, "an earlier test stopped the page"
        return servers[arguments]

    yield start
    for server in servers.values():
        server.kill()


@pytest.fixture(scope="session")
def chromium(browser_installed: None) -> Iterator[Any]:
    """A Chromium that runs without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Window:
    """A window of Chromium that tests use one after the other. It still has Gradio's scripts, read and compiled."""

    def __init__(self, chromium: Any) -> None:
        self._chromium = chromium
        self.context: Any = None

    def open(self) -> Any:
        """Return its page, without cookies, stored data, other tabs and another look."""
        if self.context is None:
            self.context = self._chromium.new_context(viewport=VIEWPORT)
            page = self.context.new_page()
            page.set_default_timeout(60_000)
            return page
        page, *others = self.context.pages
        for other in others:
            other.close()
        self.context.clear_cookies()
        page.emulate_media(color_scheme="light")
        page.set_viewport_size(VIEWPORT)
        return page

    def leave(self) -> None:
        """Leave the site, which stores nothing from then on. A window in which that fails is closed."""
        try:
            page = self.context.pages[0]
            if page.url.startswith("http"):
                page.evaluate("localStorage.clear(), sessionStorage.clear()")
            page.goto("about:blank")
        except Exception:
            self.context.close()
            self.context = None


@pytest.fixture(scope="session")
def window(chromium: Any) -> Window:
    return Window(chromium)


@pytest.fixture
def browser(chromium: Any, window: Window) -> Iterator[Any]:
    """The Chromium of the session. The windows that a test opened are closed after it."""
    yield chromium
    for context in chromium.contexts:
        if context is not window.context:
            context.close()


@pytest.fixture
def page(window: Window) -> Iterator[Any]:
    """A page without data of earlier ones. A dialog on the page fails the test."""
    page = window.open()
    dialogs: list[str] = []
    dismiss = lambda dialog: (dialogs.append(dialog.message), dialog.dismiss())
    page.on("dialog", dismiss)
    yield page
    page.remove_listener("dialog", dismiss)
    window.leave()
    assert not dialogs


@pytest.fixture
def run_command(browser_installed: None, tmp_path: Path) -> Callable[..., str]:
    """Run `dpo-mm ...` until it exits and return its output."""

    def run(*arguments: str) -> str:
        return forked.run(*arguments, cwd=tmp_path, check=True).stdout

    return run
