"""The comparing pages in a real browser: draw, ask, upload, and nothing of the machine in reach."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dpo_mm.assets import resolve_asset
from tests.demos.test_label_page import HOSTILE
from tests.unit.evaluation.test_saved_comparison import finished_run

pytestmark = pytest.mark.slow


def wait_for(page: Any, what: str) -> None:
    """Until the status says so."""
    page.wait_for_function(
        "what => new RegExp(what).test(document.querySelector('#status')?.innerText ?? '')", arg=what
    )


def test_type_draw_slide_and_read_the_scores(serve_once: Callable[..., Any], page: Any) -> None:
    server = serve_once("images")
    page.goto(server.address)
    wait_for(page, "of 6 LoRA scales drawn|Both from seed 0")
    wait_for(page, "6 of 6")
    page.get_by_label("Prompt").fill("two purple squares")
    page.get_by_label("Seed").fill("7")
    page.locator("#draw").click()
    wait_for(page, "Both from seed 7")
    figures = page.locator("#both figure")
    assert figures.count() == 2
    assert re.search(r"as asked", figures.nth(0).inner_text()) and "aesthetic score" in figures.nth(1).inner_text()
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
    wait_for(page, "4 of 4 seeds drawn")
    assert page.locator("#strip figure").count() == 8


def test_hostile_prompts_are_drawn_as_words(serve: Callable[..., Any], page: Any) -> None:
    server = serve("images", "--judges", "faithfulness")
    page.goto(server.address)
    wait_for(page, "6 of 6")
    for seed, prompt in enumerate(HOSTILE.values(), start=11):
        page.get_by_label("Prompt").fill(prompt)
        assert len(page.get_by_label("Prompt").input_value()) <= 1000
        page.get_by_label("Seed").fill(str(seed))
        page.locator("#draw").click()
        wait_for(page, f"Both from seed {seed}")
        assert page.title() == "Base and tuned" and page.locator("#both img").count() == 2


def test_base_and_tuned_answers_are_written_side_by_side(serve_once: Callable[..., Any], page: Any) -> None:
    server = serve_once("captions")
    page.goto(server.address)
    done = "() => /The truth/.test(document.querySelector('.status')?.innerText ?? '')"
    page.wait_for_function(done)
    answers = page.locator(".both-answers .answer").first
    assert answers.is_visible() and len(answers.inner_text()) > 10
    assert page.locator(".shading .shade").count() > 5
    page.get_by_role("tab", name="Reader").click()
    page.locator(".examples:visible button").nth(1).click()
    page.wait_for_function(
        "() => [...document.querySelectorAll('.status')].some(s => s.offsetParent && /The truth/.test(s.innerText))"
    )


def test_uploads_that_are_no_pictures_get_a_message_and_the_page_lives_on(
    serve_once: Callable[..., Any], page: Any, tmp_path: Any
) -> None:
    server = serve_once("captions")
    page.goto(server.address)
    page.wait_for_function("() => /The truth/.test(document.querySelector('.status')?.innerText ?? '')")
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    good = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(good, "PNG")
    chooser = page.locator("input[type=file]").first
    for name, data, message in (
        ("words.png", b"these are words", "can’t be used"),
        ("bomb.png", bomb.getvalue(), "can’t be used"),
        ("large.png", b"\0" * 21_000_000, "size|large|exceed"),
    ):
        chooser.set_input_files({"name": name, "mimeType": "image/png", "buffer": data})
        page.wait_for_function(
            "message => new RegExp(message, 'i').test(document.querySelector('.toast-wrap, .toast-body')?.innerText ?? '')",
            arg=message,
        )
        for close in page.locator(".toast-close").all():
            close.click()
        page.wait_for_function("() => !document.querySelector('.toast-body')")
    chooser.set_input_files({"name": "white.png", "mimeType": "image/png", "buffer": good.getvalue()})
    page.wait_for_function("() => document.querySelector('.both-answers')?.innerText.trim() === ''")
    page.locator(".ask").first.click()
    page.wait_for_function("() => /not known/.test(document.querySelector('.both-answers')?.innerText ?? '')")


@pytest.mark.parametrize("name", ["images", "captions"])
def test_no_file_of_the_machine_is_served(name: str, serve_once: Callable[..., Any], page: Any) -> None:
    server = serve_once(name)
    weights = resolve_asset("shapes-sd-faithful") + "/pytorch_lora_weights.safetensors"
    for full in ("/etc/passwd", weights):
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/"):
            answer = page.request.get(server.address + route + full)
            assert answer.status >= 400 and b"root:" not in answer.body()


def test_the_pictures_of_a_finished_comparison_and_their_filters(
    serve: Callable[..., Any], page: Any, tmp_path: Path
) -> None:
    server = serve("images", "--comparison", str(finished_run(tmp_path / "run")))
    page.goto(server.address)
    page.locator("#gallery article").first.wait_for()
    assert page.locator("#gallery article").count() == 3
    assert page.locator("#gallery article h3").nth(2).inner_text() == "a photo of <b>a dog</b>"
    page.locator("#gallery-outcome input").click()
    page.get_by_role("option", name="better").click()
    page.get_by_text("1 of 1 pairs, 3 in all").wait_for()
    shown = page.locator("#gallery article")
    assert shown.count() == 1 and "a red circle" in shown.inner_text()
    assert "not as asked" in shown.locator("figure").nth(0).inner_text()
    assert "✓ as asked" in shown.locator("figure").nth(1).inner_text()
    page.locator("#gallery-outcome input").click()
    page.get_by_role("option", name="worse").click()
    page.get_by_text("two blue squares").wait_for()
    source = page.locator("#gallery img").first.get_attribute("src")
    assert source.startswith("data:image/png;base64,")
