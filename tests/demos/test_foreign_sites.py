"""Another site in a real browser, next to the label page: it reads nothing, votes for nobody and shows no frame."""

from __future__ import annotations

import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_mm.labels.store import VoteStore
from tests.browser import CHROMIUM
from tests.demos.test_label_page import begin, folder_of_pairs, presentation_of, press

pytestmark = pytest.mark.slow

ATTACK = """async ([base, data, events]) => {
  const done = [];
  const attempt = async (name, action) => { try { done.push([name, await action()]); } catch (error) { done.push([name, null]); } };
  await attempt("config", async () => (await (await fetch(base + "/config")).json()).components.length);
  for (const kind of ["application/json", "text/plain"])
    for (const mode of ["cors", "no-cors"])
      await attempt("vote", async () => (await fetch(base + "/gradio_api/queue/join", {method: "POST", mode, credentials: "include",
        headers: {"content-type": kind}, body: JSON.stringify({data, fn_index: events.vote, session_hash: "attack"})})).ok);
  await attempt("stream", () => new Promise((resolve, reject) => { const source = new EventSource(base + "/gradio_api/queue/data?session_hash=attack");
    source.onopen = () => resolve(true); source.onerror = reject; }));
  await attempt("socket", () => new Promise((resolve, reject) => { const socket = new WebSocket(base.replace("http", "ws") + "/gradio_api/queue/join");
    socket.onopen = () => resolve(true); socket.onerror = reject; }));
  return done.filter(([name, result]) => result).map(([name]) => name);
}"""


FORM = """([action, start]) => {
  const form = document.body.appendChild(document.createElement("form")), input = form.appendChild(document.createElement("input"));
  Object.assign(form, {method: "post", enctype: "text/plain", action});
  Object.assign(input, {name: start, value: '"}'});
  form.submit();
}"""
"""A form whose body is JSON: the name, an equals sign and the value."""


class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<h1>another site</h1>")

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""


@pytest.fixture
def site_port() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_another_site_reads_nothing_and_casts_no_vote(
    serve: Callable[..., Any], page: Any, browser: Any, tmp_path: Path, site_port: int
) -> None:
    """It catches a page of another port of this machine, a form, a frame, and a domain that is rebound to 127.0.0.1."""
    pairs = folder_of_pairs(tmp_path / "pairs", [f"prompt {n}" for n in range(8)])
    server = serve("label", "--pairs", str(pairs), "--votes", str(tmp_path / "votes.sqlite"))
    begin(page, server.address, "Ada")
    config = page.request.get(server.address + "/config").json()
    ids = {c["props"].get("elem_id"): c["id"] for c in config["components"]}
    vote = next(d["id"] for d in config["dependencies"] if [ids["choose-left"], "click"] in d["targets"])
    attack = [server.address, ["Ada", presentation_of(page)], {"vote": vote}]
    for name in ("127.0.0.1", "localhost"):
        site = page.context.new_page()
        site.goto(f"http://{name}:{site_port}/")
        assert [done for done in site.evaluate(ATTACK, attack) if done != "vote"] == []
        body = json.dumps({"data": attack[1], "fn_index": vote, "session_hash": "form"})
        site.evaluate(FORM, [server.address + "/gradio_api/queue/join", body[:-1] + ', "x":"'])
        site.get_by_text("Requests of other sites are not allowed").wait_for()
        site.goto(f"http://{name}:{site_port}/")
        site.set_content(f"<iframe src='{server.address}/'></iframe>")
        site.wait_for_timeout(300)
        assert "Label pairs" not in [frame.title() for frame in site.frames if frame.url.startswith("http")]
        site.close()
    rebound = browser.browser_type.launch(
        executable_path=CHROMIUM, args=["--no-sandbox", "--host-resolver-rules=MAP rebound.example 127.0.0.1"]
    )
    site = rebound.new_page()
    site.goto(server.address.replace("127.0.0.1", "rebound.example") + "/config")
    assert "This page is not served as" in site.locator("body").inner_text()
    assert site.evaluate(ATTACK, ["", *attack[1:]]) == []
    rebound.close()
    store = VoteStore(tmp_path / "votes.sqlite", [f"{n:03}" for n in range(8)], source=str(pairs))
    assert not store.votes() and store.progress("Ada").annotators == 0
    press(page, "ArrowLeft")
    assert len(store.votes()) == 1, "the page itself still votes"


def read_everything(page: Any, address: str) -> str:
    """Return all that a visitor can read: the page, its configuration, and the answers to events without inputs."""
    config = page.request.get(address + "/config")
    texts = [config.text()]
    texts += [page.request.get(address + path).text() for path in ("/", "/gradio_api/info", "/gradio_api/openapi.json")]
    for event in config.json()["dependencies"][:6]:
        body = {"data": [], "fn_index": event["id"], "session_hash": f"session{event['id']}"}
        answer = page.request.post(address + "/gradio_api/queue/join", data=body)
        texts.append(answer.text())
        if answer.ok:
            stream = f"/gradio_api/queue/data?session_hash=session{event['id']}"
            texts.append(page.request.get(address + stream, timeout=60_000).text())
    assert len(texts) > 5
    return "\n".join(texts)


ADDRESS = re.compile(r".{60}\bat 0x[0-9a-f]{6,}|.{60}<function ")


def test_voters_read_no_address_of_an_object(serve_once: Callable[..., Any], page: Any) -> None:
    """It catches initial values and functions that are printed into the configuration, and errors of the code."""
    assert not ADDRESS.findall(read_everything(page, serve_once("label").address))
