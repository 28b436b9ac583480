"""Secret links of a page: over real HTTP on two addresses of this machine, and the files of names and hashes."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dpo_mm.pages import access
from dpo_mm.pages.access import key_hash, keys_file, make_keys, read_people
from dpo_mm.pages.address import Serving, hosts_of, is_loopback, open_access
from dpo_mm.pages.guard import Guard
from dpo_mm.pages.server import bind, running

pytest.importorskip("uvicorn")


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the headers that reach the page."""
    if scope["type"] == "lifespan":
        return
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(headers).encode()})


class Page:
    """A page with the people Ada and José, on all addresses of this machine."""

    def __init__(self, port: int, lines: list[str]) -> None:
        self.port, self.lines = port, lines
        self.keys = {line.partition(": ")[0]: line.partition("key=")[2] for line in lines if "key=" in line}
        self.host_key = next(key.partition(" ")[0] for line, key in self.keys.items() if line.startswith("Open"))

    def get(self, path: str = "/", *, address: str = "127.0.0.1", **headers: str) -> httpx.Response:
        return httpx.get(f"http://{address}:{self.port}{path}", headers=headers, trust_env=False)

    def cookie(self, key: str) -> str:
        return f"other=1; dpo-mm-key-{self.port}={key}"


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    names = tmp_path / "people.txt"
    names.write_text("# colleagues\nAda\n\nJosé\n")
    serving = Serving("0.0.0.0", people=str(names))
    with bind(None, serving.host) as listener:
        port = listener.getsockname()[1]
        access, lines = open_access(serving, port)
        guard = Guard(echo, hosts=frozenset(hosts_of(serving, port)), upload_limit=0, folder=tmp_path, access=access)
        with running(guard, listener):
            yield Page(port, lines)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2"])
def test_page_with_people_opens_with_a_right_key_only(page: Page, address: str) -> None:
    """It catches a route without the check, a wrong key that enters, and the address of another host that is refused."""
    for path in ("/", "/config", "/gradio_api/queue/data"):
        assert page.get(path, address=address).status_code == 401
        assert page.get(path, address=address, cookie=page.cookie("wrong")).status_code == 401
    assert page.get("/?key=wrong", address=address).status_code == 403
    entered = page.get(f"/?key={page.keys['José']}", address=address)
    assert (entered.status_code, entered.headers["location"]) == (303, "/")
    assert entered.headers["referrer-policy"] == "no-referrer" and entered.headers["cache-control"] == "no-store"
    cookie = entered.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Lax" in cookie
    answer = page.get("/config", address=address, cookie=cookie.partition(";")[0])
    assert answer.status_code == 200 and answer.json()["x-dpo-mm-person"] == "Jos%C3%A9"
    assert page.get("/config", address=address, cookie=cookie, host=f"evil.example:{page.port}").status_code == 421


def test_browser_cannot_claim_a_name_and_the_page_never_holds_a_key(page: Page) -> None:
    key = page.keys["Ada"]
    claims = {"x-dpo-mm-person": "Jos%C3%A9", "X-DPO-MM-Host": "1"}
    seen = page.get("/config", cookie=f"{page.cookie(key)}; last=2", **claims).json()
    assert seen["x-dpo-mm-person"] == "Ada" and "x-dpo-mm-host" not in seen
    assert seen["cookie"] == "other=1; last=2" and key not in json.dumps(seen)
    host = page.get("/config", cookie=page.cookie(page.host_key), **claims).json()
    assert host["x-dpo-mm-host"] == "1" and "x-dpo-mm-person" not in host


def test_wrong_keys_are_limited_and_right_ones_are_not(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "MAX_FAILURES", 3)
    statuses = [page.get(f"/?key=guess{n}").status_code for n in range(5)]
    assert statuses == [403, 403, 403, 429, 429]
    assert page.get("/?key=guess", address="127.0.0.2").status_code in (403, 429)
    assert page.get(f"/?key={page.keys['Ada']}").status_code == 303
    assert page.get("/config", cookie=page.cookie(page.keys["Ada"])).status_code == 200


def test_keys_are_stored_as_hashes_and_outlive_a_restart(tmp_path: Path) -> None:
    names = tmp_path / "people.txt"
    names.write_text("Ada\nGrace\n")
    hashes, new = make_keys(str(names))
    stored = keys_file(str(names))
    assert set(new) == {"Ada", "Grace"} and {key_hash(key) for key in new.values()} == set(hashes.values())
    assert not any(key in stored.read_text() for key in new.values())
    assert stat.S_IMODE(stored.stat().st_mode) == 0o600 and names.read_text() == "Ada\nGrace\n"
    names.write_text("ada\nAlan\n")
    later, added = make_keys(str(names))
    assert set(added) == {"Alan"} and later["ada"] == hashes["Ada"], "a name in another case is the same person"
    assert set(json.loads(stored.read_text())) == {"ada", "Alan"}, "Grace's link no longer opens the page"
    stored.write_text("[1]")
    with pytest.raises(ValueError, match=r"not a file of keys\. Remove it"):
        make_keys(str(names))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# nobody\n", "has 0 names. Expected 1 to"),
        ("Ada\n" + "x" * 81 + "\n", "line 2: the annotator's name has 81 characters"),
        ("Ada\nGrace\n ADA\u200b\n", "line 3: 'ADA' and 'Ada' are one name"),
    ],
)
def test_file_of_names_is_checked(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "people.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_people(str(tmp_path / "people.txt"))
    with pytest.raises(ValueError, match="no such file"):
        read_people(str(tmp_path / "missing.txt"))


def test_other_machines_need_people() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        assert not is_loopback(host)
        with pytest.raises(ValueError, match=f"--host {host} lets other machines open the page.*Add --people FILE"):
            Serving(host).check()
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        Serving(host).check()
    with pytest.raises(ValueError, match=r"--host 192\.0\.2\.77 is not an address of this machine"):
        bind(None, "192.0.2.77")


def test_host_key_of_an_open_page_only_marks_the_host(tmp_path: Path) -> None:
    """Without people, everybody on this machine may vote, and the host has a key for what only the host may do."""
    access, lines = open_access(Serving(host_key=True), 7860)
    assert access is not None and len(lines) == 1 and "127.0.0.1:7860/?key=" in lines[0]
    assert access.admit("", "127.0.0.1") is None and access.admit("dpo-mm-key-7860=wrong", "127.0.0.1") is None
    host = access.admit(f"dpo-mm-key-7860={lines[0].partition('key=')[2].partition(' ')[0]}", "127.0.0.1")
    assert host is not None and host.headers() == [(b"x-dpo-mm-host", b"1")]
    assert open_access(Serving(), 7860)[0] is None
