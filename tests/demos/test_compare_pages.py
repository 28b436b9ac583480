"""The comparison pages in a browser: generate, upload, and no access to files of the machine."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dpo_mm.assets import resolve_asset
from dpo_mm.config import TrainConfig
from dpo_mm.data.image_files import encode_png
from dpo_mm.policies.families import load_image_policy
from dpo_mm.worlds import shape_edits, shapes
from tests.demos.test_accessibility import OWN, check_looks
from tests.demos.test_foreign_sites import ADDRESS, read_everything
from tests.demos.test_label_page import HOSTILE
from tests.unit.evaluation.test_saved_comparison import finished_run

pytestmark = pytest.mark.slow

CAPTIONER = ("--model", "shapes-captioner", "--adapter", "shapes-captioner-tuned")
"""One small model, so that the page starts sooner than with both bundled models."""
DONE = "() => /Ground truth/.test(document.querySelector('.status')?.innerText ?? '')"


def wait_for_status(page: Any, pattern: str) -> None:
    """Wait until the status matches a regular expression."""
    page.wait_for_function(
        "pattern => new RegExp(pattern).test(document.querySelector('#status')?.innerText ?? '')", arg=pattern
    )


def open_images(page: Any, address: str) -> None:
    """Open the page with images, wait for those that it generates at first, and generate further ones in few steps."""
    page.goto(address)
    wait_for_status(page, "6 of 6")
    page.locator("#steps input[type=number]").fill("2")


def test_images_page_generates_scores_compares_and_is_accessible(serve_once: Callable[..., Any], page: Any) -> None:
    open_images(page, serve_once("images").address)
    check_looks(page, OWN)
    page.get_by_label("Prompt").fill("two purple squares")
    page.get_by_label("Seed").fill("7")
    page.locator("#generate").click()
    wait_for_status(page, "Both from seed 7")
    figures = page.locator("#both figure")
    assert figures.count() == 2
    assert (
        re.search(r"match(es)? the prompt", figures.nth(0).inner_text())
        and "aesthetic score" in figures.nth(1).inner_text()
    )
    sources = [figures.nth(n).locator("img").get_attribute("src") for n in range(2)]
    assert all(source.startswith("data:image/png") for source in sources) and sources[0] != sources[1]

    slider = page.locator("#slider")
    handle = slider.locator("[role=slider], .outer, .inner").first
    before = slider.screenshot()
    box = handle.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 120, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    assert slider.screenshot() != before

    page.locator("#over-seeds").click()
    wait_for_status(page, "4 of 4 seeds generated")
    assert page.locator("#strip figure").count() == 8


def test_images_page_escapes_hostile_prompts(serve_once: Callable[..., Any], page: Any) -> None:
    open_images(page, serve_once("images").address)
    for seed, prompt in enumerate(HOSTILE.values(), start=11):
        page.get_by_label("Prompt").fill(prompt)
        assert len(page.get_by_label("Prompt").input_value()) <= 1000
        page.get_by_label("Seed").fill(str(seed))
        page.locator("#generate").click()
        wait_for_status(page, f"Both from seed {seed}")
        assert page.title() == "Images of base and tuned model" and page.locator("#both img").count() == 2


def test_images_page_edits_an_upload(serve: Callable[..., Any], page: Any, tmp_path: Path) -> None:
    """It catches a page without an upload, one that generates without it, and one that ignores a new upload."""
    policy = load_image_policy("shapes-editor")
    policy.prepare(TrainConfig("shapes-editor", "-", "-", lora_rank=1))
    policy.save(tmp_path / "adapter")
    page.goto(serve("images", "--model", "shapes-editor", "--adapter", "adapter").address)
    page.get_by_label("Prompt").fill("make the star red")
    page.locator("#generate").click()
    page.get_by_text("Upload an image first.").wait_for()
    changed = "([query, old]) => ![undefined, old].includes(document.querySelector(query)?.src)"
    source = edited = None
    for task in shape_edits.tasks(2, seed=0):
        file = {"name": "a.png", "mimeType": "image/png", "buffer": encode_png(shapes.render(task.source))}
        page.locator("input[type=file]").first.set_input_files(file)
        page.wait_for_function(changed, arg=["#source img", source])
        page.get_by_label("Prompt").fill(task.instruction)
        page.locator("#generate").click()
        page.wait_for_function(changed, arg=["#both figure:nth-child(2) img", edited])
        assert "the instruction" in page.locator("#both figure").nth(1).inner_text()
        source, edited = (page.locator(f"{query} img").last.get_attribute("src") for query in ("#source", "#both"))


def test_captions_page_shows_both_responses_and_shaded_tokens_and_is_accessible(
    serve_once: Callable[..., Any], page: Any
) -> None:
    page.goto(serve_once("captions").address)
    page.wait_for_function(DONE)
    response = page.locator(".both-responses .response").first
    assert response.is_visible() and len(response.inner_text()) > 10
    assert page.locator(".shading .shade").count() > 5
    check_looks(page, OWN)
    page.get_by_role("tab", name="OCR model").click()
    page.locator(".examples:visible button").nth(1).click()
    page.wait_for_function(
        "() => [...document.querySelectorAll('.status')].some(s => s.offsetParent && /Ground truth/.test(s.innerText))"
    )


def test_captions_page_refuses_files_that_are_not_images(serve: Callable[..., Any], page: Any, tmp_path: Path) -> None:
    page.goto(serve("captions", *CAPTIONER, "--questions", "scenes-held-out").address)
    page.wait_for_function(DONE)
    (tmp_path / "words.png").write_bytes(b"these are words")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png", compress_level=1)
    with (tmp_path / "large.png").open("wb") as large:
        large.truncate(21_000_000)
    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    chooser = page.locator("input[type=file]").first
    for name, message in (("words", "can’t be used"), ("bomb", "can’t be used"), ("large", "size|large|exceed")):
        chooser.set_input_files(tmp_path / f"{name}.png")
        page.wait_for_function(
            "message => new RegExp(message, 'i').test(document.querySelector('.toast-wrap, .toast-body')?.innerText ?? '')",
            arg=message,
        )
        for close in page.locator(".toast-close").all():
            close.click()
        page.wait_for_function("() => !document.querySelector('.toast-body')")
    chooser.set_input_files(tmp_path / "white.png")
    page.wait_for_function("() => document.querySelector('.both-responses')?.innerText.trim() === ''")
    page.locator(".generate").first.click()
    page.wait_for_function("() => /no ground truth/.test(document.querySelector('.both-responses')?.innerText ?? '')")


@pytest.mark.parametrize("name", ["images", "captions"])
def test_comparison_pages_serve_no_file_of_the_machine(name: str, serve_once: Callable[..., Any], page: Any) -> None:
    server = serve_once(name)
    weights = resolve_asset("shapes-sd-faithful") + "/pytorch_lora_weights.safetensors"
    for full in ("/etc/passwd", weights):
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/"):
            response = page.request.get(server.address + route + full)
            assert response.status >= 400 and b"root:" not in response.body()


@pytest.mark.parametrize(
    ("command", "button"), [(("images",), "#generate"), (("captions", *CAPTIONER), ".generate:visible")]
)
def test_people_open_comparison_pages_by_their_links(
    command: tuple[str, ...], button: str, serve: Callable[..., Any], page: Any, tmp_path: Path
) -> None:
    """It catches a page that takes --people and opens without a link, or an event that needs none."""
    (tmp_path / "people.txt").write_text("Ada\n")
    server = serve(*command, "--host", "0.0.0.0", "--people", "people.txt")
    (key,) = re.findall(r"^Ada: http://\S+\?key=(\S+)$", server.process.stdout, re.M)
    assert page.request.get(server.address).status == 401
    assert page.request.post(f"{server.address}/gradio_api/queue/join", data={}).status == 401
    page.goto(f"{server.address.replace('127.0.0.1', '127.0.0.2')}/?key={key}")
    page.locator(button).first.wait_for()
    assert "key" not in page.url


@pytest.mark.parametrize("name", ["images", "captions"])
def test_visitors_read_no_address_of_an_object(name: str, serve_once: Callable[..., Any], page: Any) -> None:
    """It catches the value and the callback of a state, which Gradio prints into the configuration."""
    assert not ADDRESS.findall(read_everything(page, serve_once(name).address))


def test_images_page_filters_images_of_a_saved_comparison(serve: Callable[..., Any], page: Any, tmp_path: Path) -> None:
    server = serve("images", "--comparison", str(finished_run(tmp_path / "run")))
    page.goto(server.address)
    page.locator("#gallery article").first.wait_for()
    assert page.locator("#gallery article").count() == 3
    assert page.locator("#gallery article h3").nth(2).inner_text() == "a photo of <b>a dog</b>"
    page.locator("#gallery-outcome input").click()
    page.get_by_role("option", name="better").click()
    page.get_by_text("1 of 1 pairs, 3 in all").wait_for()
    article = page.locator("#gallery article")
    assert article.count() == 1 and "a red circle" in article.inner_text()
    assert "does not match the prompt" in article.locator("figure").nth(0).inner_text()
    assert "✓ matches the prompt" in article.locator("figure").nth(1).inner_text()
    page.locator("#gallery-outcome input").click()
    page.get_by_role("option", name="worse").click()
    page.get_by_text("two blue squares").wait_for()
    source = page.locator("#gallery img").first.get_attribute("src")
    assert source.startswith("data:image/png;base64,")
