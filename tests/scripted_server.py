"""A scripted OpenAI-compatible server on 127.0.0.1, for tests."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[[dict[str, Any]], Any]
"""Request -> text of the reply, a whole reply as (status, JSON), or (status, JSON, headers)."""


class ScriptedServer(ThreadingHTTPServer):
    """Replies by a script. `requests` has the body of each request, `headers` its headers."""

    daemon_threads = True

    def __init__(self, script: Script, models: tuple[str, ...]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.models = script, models
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: ScriptedServer

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._reply(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.headers.append(dict(self.headers))
        if body["model"] not in self.server.models:
            self._reply(404, {"error": {"message": f"The model {body['model']} does not exist."}})
            return
        reply = self.server.script(body)
        if isinstance(reply, str):
            reply = (200, completion(reply))
        with contextlib.suppress(OSError):  # the client has given up
            self._reply(*reply)

    def _reply(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def completion(text: str | None, *, tokens: int = 3, reason: str = "stop", **message: Any) -> dict[str, Any]:
    """A reply in the OpenAI format."""
    return {
        "choices": [{"message": {"role": "assistant", "content": text, **message}, "finish_reason": reason}],
        "usage": {"prompt_tokens": 10, "completion_tokens": tokens},
    }


@contextlib.contextmanager
def scripted_server(script: Script, *, models: tuple[str, ...] = ("base", "tuned")) -> Iterator[ScriptedServer]:
    """Context manager with a running server."""
    server = ScriptedServer(script, models)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
