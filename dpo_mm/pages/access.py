"""Access to a page by secret links: one per person of a file of names, and one for the host of the page.

A link holds a key of 256 random bits. The browser that opens it gets the key as a cookie, and its address loses it. The
file NAMES.keys next to the names stores the SHA-256 of each key, so nobody can read a key from it. The host's key is
new at each start and is stored nowhere.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote

from dpo_mm.data.text_files import read_lines
from dpo_mm.files.resumable import atomic_write
from dpo_mm.labels.annotators import annotator_name, identity

KEY_PARAMETER = "key"
PERSON_HEADER, HOST_HEADER = "x-dpo-mm-person", "x-dpo-mm-host"
"""Headers in which the page learns who sent a request. Those of a browser never reach it."""
MAX_PEOPLE = 1000
MAX_KEY_LENGTH = 200
FAILURE_SECONDS, MAX_FAILURES = 60, 20
"""Seconds in which an address may send MAX_FAILURES wrong keys. Right keys are not limited."""
MAX_ADDRESSES = 1000
"""Number of addresses whose wrong keys are counted."""


class Denied(Exception):
    """Status and reason of a request without access."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Visitor:
    """Who sent a request: a person of the file, or the host of the page (name "")."""

    name: str

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the header that tells the page who it is."""
        if self.name:
            return [(PERSON_HEADER.encode(), quote(self.name).encode())]
        return [(HOST_HEADER.encode(), b"1")]


@dataclass(frozen=True)
class Access:
    """Keys of a page.

    Args:
        cookie: name of the cookie. It has the port, because browsers share cookies between ports.
        visitors: visitor by the SHA-256 of the key, in hexadecimal digits.
        is_open: visitors without a key may use the page too. Only the host has a key then.
    """

    cookie: str
    visitors: Mapping[str, Visitor]
    is_open: bool = False
    failures: dict[str, deque[float]] = field(default_factory=lambda: defaultdict(deque))

    def visitor_of(self, key: str) -> Visitor | None:
        """Return who a key belongs to. The time does not depend on how much of a hash is right."""
        digest, visitor = key_hash(key[:MAX_KEY_LENGTH]), None
        for stored, owner in self.visitors.items():
            if hmac.compare_digest(stored, digest):
                visitor = owner
        return visitor

    def admit(self, cookies: str, address: str) -> Visitor | None:
        """Return who sent a request, by its cookies. None: anybody, on an open page.

        Raises:
            Denied: if the page is not open and there is no right key.
        """
        key = _cookie(cookies, self.cookie)
        visitor = self.visitor_of(key) if key else None
        if visitor is None and not self.is_open:
            if key:
                self._fail(address)
            raise Denied(401, "This page opens with a personal link. Its host can send you one")
        return visitor

    def enter(self, query: bytes, address: str) -> str | None:
        """Return the key in the query of an opened link, or None if the query has none.

        Raises:
            Denied: if the key is wrong.
        """
        keys = parse_qs(query.decode("latin-1")).get(KEY_PARAMETER)
        if not keys:
            return None
        if self.visitor_of(keys[0]) is None:
            self._fail(address)
            raise Denied(403, "This link is not valid, or no longer valid. The host of the page can send you a new one")
        return keys[0]

    def _fail(self, address: str) -> None:
        """Count a wrong key.

        Raises:
            Denied: if the address sent too many.
        """
        now = time.monotonic()
        if address not in self.failures and len(self.failures) >= MAX_ADDRESSES:
            self.failures.clear()
        times = self.failures[address]
        while times and times[0] < now - FAILURE_SECONDS:
            times.popleft()
        if len(times) >= MAX_FAILURES:
            raise Denied(429, "Too many wrong links. Wait a minute")
        times.append(now)

    def without_key(self, cookies: str) -> str:
        """Return a Cookie header without the key, so that the page never holds it."""
        parts = (part.strip() for part in cookies.split(";"))
        return "; ".join(part for part in parts if part.partition("=")[0].strip() != self.cookie)


def key_hash(key: str) -> str:
    """Return the SHA-256 of a key. A key of 256 random bits cannot be guessed, so a slow hash would add nothing."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def read_people(path: str) -> list[str]:
    """Read a file with one name per line. Empty lines and lines that start with # are ignored.

    Raises:
        ValueError: if there is no file or no name, a name is not valid, or two names are one person.
    """
    if not Path(path).is_file():
        raise ValueError(f"--people {path}: no such file. Write one with one name per line")
    names: dict[str, str] = {}
    for number, line in enumerate(read_lines(Path(path)), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            name = annotator_name(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if identity(name) in names:
            raise ValueError(f"{path}, line {number}: {name!r} and {names[identity(name)]!r} are one name. Remove one")
        names[identity(name)] = name
    if not 0 < len(names) <= MAX_PEOPLE:
        raise ValueError(f"{path}: has {len(names)} names. Expected 1 to {MAX_PEOPLE}, one per line")
    return list(names.values())


def keys_file(path: str) -> Path:
    """Return the file of the hashes of a file of names."""
    return Path(f"{path}.keys")


def make_keys(path: str) -> tuple[dict[str, str], dict[str, str]]:
    """Make a key for each person of a file who has none, and store the hashes in NAMES.keys.

    Returns:
        SHA-256 of each person's key, by name, and the new keys, by name. People who are no longer in the file have none.

    Raises:
        ValueError: as in `read_people`, or if NAMES.keys is another file.
    """
    file, stored = keys_file(path), {}
    if file.exists():
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            is_valid = all(isinstance(value, str) and len(value) == 64 for value in stored.values())
        except (ValueError, AttributeError):
            is_valid = False
        if not is_valid:
            raise ValueError(f"{file}: not a file of keys. Remove it, which makes new links for all people")
    names = read_people(path)
    known = {identity(name): digest for name, digest in stored.items()}
    new = {name: secrets.token_urlsafe(32) for name in names if identity(name) not in known}
    hashes = {name: key_hash(new[name]) if name in new else known[identity(name)] for name in names}
    if hashes != stored:
        _write_private(file, json.dumps(hashes, ensure_ascii=False, indent=1) + "\n")
    return hashes, new


def _write_private(file: Path, text: str) -> None:
    """Replace a file by one that only its owner can read."""
    with atomic_write(file) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
            opened.write(text)


def link(address: str, key: str) -> str:
    """Return the link that opens a page with a key."""
    return f"{address}/?{KEY_PARAMETER}={key}"


def people_links(address: str, hashes: Mapping[str, str], new: Mapping[str, str], file: Path) -> Sequence[str]:
    """Return the lines that tell the host which link to send to whom."""
    lines = [f"{name}: {link(address, key)}" for name, key in new.items()]
    if new:
        lines.insert(0, "Send each person this link. It is printed once, and opens the page under this name:")
    if len(new) < len(hashes):
        old = ", ".join(name for name in hashes if name not in new)
        lines.append(f"Links printed earlier still open the page: {old}. For new links, remove {file}")
    return lines


def person_of(headers: Mapping[str, str]) -> str | None:
    """Return the person who sent a request that reached the page, or None if no person is known."""
    value = headers.get(PERSON_HEADER)
    return unquote(value) if value else None


def is_host(headers: Mapping[str, str]) -> bool:
    """Return True if the host of the page sent a request that reached the page."""
    return headers.get(HOST_HEADER) == "1"


def _cookie(cookies: str, name: str) -> str | None:
    parts = (part.strip().partition("=") for part in cookies.split(";"))
    return next((value for key, _, value in parts if key == name), None)
