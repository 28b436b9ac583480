"""Uploads: files reach a local stand-in of the hub only with the flag, and failures are one line."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from typer.testing import CliRunner

from dpo_mm.cli.main import app
from dpo_mm.export import hub


class FakeHub(BaseHTTPRequestHandler):
    """Answers the requests of an upload, and records them."""

    requests: list[tuple[str, bytes]]
    status = 200

    def do_GET(self) -> None:
        self._answer({"id": "me/stars", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size) if size else self._chunks()
        self.requests.append((self.path, body))
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            self._answer({"commitUrl": f"{self.url}/me/stars/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self._answer({"url": f"{self.url}/me/stars", "name": "me/stars"})

    def _chunks(self) -> bytes:
        body = b""
        while "chunked" in self.headers.get("Transfer-Encoding", "") and (size := int(self.rfile.readline(), 16)):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"  # type: ignore[attr-defined]

    def _answer(self, content: Any) -> None:
        text = json.dumps(content if self.status == 200 else {"error": "Forbidden"}).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    handler = type("Handler", (FakeHub,), {"requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", url)  # huggingface_hub has read it when it was imported
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield handler
    server.shutdown()
    server.server_close()


def run(folder: Path, *flags: str) -> Any:
    output = ("--output", str(folder / "out"))
    return CliRunner().invoke(app, ["export", "shapes-sd-faithful", "--to", "diffusers", *output, *flags])


@pytest.mark.slow
def test_nothing_is_sent_without_the_flag(fake_hub: type[FakeHub], tmp_path: Path) -> None:
    assert run(tmp_path).exit_code == 0
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file() and not fake_hub.requests
    result = run(tmp_path, "--public")
    assert "public belongs to --push-to-hub" in str(result.exception) and not fake_hub.requests


def test_files_and_card_are_uploaded_to_a_private_repository(fake_hub: type[FakeHub], tmp_path: Path) -> None:
    result = run(tmp_path, "--push-to-hub", "me/stars")
    assert result.exit_code == 0, result.exception
    created = json.loads(next(body for path, body in fake_hub.requests if path == "/api/repos/create"))
    assert (created["name"], created["organization"]) == ("stars", "me")
    assert created.get("visibility") == "private" or created.get("private") is True  # by the client's release
    commit = next(body for path, body in fake_hub.requests if "/commit/" in path)
    entries = [json.loads(line) for line in commit.splitlines()]
    files = {e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in entries if e["key"] == "file"}
    assert files.keys() == {"README.md", "pytorch_lora_weights.safetensors"}
    assert all(content == (tmp_path / "out" / name).read_bytes() for name, content in files.items())
    assert b'load_lora_weights("me/stars")' in files["README.md"]


def test_upload_that_fails_is_one_line(
    fake_hub: type[FakeHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"push_to_hub 'stars' is not a hub id. Expected NAMESPACE/NAME"):
        hub.push(tmp_path, "stars")
    fake_hub.status = 403
    with pytest.raises(ValueError, match=r"push_to_hub 'me/stars': .*403.* The files are in .*Run the same") as caught:
        hub.push(tmp_path, "me/stars")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"push_to_hub 'me/stars': .*The files are in"):
        hub.push(tmp_path, "me/stars")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match=r"there is no token for the hub. Run hf auth login, or set HF_TOKEN"):
        hub.push(tmp_path, "me/stars")
