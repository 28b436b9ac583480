"""Uploads: files reach a local stand-in of the hub only with the flag, and failures are one line."""

from __future__ import annotations

import base64
import hashlib
import json
import random
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
    """Answers the requests of an upload, and records them. Safetensors files go by LFS if `lfs` is true."""

    requests: list[tuple[str, bytes]]
    status = 200
    put_status = 200
    """Status of the answers to the bytes of an LFS upload."""
    lfs = False
    chunk_size: int | None = None
    """Bytes of one part of an LFS upload. None: a file is one part."""

    def do_GET(self) -> None:
        self._answer({"id": "me/stars", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size) if size else self._chunks()
        self.requests.append((self.path, body))
        if self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if self.lfs and name.endswith(".safetensors") else "regular" for name in names]
            files = [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in zip(names, modes, strict=True)]
            self._answer({"files": files})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            self._answer({"transfer": "basic", "objects": [self._lfs_object(o) for o in json.loads(body)["objects"]]})
        elif "/commit/" in self.path:
            self._answer({"commitUrl": f"{self.url}/me/stars/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self._answer({"url": f"{self.url}/me/stars", "name": "me/stars"})

    def do_PUT(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        self.requests.append((self.path, self.rfile.read(size) if size else self._chunks()))
        self._answer({}, self.put_status)

    def _lfs_object(self, file: dict[str, Any]) -> dict[str, Any]:
        """Answer to the LFS batch request of a file: one address to put it to, or one per part and one to complete it."""
        address, header = f"{self.url}/lfs/{file['oid']}", {}
        if self.chunk_size:
            parts = range(1, -(-file["size"] // self.chunk_size) + 1)
            header = {"chunk_size": str(self.chunk_size), **{str(n): f"{address}/{n}" for n in parts}}
        upload, verify = {"href": address, "header": header}, {"href": f"{address}/verify"}
        return {**file, "actions": {"upload": upload, "verify": verify}}

    def _chunks(self) -> bytes:
        body = b""
        while "chunked" in self.headers.get("Transfer-Encoding", "") and (size := int(self.rfile.readline(), 16)):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"  # type: ignore[attr-defined]

    def _answer(self, content: Any, status: int | None = None) -> None:
        status = status or self.status
        text = json.dumps(content if status == 200 else {"error": "Forbidden"}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.send_header("ETag", hashlib.sha256(self.path.encode()).hexdigest())
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


@pytest.mark.parametrize("chunk_size", [None, 65536])
def test_large_files_are_uploaded_by_lfs(
    chunk_size: int | None, fake_hub: type[FakeHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole or in parts, the bytes that arrive are those of the file, and the commit names their hash and size."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    fake_hub.lfs, fake_hub.chunk_size = True, chunk_size
    weights = random.Random(0).randbytes(150_000)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(weights)
    (tmp_path / "README.md").write_text("a card")
    hub.push(tmp_path, "me/stars")
    oid = hashlib.sha256(weights).hexdigest()
    sent = [(path, body) for path, body in fake_hub.requests if path.startswith(f"/lfs/{oid}")]
    parts = [body for path, body in sent if path.removeprefix(f"/lfs/{oid}") in ("", "/1", "/2", "/3")]
    if chunk_size:
        completed = json.loads(parts.pop())
        assert completed["oid"] == oid and [part["partNumber"] for part in completed["parts"]] == [1, 2, 3]
    assert [len(part) for part in parts] == ([65536, 65536, 18928] if chunk_size else [150_000])
    assert b"".join(parts) == weights
    assert json.loads(sent[-1][1]) == {"oid": oid, "size": 150_000} and sent[-1][0].endswith("/verify")
    commit = next(body for path, body in fake_hub.requests if "/commit/" in path)
    entries = {entry["key"]: entry["value"] for entry in map(json.loads, commit.splitlines())}
    assert entries["lfsFile"]["path"] == "pytorch_lora_weights.safetensors" and entries["lfsFile"]["oid"] == oid
    assert base64.b64decode(entries["file"]["content"]) == b"a card"
    fake_hub.put_status = 403
    with pytest.raises(ValueError, match=r"push_to_hub 'me/stars': .*403.* The files are in"):
        hub.push(tmp_path, "me/stars")


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
