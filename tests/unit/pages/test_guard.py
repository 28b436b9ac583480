"""The guard of the pages: hosts, origins, routes, sizes and sessions, on an application that records what reaches it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dpo_mm.pages import guard
from dpo_mm.pages.guard import BODY_LIMIT, MAX_FILES, UPLOAD_PATH, Guard, remove_old_files, session_of

JOIN = "/gradio_api/queue/join"
HOST = "127.0.0.1:7860"


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end in a thread of its own, because the browser of other tests has a loop in this one."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, coroutine).result()


class Server:
    """A guard in front of an application that reads the whole body and answers with its size."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.bodies: list[bytes] = []
        hosts = frozenset({HOST, "localhost:7860", "[::1]:7860"})
        self.guard = Guard(self.app, hosts=hosts, folder=folder, **({"upload_limit": 0} | settings))

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        if message["type"] == "http.disconnect":
            raise RuntimeError("the client is gone")
        self.bodies.append(body + message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    def ask(
        self, method: str = "GET", path: str = "/", *, body: Sequence[bytes] = (b"",), host: str = HOST, **headers: str
    ) -> tuple[int, dict[str, str]]:
        """Send a request, its body in parts. Return the status and the headers of the answer."""
        sent: list[Any] = []
        parts = [{"type": "http.request", "body": part, "more_body": n + 1 < len(body)} for n, part in enumerate(body)]

        async def receive() -> Any:
            return parts.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        pairs = [("host", host), *((name.replace("_", "-"), value) for name, value in headers.items())]
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [(name.encode(), value.encode()) for name, value in pairs],
        }
        run(self.guard(scope, receive, send))
        assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
        return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


@pytest.mark.parametrize("host", [HOST, "localhost:7860", "LOCALHOST:7860", "[::1]:7860"])
def test_own_hosts_may_read_and_post(server: Server, host: str) -> None:
    assert server.ask(host=host)[0] == 200
    assert server.ask("POST", JOIN, host=host, origin=f"http://{host}", sec_fetch_site="same-origin")[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:7860",
        "127.0.0.1.evil.example:7860",
        "localhost:7860@evil.example",
        "127.0.0.1:80",
        "",
    ],
)
def test_other_hosts_reach_nothing(server: Server, host: str) -> None:
    """It catches a comparison of the host's start or end, and one without the port (DNS rebinding)."""
    for method, path in (("GET", "/"), ("GET", "/config"), ("POST", JOIN)):
        assert server.ask(method, path, host=host)[0] == 421
    assert not server.bodies


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "http://localhost:9999",
        "http://127.0.0.1",
        "null",
        f"file://{HOST}",
        "http://localhost:7860",
    ],
)
def test_other_origins_reach_nothing(server: Server, origin: str) -> None:
    """It catches an allow list of origins (localhost is not 127.0.0.1), and an opaque origin that passes."""
    for method, path in (("GET", "/config"), ("GET", "/gradio_api/queue/data"), ("POST", JOIN), ("OPTIONS", JOIN)):
        assert server.ask(method, path, origin=origin)[0] == 403
    assert not server.bodies


def test_other_sites_may_only_link_to_the_page(server: Server) -> None:
    """A browser sends no Origin with an image or a script of another site, but says so in Sec-Fetch-Site."""
    for site in ("cross-site", "same-site"):
        assert server.ask(path="/gradio_api/queue/data", sec_fetch_site=site, sec_fetch_mode="no-cors")[0] == 403
        assert server.ask(sec_fetch_site=site, sec_fetch_mode="navigate")[0] == 200


def test_two_host_headers_are_refused(server: Server) -> None:
    assert server.ask(Host="evil.example")[0] == 421


def test_frames_are_forbidden_unless_hosted_or_allowed(tmp_path: Path) -> None:
    policy = "content-security-policy"
    assert Server(tmp_path).ask()[1][policy] == "frame-ancestors 'none'"
    assert Server(tmp_path).ask(host="evil.example")[1][policy] == "frame-ancestors 'none'"
    allowed = Server(tmp_path, frames=["hub.example:8000"]).ask()[1][policy]
    assert allowed == "frame-ancestors http://hub.example:8000 https://hub.example:8000"
    hosted = Server(tmp_path, is_hosted=True)
    assert policy not in hosted.ask(host="user-page.hf.space")[1]
    assert hosted.ask("POST", JOIN, host="user-page.hf.space", origin="https://user-page.hf.space")[0] == 200
    assert hosted.ask("POST", JOIN, host="user-page.hf.space", origin="https://evil.example")[0] == 403


@pytest.mark.parametrize(
    "path", ["/login", "/gradio_api/upload", "/gradio_api/run/predict", "/gradio_api/queue/join/", "/"]
)
def test_other_routes_take_no_post(server: Server, path: str) -> None:
    assert server.ask("POST", path)[0] == 403
    assert server.ask("GET", "/gradio_api/deep_link")[0] == 403, "it writes a file per visit"
    assert not server.bodies


def test_large_bodies_are_refused_before_they_are_read(server: Server) -> None:
    """It catches a limit that only the declared length has: a chunked body declares none."""
    assert server.ask("POST", JOIN, content_length=str(BODY_LIMIT + 1))[0] == 413
    assert server.ask("POST", JOIN, content_length="-1")[0] == 413
    part = b"x" * (BODY_LIMIT // 4)
    assert server.ask("POST", JOIN, body=[part] * 100)[0] == 413
    assert not server.bodies
    assert server.ask("POST", JOIN, body=[part] * 4)[0] == 200 and len(server.bodies[0]) == BODY_LIMIT


def form(*files: bytes) -> bytes:
    return b"".join(b"--B\r\n\r\n" + file + b"\r\n" for file in files) + b"--B--\r\n"


def test_uploads_are_one_file_of_limited_size(tmp_path: Path) -> None:
    """It catches a count per part of the body: the boundary may be cut in two."""
    server, kind = Server(tmp_path, upload_limit=1000), "multipart/form-data; boundary=B"
    ask = lambda data, step=7: server.ask(
        "POST", UPLOAD_PATH, content_type=kind, body=[data[n : n + step] for n in range(0, len(data), step)]
    )[0]
    assert ask(form(b"x" * 1000)) == 200
    assert ask(form(b"x" * 6000)) == 413
    assert ask(form(b"", b"")) == ask(form(b"", b""), 1) == ask(form(*[b""] * 200)) == 413
    assert server.ask("POST", UPLOAD_PATH, content_type="application/json")[0] == 400
    assert len(server.bodies) == 1


def test_uploaded_files_are_few_and_deleted(tmp_path: Path) -> None:
    (tmp_path / "example.png").touch()
    server = Server(tmp_path, upload_limit=1000)
    ask = lambda: server.ask("POST", UPLOAD_PATH, content_type="multipart/form-data; boundary=B", body=[form(b"x")])[0]
    for number in range(MAX_FILES):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "file").touch()
    assert ask() == 503
    old = time.time() - guard.FILE_SECONDS - 1
    for path in tmp_path.rglob("*"):
        os.utime(path, (old, old))
    assert ask() == 200
    remove_old_files(tmp_path, server.guard.built_files)
    assert (tmp_path / "example.png").exists(), "the page's own examples stay"
    assert len([path for path in tmp_path.rglob("*") if not path.is_dir()]) == 1


def test_each_browser_gets_one_session(server: Server) -> None:
    first, second = (server.ask()[1]["set-cookie"] for _ in range(2))
    assert first != second and "HttpOnly" in first and "SameSite=Strict" in first
    cookie = first.partition(";")[0]
    assert session_of(cookie) == cookie.partition("=")[2] and len(session_of(cookie) or "") == 32
    assert "set-cookie" not in server.ask(cookie=f"other=1; {cookie}")[1]
    for broken in ("", "dpo-mm-session=admin", "dpo-mm-session=" + "0" * 31, "=;,", "dpo-mm-session='; DROP"):
        assert session_of(broken) is None and "set-cookie" in server.ask(cookie=broken)[1]


def test_websockets_are_closed(server: Server) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/", "headers": [(b"host", HOST.encode())]}
    run(server.guard(scope, send, send))
    assert [message["type"] for message in sent] == ["websocket.close"]
