"""Guard in front of the pages of demos/: other sites, large requests and unknown routes do not reach Gradio.

A page on this machine has no password, so every site that the user's browser opens could use it. The guard therefore
refuses requests under other host names (DNS rebinding) and from other origins, and forbids frames of other sites. It
limits the size of requests and the number of uploaded files. It also gives each browser a random session. A page that
other machines can reach has keys, see `dpo_mm.pages.access`.
"""

from __future__ import annotations

import http.cookies
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dpo_mm.pages.access import HOST_HEADER, PERSON_HEADER, Access, Denied

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

SESSION_COOKIE = "dpo-mm-session"
SESSION = re.compile("[0-9a-f]{32}")
BODY_LIMIT = 256_000
"""Bytes of a request that is not an upload."""
UPLOAD_OVERHEAD = 4_000
"""Bytes of an upload besides the file."""
UPLOAD_PATH = "/gradio_api/upload"
POST_PATHS = ("/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset", UPLOAD_PATH)
"""Routes that the pages post to."""
CLOSED_PATHS = ("/gradio_api/deep_link", "/gradio_api/runs", "/monitoring")
"""Routes that the pages do not need. The first writes files."""
FILE_SECONDS, MAX_FILES = 600, 100
"""Seconds after which an uploaded file is deleted, and the largest number of stored files."""


class Refusal(Exception):
    """Status and reason of a refused request."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Guard:
    """ASGI application that checks each request before another application gets it.

    Args:
        app: the application behind it.
        hosts: hosts, with their ports, under which the page may be opened.
        upload_limit: largest size of an uploaded file in bytes. 0: no uploads.
        folder: folder of uploaded and generated files.
        frames: hosts of other sites that may show the page in a frame.
        is_hosted: the page is a hosted Space. Its proxy may use any Host, and every site may frame it, by https.
        access: keys of the page. None: everybody who reaches the page may use it.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        *,
        hosts: frozenset[str],
        upload_limit: int,
        folder: Path,
        frames: Sequence[str] = (),
        is_hosted: bool = False,
        access: Access | None = None,
    ) -> None:
        self.app, self.hosts, self.upload_limit, self.folder = app, hosts, upload_limit, folder
        self.is_hosted, self.access = is_hosted, access
        ancestors = " ".join(f"http://{host} https://{host}" for host in frames) or "'none'"
        self.policy = [] if is_hosted else [(b"content-security-policy", f"frame-ancestors {ancestors}".encode())]
        self.policy += [(b"referrer-policy", b"no-referrer")] if access is not None else []
        self.cookie = "SameSite=None; Secure; Partitioned" if is_hosted else "SameSite=Strict"
        self.cookie = "SameSite=Lax" if access is not None else self.cookie  # a link in a message is of another site
        self.built_files = frozenset(_files(folder))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check(scope, headers)
            key = self._opened_key(scope)
            if key is not None:
                return await self._store_key(send, key)
            scope = self._identify(scope, headers)
        except (Refusal, Denied) as refusal:
            return await self._refuse(scope, send, refusal)
        boundary = _boundary(headers) if scope["path"] == UPLOAD_PATH else b""
        request = _Request(self._limit(scope["path"]), boundary)

        async def bounded_receive() -> MutableMapping[str, Any]:
            message = await receive()
            try:
                request.count(message)
            except Refusal as refusal:
                await self._refuse(scope, guarded_send, refusal)
                request.is_refused = True
                return {"type": "http.disconnect"}
            return message

        async def guarded_send(message: MutableMapping[str, Any]) -> None:
            if request.is_refused:
                return
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *self._headers(headers)]}
            await send(message)

        try:
            await self.app(scope, bounded_receive, guarded_send)
        except Exception:
            if not request.is_refused:
                raise

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        """Check host, origin, route and declared size of a request.

        Raises:
            Refusal: if one is not allowed.
        """
        hosts = [value for name, value in scope["headers"] if name.lower() == b"host"]
        host = headers.get("host", "").lower()
        if len(hosts) != 1 or not (self.is_hosted or host in self.hosts or self._is_own_address(scope, host)):
            raise Refusal(421, f"This page is not served as {host!r}. Open the address that the command printed")
        origin = headers.get("origin")
        is_foreign = origin is not None and _host_of(origin) not in {host, *(self.hosts if self.is_hosted else ())}
        site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode")
        if is_foreign or (site in ("cross-site", "same-site") and mode != "navigate"):
            raise Refusal(403, "Requests of other sites are not allowed")
        if scope["type"] == "websocket":
            raise Refusal(403, "The pages have no websockets")
        path, method = scope["path"], scope["method"]
        if path.startswith(CLOSED_PATHS) or (method not in ("GET", "HEAD") and path not in POST_PATHS):
            raise Refusal(403, "The pages do not have this route")
        if method not in ("GET", "HEAD", "POST"):
            raise Refusal(405, "The pages take GET, HEAD and POST")
        if path == UPLOAD_PATH and method == "POST":
            self._check_upload(headers)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._limit(path):
            raise Refusal(413, "The request is too large")

    def _is_own_address(self, scope: Scope, host: str) -> bool:
        """Return True if a page with keys is opened by the address of the connection. No other name leads there."""
        address, port = scope.get("server") or ("", None)
        return self.access is not None and host in (f"{address}:{port}", f"[{address}]:{port}")

    def _opened_key(self, scope: Scope) -> str | None:
        """Return the key of an opened link, or None for other requests."""
        if self.access is None or scope["path"] != "/" or scope["method"] != "GET":
            return None
        return self.access.enter(scope.get("query_string", b""), _address(scope))

    def _identify(self, scope: Scope, headers: dict[str, str]) -> Scope:
        """Return the request as the page gets it: with its sender, and without the key and headers that claim one."""
        claims = {PERSON_HEADER.encode(), HOST_HEADER.encode()}
        rest = [(name, value) for name, value in scope["headers"] if name.lower() not in claims]
        if self.access is not None:
            visitor = self.access.admit(headers.get("cookie", ""), _address(scope))
            cookies = self.access.without_key(headers.get("cookie", "")).encode("latin-1")
            rest = [(name, cookies if name.lower() == b"cookie" else value) for name, value in rest]
            rest += visitor.headers() if visitor is not None else []
        return {**scope, "headers": rest}

    async def _store_key(self, send: Send, key: str) -> None:
        """Store the key of an opened link in the browser, and open the page without it."""
        assert self.access is not None
        cookie = f"{self.access.cookie}={key}; Path=/; Max-Age=31536000; HttpOnly; SameSite=Lax"
        added = [(b"location", b"/"), (b"set-cookie", cookie.encode()), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 303, "headers": [*added, *self.policy]})
        await send({"type": "http.response.body", "body": b""})

    def _limit(self, path: str) -> int:
        """Return the largest size of a request's body, in bytes."""
        return self.upload_limit + UPLOAD_OVERHEAD if path == UPLOAD_PATH else BODY_LIMIT

    def _check_upload(self, headers: dict[str, str]) -> None:
        """Check that uploads are allowed, and that there is room for one more file after old ones are deleted."""
        if not self.upload_limit:
            raise Refusal(403, "This page takes no uploads")
        if not _boundary(headers):
            raise Refusal(400, "The upload is not a form with one file")
        remove_old_files(self.folder, self.built_files)
        if len(_files(self.folder)) - len(self.built_files) >= MAX_FILES:
            raise Refusal(503, "There are too many uploaded files. Try again in ten minutes")

    def _headers(self, request_headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
        """Return the headers to add to a response: who may frame it, and the session of a new browser."""
        added = list(self.policy)
        if session_of(request_headers.get("cookie", "")) is None:
            value = f"{SESSION_COOKIE}={secrets.token_hex(16)}; Path=/; Max-Age=31536000; HttpOnly; {self.cookie}"
            added.append((b"set-cookie", value.encode()))
        return added

    async def _refuse(self, scope: Scope, send: Send, refusal: Refusal | Denied) -> None:
        """Answer with the status and the reason, and close the connection."""
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close"), *self.policy]
        await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await send({"type": "http.response.body", "body": f"{refusal}.\n".encode()})


class _Request:
    """Size of a request's body so far, and the number of parts of an uploaded form."""

    def __init__(self, limit: int, boundary: bytes) -> None:
        self.limit, self.boundary, self.size, self.parts, self.tail = limit, boundary, 0, 0, b""
        self.is_refused = False

    def count(self, message: MutableMapping[str, Any]) -> None:
        """Add a part of the body.

        Raises:
            Refusal: if the body is larger than the limit, or the form has more than one part.
        """
        body = message.get("body", b"") if message["type"] == "http.request" else b""
        self.size += len(body)
        if self.size > self.limit:
            raise Refusal(413, "The request is too large")
        if self.boundary and body:
            text = self.tail + body
            self.parts += text.count(self.boundary)
            self.tail = text[max(len(text) - len(self.boundary) + 1, 0) :]
            if self.parts > 2:  # one before the file and one after it
                raise Refusal(413, "Upload one file at a time")


def session_of(cookies: str) -> str | None:
    """Return the session in a Cookie header, or None if there is none."""
    try:
        morsel = http.cookies.SimpleCookie(cookies).get(SESSION_COOKIE)
    except http.cookies.CookieError:
        return None
    return morsel.value if morsel is not None and SESSION.fullmatch(morsel.value) else None


def remove_old_files(folder: Path, built_files: frozenset[Path]) -> None:
    """Delete the files that visitors caused more than FILE_SECONDS ago, and empty folders of that age."""
    limit = time.time() - FILE_SECONDS
    for path in sorted(folder.rglob("*"), reverse=True):
        try:
            if path in built_files or path.lstat().st_mtime > limit:
                continue
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        except OSError:
            continue  # it is not empty, or another request removed it


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]


def _address(scope: Scope) -> str:
    """Return the address from which a request comes."""
    return str((scope.get("client") or ("",))[0])


def _host_of(origin: str) -> str:
    """Return host and port of an Origin header. It is empty for an opaque origin."""
    parts = urlsplit(origin)
    return parts.netloc.lower() if parts.scheme in ("http", "https") else ""


def _boundary(headers: dict[str, str]) -> bytes:
    match = re.fullmatch(r'multipart/form-data;\s*boundary="?([^";,\s]+)"?', headers.get("content-type", ""), re.I)
    return b"--" + match[1].encode("latin-1") if match else b""
