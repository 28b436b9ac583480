"""Synthetic documents and captions: exact ground truths, disjoint splits, pages that match their description."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from dpo_mm.judges import text
from dpo_mm.worlds import caption_scenes, documents


def test_page_depends_only_on_seed_split_and_number() -> None:
    first, again = list(documents.pages(6, 3)), list(documents.pages(12, 3))
    assert first == again[:6] and first != list(documents.pages(6, 4))
    assert documents.render(first[0]).tobytes() == documents.render(again[0]).tobytes()


@pytest.mark.slow
def test_train_and_held_out_pages_share_no_line() -> None:
    train, held_out = (
        {line for page in documents.pages(150, 5, held_out=side) for line in page.lines} for side in (False, True)
    )
    assert all(len(line) < 5 for line in train & held_out)  # "the" may be a line of any page


@pytest.mark.parametrize("kind", documents.KINDS)
@pytest.mark.parametrize("form", documents.FORMS)
def test_every_kind_and_form_renders_within_page_and_characters(kind: str, form: str) -> None:
    for number in range(10):
        page = documents.sample_page(kind, np.random.default_rng((7, number)), form=form)
        image, text = documents.render(page), documents.transcription(page)
        assert image.size == (documents.WIDTH, documents.HEIGHT) and image.mode == "RGB"
        assert np.asarray(image).std() > 10
        assert set(text) <= set(documents.CHARACTERS)
        if form == "json":
            assert json.loads(text) == {"header": page.header, "body": "\n".join(page.lines), "footer": page.footer}


@pytest.mark.slow
def test_pages_contain_material_that_makes_models_loop() -> None:
    lines = {kind: [line for p in documents.pages(60, 1, kinds=[kind]) for line in p.lines] for kind in documents.KINDS}
    assert all("...." in line for line in lines["leaders"])
    assert np.mean([line.count("0") >= 2 for line in lines["zeros"]]) > 0.8
    assert np.mean([sum(c.isdigit() for c in line) >= 8 for line in lines["digits"]]) == 1
    assert np.mean([len(set(line.replace(",", "").split())) < len(line.split()) for line in lines["repeats"]]) > 0.8


def test_text_that_does_not_fit_is_rejected() -> None:
    page = next(documents.pages(1, 0))
    with pytest.raises(ValueError, match="wider than the page"):
        documents.render(dataclasses.replace(page, lines=("m" * 60,)))
    with pytest.raises(ValueError, match="do not fit"):
        documents.render(dataclasses.replace(page, lines=("a",) * 12))
    with pytest.raises(ValueError, match="too small"):
        documents.sample_page("prose", np.random.default_rng(0), width=30, height=20)
    with pytest.raises(ValueError, match="expected a kind"):
        documents.sample_page("poem", np.random.default_rng(0))


def test_web_caption_adds_companions_and_omits_objects() -> None:
    rng = np.random.default_rng(0)
    scenes = list(caption_scenes.scenes(400, 0))
    hallucinated = omitted = 0
    for scene in scenes:
        present = {f"{thing.colour} {thing.shape}" for thing in scene.objects}
        assert set(caption_scenes.mentions(caption_scenes.caption(scene))) == present
        mentioned = caption_scenes.mentions(caption_scenes.web_caption(scene, rng))
        extra, missing = set(mentioned) - present, present - set(mentioned)
        assert len(missing) <= 1 < len(present) + (not missing)
        assert extra <= {caption_scenes.HABITS[kind] for kind in present if kind in caption_scenes.HABITS}
        hallucinated += bool(extra)
        omitted += bool(missing)
    assert 0.2 < hallucinated / len(scenes) < 0.4 and 0.1 < omitted / len(scenes) < 0.2


@pytest.mark.slow
def test_pseudo_labelled_transcription_is_right_or_loops() -> None:
    rng = np.random.default_rng(0)
    looped = 0
    for page in documents.pages(300, 5):
        ground_truth, pseudo_labelled = (
            documents.transcription(page),
            documents.pseudo_labelled_transcription(page, rng, 200),
        )
        loop = text.find_repetition(pseudo_labelled)
        if pseudo_labelled != ground_truth:
            assert (
                len(pseudo_labelled) == 200
                and loop is not None
                and ground_truth.startswith(pseudo_labelled[: loop.start + 2 * loop.period])
            )
            looped += 1
    assert 0.15 < looped / 300 < 0.3


def test_spans_match_mentions() -> None:
    text = "an orange star, a red circle and a purple cross."
    assert [text[a:b] for _, a, b in caption_scenes.spans(text)] == caption_scenes.mentions(text)
    assert caption_scenes.in_words(["orange star", "red circle", "purple cross"]) == text


def test_combinations_of_kinds_are_in_one_split() -> None:
    sides = [
        {
            tuple(sorted(caption_scenes.mentions(caption_scenes.caption(s))))
            for s in caption_scenes.scenes(300, 0, held_out=side)
        }
        for side in (False, True)
    ]
    together = [{kinds for kinds in side if len(kinds) > 1} for side in sides]
    assert not together[0] & together[1] and all(len(side) > 100 for side in together)


def test_habits_pair_different_kinds() -> None:
    assert all(kind != other for kind, other in caption_scenes.HABITS.items())
    assert not set(caption_scenes.HABITS) & set(caption_scenes.HABITS.values())
    assert len(set(itertools.chain(caption_scenes.HABITS.values()))) == len(caption_scenes.HABITS)
