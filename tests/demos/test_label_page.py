"""The labelling page in a browser: every key counts once, confirmed votes survive, and hostile prompts are escaped."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from dpo_mm.labels.pairs import open_pairs
from dpo_mm.labels.store import VoteStore
from tests.conftest import noise_image
from tests.unit.labels.test_response_pairs import TEXTS, response_rows

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
    pairs = folder_of_pairs(tmp_path / "pairs", [f"prompt {n}" for n in range(60)])
    server = serve("label", "--pairs", str(pairs), "--votes", str(tmp_path / "votes.sqlite"))
    people = {}
    for name in ("Ada", "Grace"):
        people[name] = browser.new_context().new_page()
        people[name].set_default_timeout(60_000)
        begin(people[name], server.address, name)
    cast = dict.fromkeys(people, 0)
    for number in range(10):
        for name, page in people.items():
            before = presentation_of(page)
            page.keyboard.press(("ArrowLeft", "ArrowRight")[number % 2])
            if number % 5 == 0:
                page.keyboard.press("ArrowLeft")
            page.wait_for_function(
                "b => document.querySelector('[data-presentation]')?.dataset.presentation !== b", arg=before
            )
            if number % 5 == 0:
                page.wait_for_timeout(1100)  # the page ignores a second key for the same pair for a second
            cast[name] += 1
    for page in people.values():
        page.context.close()
    votes = VoteStore(tmp_path / "votes.sqlite", [f"{n:03}" for n in range(60)], source=str(pairs)).votes()
    presentations = {(vote.annotator, vote.pair, vote.is_repeat) for vote in votes}
    assert len(presentations) == len(votes)
    for name, count in cast.items():
        assert count <= sum(vote.annotator == name for vote in votes) <= count + 2


def test_label_page_killed_server_loses_no_confirmed_vote(serve: Callable[..., Any], page: Any, tmp_path: Path) -> None:
    pairs = folder_of_pairs(tmp_path / "pairs", [f"prompt {n}" for n in range(20)])
    command = ("label", "--pairs", str(pairs), "--votes", str(tmp_path / "votes.sqlite"))
    server = serve(*command)
    begin(page, server.address, "Ada")
    for _ in range(4):
        press(page, "ArrowRight")
    server.kill()
    page.evaluate("localStorage.clear()")
    begin(page, serve(*command).address, "Ada")
    votes = VoteStore(tmp_path / "votes.sqlite", [f"{n:03}" for n in range(20)], source=str(pairs)).votes()
    assert len(votes) == 4
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


def test_label_page_shows_ratings_to_those_who_have_finished(
    serve: Callable[..., Any], page: Any, tmp_path: Path
) -> None:
    """It catches ratings that are shown before the last vote, or that allow an undo after them."""
    server = serve("label", "--pairs", str(folder_of_pairs(tmp_path / "set", ["one", "two", "three", "four"])))
    begin(page, server.address, "Ada")
    page.get_by_text("Ratings of the models").click()
    page.get_by_text("The ratings are shown when you have labelled all pairs").wait_for()
    page.get_by_text("Ratings of the models").click()
    store = VoteStore(tmp_path / "labels.sqlite", open_pairs(str(tmp_path / "set"))["id"], source=str(tmp_path / "set"))
    for _ in range(4):
        presented = store.next_pair("Ada")
        assert presented is not None
        press(page, "ArrowRight" if presented.swapped else "ArrowLeft")
    assert "choices" not in page.locator(".finished").inner_text(), "counts of a and b would tell the models apart"
    page.get_by_text("Ratings of the models").click()
    page.locator(".ratings tbody tr").first.wait_for()
    lines = page.locator(".ratings tbody tr").all_inner_texts()
    assert lines[0].startswith("a") and "4 / 0 / 0" in lines[0] and "0 / 0 / 4" in lines[1]
    page.keyboard.press("u")
    page.get_by_text("votes can no longer be undone").last.wait_for()
    assert len(store.votes()) == 4


def test_two_browsers_with_one_name_lose_no_vote_and_are_told(
    serve: Callable[..., Any], browser: Any, page: Any, tmp_path: Path
) -> None:
    """Two browsers vote in turn under one name, then two tabs of one browser do. It catches a shared open pair."""
    pairs = folder_of_pairs(tmp_path / "pairs", [f"prompt {n}" for n in range(40)])
    server = serve("label", "--pairs", str(pairs), "--votes", str(tmp_path / "votes.sqlite"))
    store = VoteStore(tmp_path / "votes.sqlite", [f"{n:03}" for n in range(40)], source=str(pairs))
    begin(page, server.address, "José")
    assert page.locator(".notice").count() == 0
    other = browser.new_context().new_page()
    begin(other, server.address, "  JOSE\u0301\u200b")
    assert "Another browser votes or has voted as" in other.locator(".notice").inner_text()
    for _ in range(3):
        assert presentation_of(page) != presentation_of(other)
        press(page, "ArrowLeft")
        press(other, "ArrowRight")
    assert page.locator(".notice").is_visible()
    votes = store.votes()
    assert len(votes) == 6 and {vote.annotator for vote in votes} == {"José"}
    tab = page.context.new_page()
    tab.goto(server.address)
    tab.locator(".pair").wait_for()
    assert presentation_of(tab) == presentation_of(page), "tabs of one browser share its open pair"
    for first, second in ((page, tab), (tab, page)):
        press(first, "ArrowLeft")
        second.wait_for_function(
            "expected => document.querySelector('.pair')?.dataset.presentation === expected", arg=presentation_of(first)
        )
    assert len(store.votes()) == 8
    shown = int(presentation_of(page))
    assert store.cast("José", shown, "tie")
    page.keyboard.press("ArrowLeft")
    page.get_by_text("This pair already had your vote").wait_for()
    assert len(store.votes()) == 9
    other.context.close()


def test_keys_in_fields_do_not_vote(serve: Callable[..., Any], page: Any, tmp_path: Path) -> None:
    """It catches fields in shadow roots, code that cannot be edited, selections, and keys with a modifier."""
    server = serve("label", "--pairs", str(folder_of_pairs(tmp_path / "set", ["one", "two"])))
    begin(page, server.address, "Ada")
    shown = presentation_of(page)
    page.evaluate("""() => {
      const host = document.body.appendChild(document.createElement("div"));
      const root = host.attachShadow({mode: "open"});
      root.innerHTML = "<div><input id=inside></div>";
      for (const html of ["<textarea id=text></textarea>", "<div id=free contenteditable>x</div>", "<div id=plain contenteditable=plaintext-only>x</div>", "<select id=list><option>b<option>s</select>"])
        document.body.insertAdjacentHTML("beforeend", html);
    }""")
    for field in ("#inside", "#text", "#free", "#plain", "#list"):
        page.locator(field).focus()
        for key in ("b", "s", "u", "ArrowLeft", "ArrowDown"):
            page.keyboard.press(key)
    page.get_by_text("From votes to a trained adapter").click()
    page.locator("#command .cm-line").first.click()
    for key in ("b", "ArrowLeft"):
        page.keyboard.press(key)
    page.locator("h1").click()
    for key in ("Shift+ArrowRight", "Control+s", "Alt+b", "Meta+u"):
        page.keyboard.press(key)
    assert presentation_of(page) == shown
    assert not VoteStore(tmp_path / "labels.sqlite", ["000", "001"], source=str(tmp_path / "set")).votes()
    press(page, "b")
    votes = VoteStore(tmp_path / "labels.sqlite", ["000", "001"], source=str(tmp_path / "set")).votes()
    assert [vote.choice for vote in votes] == ["both_bad"], "a key outside of fields votes"


def test_vote_that_cannot_be_saved_stays_on_the_page(serve: Callable[..., Any], page: Any, tmp_path: Path) -> None:
    server = serve("label", "--pairs", str(folder_of_pairs(tmp_path / "set", ["one", "two", "three"])))
    begin(page, server.address, "Ada")
    press(page, "ArrowLeft")
    shown = presentation_of(page)
    votes = tmp_path / "labels.sqlite"
    for file in tmp_path.glob("labels.sqlite*"):
        file.rename(tmp_path / f"away-{file.name}")
    page.keyboard.press("ArrowLeft")
    page.get_by_text("labels.sqlite: this file is missing").first.wait_for()
    assert presentation_of(page) == shown and str(tmp_path) not in page.locator(".toast-wrap").inner_text()
    page.reload()
    page.locator(".alert").wait_for()
    assert "this file is missing" in page.locator(".alert").inner_text() and not votes.exists()
    for file in tmp_path.glob("away-*"):
        file.rename(tmp_path / file.name.removeprefix("away-"))
    page.reload()
    page.locator(".pair").wait_for()
    assert presentation_of(page) == shown
    press(page, "ArrowLeft")


def test_people_vote_by_their_link_under_their_name(
    serve: Callable[..., Any], browser: Any, page: Any, tmp_path: Path
) -> None:
    """It catches a name that the browser sends and that counts, and a key in the vote file or in the output."""
    pairs = folder_of_pairs(tmp_path / "set", ["one", "two", "three"])
    (tmp_path / "people.txt").write_text("Ada\nGrace\n")
    server = serve("label", "--pairs", str(pairs), "--host", "0.0.0.0", "--people", "people.txt")
    keys = dict(re.findall(r"^(\w+): http://\S+\?key=(\S+)$", server.process.stdout, re.M))
    assert set(keys) == {"Ada", "Grace"}
    assert page.request.get(server.address).status == 401
    address = server.address.replace("127.0.0.1", "127.0.0.2")
    page.goto(address)
    page.evaluate("localStorage.setItem('dpo-mm-annotator', 'Grace')")
    page.goto(f"{address}/?key={keys['Ada']}")
    page.locator(".pair").wait_for()
    assert "key" not in page.url and page.locator(".progress-line").inner_text().startswith("Ada")
    page.evaluate("document.querySelector('[data-annotator]').dataset.annotator = 'Grace'")
    press(page, "ArrowLeft")
    page.get_by_text("From votes to a trained adapter").click()
    assert not page.locator("#leave").is_visible()
    votes = VoteStore(tmp_path / "labels.sqlite", ["000", "001", "002"], source=str(pairs)).votes()
    assert [vote.annotator for vote in votes] == ["Ada"]
    written = b"".join(file.read_bytes() for file in tmp_path.glob("labels.sqlite*")) + server.process.stderr.encode()
    assert not any(key.encode() in written for key in keys.values())
    assert all(server.process.stdout.count(key) == 1 for key in keys.values())


def test_responses_are_labelled_and_trained_on(
    serve: Callable[..., Any], page: Any, tmp_path: Path, run_command: Callable[..., str]
) -> None:
    """Keys vote on pairs of responses, and `train` takes the exported rows unchanged."""
    pairs = response_rows(tmp_path / "set")
    server = serve("label", "--pairs", pairs)
    begin(page, server.address, "Ada")
    assert page.locator("h1").inner_text() == "Which response is better?"
    assert page.locator(".side mark").count() >= 2 and page.locator(".sources img").count() == 1
    for _ in range(len(TEXTS)):
        press(page, "ArrowLeft")
    page.locator(".finished").wait_for()
    run_command("label", "export", "labels.sqlite", "--output", "rows.parquet")
    assert pd.read_parquet(tmp_path / "rows.parquet")["probability"].tolist() == [1.0] * len(TEXTS)
    (tmp_path / "train.yaml").write_text("model: page-reader\nbeta: 0.1\nsteps: 1\nbatch_size: 2\nlora_rank: 2\n")
    run_command("train", "train.yaml", "--pairs", "rows.parquet", "--output-dir", "run")
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


LOOKS = {"wide": {"width": 1280, "height": 720}, "phone": {"width": 390, "height": 844}}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("kind", ["images", "responses"])
def test_label_page_fits_the_screen(
    kind: str, look: str, serve_once: Callable[..., Any], browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """It catches a page that scrolls, and a tap on a phone that does not enlarge an image to the width of the screen."""
    folder = tmp_path_factory.getbasetemp() / "looks"
    if not folder.exists():
        folder_of_pairs(folder / "images", ["one", "two"])
        response_rows(folder / "responses")
    server = serve_once("label", "--pairs", str(folder / kind), "--votes", str(folder / f"{kind}.sqlite"))
    context = browser.new_context(viewport=LOOKS[look], has_touch=look == "phone", is_mobile=look == "phone")
    page = context.new_page()
    begin(page, server.address, look)
    assert page.evaluate(
        "[document.documentElement.scrollHeight <= innerHeight, document.documentElement.scrollWidth <= innerWidth]"
    ) == [True, True]
    assert "0 votes by 0 people" in page.locator(".progress-line").text_content()
    size = lambda: page.locator(".pair .frame img").first.bounding_box()["width"]
    if look == "wide":
        assert kind == "responses" or size() > 440
    else:
        assert size() > 170
        page.locator(".pair .frame").first.tap()
        assert size() > 350 and page.locator("#choose-left").bounding_box()["y"] < LOOKS[look]["height"] - 60
        page.locator("#choose-left").tap()
        page.get_by_text(f"{look}: 1 of").wait_for()
        assert "1 vote by 1 person on 1 pair" in page.locator(".progress-line").text_content()
    context.close()
