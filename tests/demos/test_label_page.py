"""The labelling page in a browser: every key counts once, confirmed votes survive, and hostile prompts are escaped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from dpo_mm.labels.pairs import open_pairs
from dpo_mm.labels.store import VoteStore
from tests.conftest import noise_image

pytestmark = pytest.mark.slow

KEYS = {"left": "ArrowLeft", "right": "ArrowRight", "tie": "ArrowDown", "both_bad": "b", "skip": "s"}
HOSTILE = {
    "script": "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">",
    "style": "<style>body{display:none}</style></div></div>",
    "template": "${document.title='owned'} {{constructor.constructor('document.title=1')()}} `x`",
    "long": "word " * 400,
    "right-to-left": "\u202eevil\u202c שלום",
}


def folder_of_pairs(folder: Path, prompts: list[str]) -> Path:
    """Write images a/N.png and b/N.png with one colour per model, and their prompts."""
    for model, colour in (("a", 0), ("b", 255)):
        (folder / model).mkdir(parents=True)
        for number in range(len(prompts)):
            image = noise_image(number, 64)
            image.paste((colour, number % 256, 128), (0, 0, 32, 64))
            image.save(folder / model / f"{number:03}.png")
    for number, prompt in enumerate(prompts):
        (folder / f"{number:03}.txt").write_text(prompt)
    return folder


def presentation_of(page: Any) -> str:
    return str(page.locator(".pair").get_attribute("data-presentation"))


def press(page: Any, key: str) -> None:
    """Press a key and wait for the next presentation."""
    before = presentation_of(page)
    page.keyboard.press(key)
    page.wait_for_function(
        "before => { const now = document.querySelector('[data-presentation]'); return now && now.dataset.presentation !== before; }",
        arg=before,
    )


def begin(page: Any, address: str, name: str) -> None:
    page.goto(address)
    page.get_by_label("Your name").fill(name)
    page.get_by_role("button", name="Start").click()
    page.locator(".pair").wait_for()


def test_label_page_stores_thirty_votes_with_undo_and_reload(
    serve: Callable[..., Any], page: Any, tmp_path: Path, run_command: Callable[..., str]
) -> None:
    pairs = folder_of_pairs(tmp_path / "pairs", [f"prompt number {n}" for n in range(30)])
    server = serve("label", "--pairs", str(pairs), "--votes", str(tmp_path / "votes.sqlite"))
    begin(page, server.address, "Ada")
    pressed: dict[str, str] = {}
    order = ["left", "right", "tie", "both_bad", "left", "right"]
    for number in range(100):
        if page.locator(".finished").count():
            break
        choice = order[number % len(order)]
        if number == 7:
            press(page, KEYS["left"])
            press(page, "u")
        if number == 12:
            page.reload()
            page.locator(".pair").wait_for()
        pressed[presentation_of(page)] = choice
        press(page, KEYS[choice])
    assert page.locator(".finished").count() == 1
    store = VoteStore(tmp_path / "votes.sqlite", [f"{n:03}" for n in range(30)], source=str(pairs))
    votes = store.votes()
    assert {vote.pair for vote in votes if not vote.is_repeat} == {f"{n:03}" for n in range(30)}
    assert len(votes) == len(pressed) and 2 <= sum(vote.is_repeat for vote in votes) <= 4
    assert all(vote.annotator == "Ada" and vote.seconds >= 0 for vote in votes)
    letters = {True: {"left": "b", "right": "a"}, False: {"left": "a", "right": "b"}}
    expected = list(pressed.values())
    assert [v.choice for v in votes] == [letters[v.swapped].get(c, c) for v, c in zip(votes, expected, strict=True)]
    assert len({vote.swapped for vote in votes}) == 2

    run_command("label", "export", str(tmp_path / "votes.sqlite"), "--output", str(tmp_path / "rows.parquet"))
    rows = pd.read_parquet(tmp_path / "rows.parquet").set_index("id")
    first = {vote.pair: vote.choice for vote in votes if not vote.is_repeat}
    assert rows["preference"].to_dict() == first


def test_label_page_two_people_store_every_vote_once(serve: Callable[..., Any], browser: Any, tmp_path: Path) -> None:
    pairs = folder_of_pairs(tmp_path / "pairs", [f"prompt {n}" for n in range(120)])
    server = serve("label", "--pairs", str(pairs), "--votes", str(tmp_path / "votes.sqlite"))
    people = {}
    for name in ("Ada", "Grace"):
        people[name] = browser.new_context().new_page()
        begin(people[name], server.address, name)
    cast = dict.fromkeys(people, 0)
    for number in range(100):
        for name, page in people.items():
            before = presentation_of(page)
            page.keyboard.press(("ArrowLeft", "ArrowRight")[number % 2])
            if number % 10 == 0:
                page.keyboard.press("ArrowLeft")
            page.wait_for_function(
                "b => document.querySelector('[data-presentation]')?.dataset.presentation !== b", arg=before
            )
            cast[name] += 1
    for page in people.values():
        page.context.close()
    votes = VoteStore(tmp_path / "votes.sqlite", [f"{n:03}" for n in range(120)], source=str(pairs)).votes()
    presentations = {(vote.annotator, vote.pair, vote.is_repeat) for vote in votes}
    assert len(presentations) == len(votes)
    for name, count in cast.items():
        assert count <= sum(vote.annotator == name for vote in votes) <= count + 10


def test_label_page_killed_server_loses_no_confirmed_vote(serve: Callable[..., Any], page: Any, tmp_path: Path) -> None:
    pairs = folder_of_pairs(tmp_path / "pairs", [f"prompt {n}" for n in range(20)])
    command = ("label", "--pairs", str(pairs), "--votes", str(tmp_path / "votes.sqlite"))
    server = serve(*command)
    begin(page, server.address, "Ada")
    for _ in range(8):
        press(page, "ArrowRight")
    server.kill()
    page.evaluate("localStorage.clear()")
    begin(page, serve(*command).address, "Ada")
    votes = VoteStore(tmp_path / "votes.sqlite", [f"{n:03}" for n in range(20)], source=str(pairs)).votes()
    assert len(votes) == 8
    press(page, "ArrowRight")


def test_label_page_escapes_hostile_prompts_and_names(serve: Callable[..., Any], page: Any, tmp_path: Path) -> None:
    pairs = folder_of_pairs(tmp_path / "pairs", list(HOSTILE.values()))
    server = serve("label", "--pairs", str(pairs), "--votes", str(tmp_path / "votes.sqlite"))
    begin(page, server.address, "<img src=x onerror=\"document.title='owned'\">")
    prompts = set()
    for _ in HOSTILE:
        prompt = page.locator(".pair .prompt")
        prompts.add(prompt.inner_text().strip())
        assert page.title() == "Label pairs" and prompt.is_visible()
        assert page.locator(".pair img").count() == 2
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        press(page, "ArrowLeft")
    assert {text.split()[0] for text in prompts} == {text.split()[0] for text in HOSTILE.values()}


def test_label_page_undecodable_image_can_be_skipped(serve: Callable[..., Any], page: Any, tmp_path: Path) -> None:
    pairs = folder_of_pairs(tmp_path / "pairs", ["one", "two"])
    (pairs / "a" / "000.png").write_bytes(b"not an image")
    server = serve("label", "--pairs", str(pairs), "--votes", str(tmp_path / "votes.sqlite"))
    begin(page, server.address, "Ada")
    texts = []
    for _ in range(2):
        texts.append(page.locator(".pair").inner_text())
        press(page, "s")
    assert any("can’t be decoded" in text for text in texts)


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with votes, a secret and a pair to label."""
    folder = tmp_path_factory.mktemp("secrets")
    (folder / ".env").write_text("SECRET=1")
    folder_of_pairs(folder / "pairs", ["one"])
    return folder


@pytest.mark.parametrize("path", ["/etc/passwd", "/proc/self/environ", "votes.sqlite", ".env"])
def test_label_page_serves_no_file_of_the_machine(
    path: str, serve_once: Callable[..., Any], page: Any, secrets: Path
) -> None:
    server = serve_once("label", "--pairs", str(secrets / "pairs"), "--votes", str(secrets / "votes.sqlite"))
    full = path if path.startswith("/") else str(secrets / path)
    assert Path(full).exists()
    for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/", "/gradio_api/proxy="):
        for name in (full, full.lstrip("/"), "../" * 8 + full.lstrip("/"), full.replace("/", "%2F")):
            response = page.request.get(server.address + route + name)
            body = response.body()
            assert response.status >= 400 or b"<!doctype html" in body[:200].lower(), (route, name)
            assert b"root:" not in body and b"SECRET" not in body and b"SQLite format" not in body


def test_label_page_images_are_lossless_png(serve: Callable[..., Any], page: Any, tmp_path: Path) -> None:
    import base64
    import io

    pairs = folder_of_pairs(tmp_path / "pairs", ["one"])
    server = serve("label", "--pairs", str(pairs), "--votes", str(tmp_path / "votes.sqlite"))
    begin(page, server.address, "Ada")
    sources = [page.locator(".pair img").nth(n).get_attribute("src") for n in range(2)]
    shown = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]
    original = [Image.open(pairs / model / "000.png") for model in "ab"]
    assert all(source.startswith("data:image/png") for source in sources)
    assert {image.tobytes() for image in shown} == {image.tobytes() for image in original}


def test_label_page_shows_ratings_after_votes(serve: Callable[..., Any], page: Any, tmp_path: Path) -> None:
    server = serve("label", "--pairs", str(folder_of_pairs(tmp_path / "set", ["one", "two", "three", "four"])))
    begin(page, server.address, "Ada")
    page.get_by_text("Ratings of the models").click()
    page.get_by_text("No vote compares two models").wait_for()
    page.get_by_text("Ratings of the models").click()
    store = VoteStore(tmp_path / "labels.sqlite", open_pairs(str(tmp_path / "set"))["id"], source=str(tmp_path / "set"))
    for _ in range(3):
        presented = store.next_pair("Ada")
        assert presented is not None
        press(page, "ArrowRight" if presented.swapped else "ArrowLeft")
    page.get_by_text("Ratings of the models").click()
    page.locator(".ratings tbody tr").first.wait_for()
    lines = page.locator(".ratings tbody tr").all_inner_texts()
    assert lines[0].startswith("a") and "3 / 0 / 0" in lines[0] and "0 / 0 / 3" in lines[1]
