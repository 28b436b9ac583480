"""The worlds of documents and captions: exact truths, disjoint sides, pages that are what they say."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from dpo_mm.judges import text
from dpo_mm.worlds import caption_scenes, documents


def test_a_page_depends_on_its_seed_side_and_number_alone() -> None:
    first, again = list(documents.pages(6, 3)), list(documents.pages(12, 3))
    assert first == again[:6] and first != list(documents.pages(6, 4))
    assert documents.render(first[0]).tobytes() == documents.render(again[0]).tobytes()


@pytest.mark.slow
def test_train_and_held_out_pages_share_no_line() -> None:
    train, held_out = (
        {line for page in documents.pages(400, 5, held_out=side) for line in page.lines} for side in (False, True)
    )
    assert all(len(line) < 5 for line in train & held_out)  # "the" may stand alone on any page


@pytest.mark.parametrize("kind", documents.KINDS)
@pytest.mark.parametrize("form", documents.FORMS)
def test_every_kind_and_form_is_drawn_within_its_page_and_characters(kind: str, form: str) -> None:
    for number in range(10):
        page = documents.sample_page(kind, np.random.default_rng((7, number)), form=form)
        image, text = documents.render(page), documents.transcription(page)
        assert image.size == (documents.WIDTH, documents.HEIGHT) and image.mode == "RGB"
        assert np.asarray(image).std() > 10
        assert set(text) <= set(documents.CHARACTERS)
        if form == "json":
            assert json.loads(text) == {"header": page.header, "body": "\n".join(page.lines), "footer": page.footer}


def test_the_pages_hold_what_makes_readers_loop() -> None:
    lines = {kind: [line for p in documents.pages(60, 1, kinds=[kind]) for line in p.lines] for kind in documents.KINDS}
    assert all("...." in line for line in lines["leaders"])
    assert np.mean([line.count("0") >= 2 for line in lines["zeros"]]) > 0.8
    assert np.mean([sum(c.isdigit() for c in line) >= 8 for line in lines["digits"]]) == 1
    assert np.mean([len(set(line.replace(",", "").split())) < len(line.split()) for line in lines["repeats"]]) > 0.8


def test_what_does_not_fit_is_refused() -> None:
    page = next(documents.pages(1, 0))
    with pytest.raises(ValueError, match="wider than the page"):
        documents.render(dataclasses.replace(page, lines=("m" * 60,)))
    with pytest.raises(ValueError, match="do not fit"):
        documents.render(dataclasses.replace(page, lines=("a",) * 12))
    with pytest.raises(ValueError, match="too small"):
        documents.sample_page("prose", np.random.default_rng(0), width=30, height=20)
    with pytest.raises(ValueError, match="expected a kind"):
        documents.sample_page("poem", np.random.default_rng(0))


def test_a_caption_names_all_that_is_there_and_a_web_caption_adds_habits_and_leaves_out() -> None:
    rng = np.random.default_rng(0)
    scenes = list(caption_scenes.scenes(400, 0))
    invented = left_out = 0
    for scene in scenes:
        there = {f"{thing.colour} {thing.shape}" for thing in scene.things}
        assert set(caption_scenes.mentions(caption_scenes.caption(scene))) == there
        said = caption_scenes.mentions(caption_scenes.web_caption(scene, rng))
        extra, missing = set(said) - there, there - set(said)
        assert len(missing) <= 1 < len(there) + (not missing)
        assert extra <= {caption_scenes.HABITS[kind] for kind in there if kind in caption_scenes.HABITS}
        invented += bool(extra)
        left_out += bool(missing)
    assert 0.2 < invented / len(scenes) < 0.4 and 0.1 < left_out / len(scenes) < 0.2


def test_a_silver_transcription_is_right_or_lost_in_a_run_of_the_page() -> None:
    rng = np.random.default_rng(0)
    lost = 0
    for page in documents.pages(300, 5):
        truth, silver = documents.transcription(page), documents.pseudo_labelled_transcription(page, rng, 200)
        loop = text.find_repetition(silver)
        if silver != truth:
            assert len(silver) == 200 and loop is not None and truth.startswith(silver[: loop.start + 2 * loop.period])
            lost += 1
    assert 0.15 < lost / 300 < 0.3


def test_mentions_are_where_spans_say() -> None:
    text = "an orange star, a red circle and a purple cross."
    assert [text[a:b] for _, a, b in caption_scenes.spans(text)] == caption_scenes.mentions(text)
    assert caption_scenes.in_words(["orange star", "red circle", "purple cross"]) == text


def test_kinds_that_stand_together_are_of_one_side() -> None:
    sides = [
        {
            tuple(sorted(caption_scenes.mentions(caption_scenes.caption(s))))
            for s in caption_scenes.scenes(300, 0, held_out=side)
        }
        for side in (False, True)
    ]
    together = [{kinds for kinds in side if len(kinds) > 1} for side in sides]
    assert not together[0] & together[1] and all(len(side) > 100 for side in together)


def test_habits_are_of_different_kinds() -> None:
    assert all(kind != other for kind, other in caption_scenes.HABITS.items())
    assert not set(caption_scenes.HABITS) & set(caption_scenes.HABITS.values())
    assert len(set(itertools.chain(caption_scenes.HABITS.values()))) == len(caption_scenes.HABITS)
