from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dpo_mm.assets import resolve_asset
from dpo_mm.data.prompts import read_prompt_set
from dpo_mm.worlds import drawing_prompts, drawings
from dpo_mm.worlds.drawing_sprites import (
    BACKGROUNDS,
    HUES,
    colours,
    kinds,
    names,
    painted,
    sprite,
    usual_colour,
    visible_backgrounds,
)
from dpo_mm.worlds.drawings import Scene, SceneRequest, Thing, ThingRequest


def scenes(count: int) -> list[tuple[Scene, np.random.Generator]]:
    rng = np.random.default_rng(0)
    return [(drawings.sample_scene(rng), rng) for _ in range(count)]


def prompts_of(name: str) -> list[str]:
    return [prompt.text for prompt in read_prompt_set(name).prompts]


def test_parse_reads_every_caption_of_a_scene_as_a_request_that_the_scene_satisfies() -> None:
    categories = set()
    for scene, rng in scenes(600):
        text = drawing_prompts.caption(scene, rng)
        request = drawing_prompts.parse(text)
        assert drawings.satisfies(scene, request), text
        assert drawings.satisfies(drawings.scene_of(request, rng), request), text
        assert drawings.is_held_out(request.things) == drawings.is_held_out(scene.things), text
        categories.add(request.category)
    assert categories == set(drawing_prompts.CATEGORIES)


def test_parse_inverts_describe_in_all_wordings() -> None:
    rng = np.random.default_rng(1)
    for scene, _ in scenes(200):
        content = drawing_prompts.content_of(scene)
        wordings = {drawing_prompts.describe(content)} | {drawing_prompts.describe(content, rng) for _ in range(8)}
        assert all(drawing_prompts.parse(text) == content for text in wordings), wordings


def test_parse_takes_synonyms_and_colours() -> None:
    request = SceneRequest((ThingRequest("pine tree"), ThingRequest("apple", 1, "red")), "below", "orange")
    assert drawing_prompts.parse("one pine tree beneath a red apple against an orange background") == request
    assert drawing_prompts.parse("A pair of octopuses.").things == (ThingRequest("octopus", 2),)
    assert drawing_prompts.describe(SceneRequest((ThingRequest("umbrella"),))) == "an umbrella"
    assert drawing_prompts.describe(SceneRequest((ThingRequest("unicorn"),))) == "a unicorn"


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("", "'' is not a phrase like"),
        ("a penguin and a dragon", "'a dragon' is not a phrase like"),
        ("a photo of a cat", "'a photo of a cat' is not a phrase like"),
        ("a blue lion", "there is no blue lion. Leave the colour out"),
        ("a yellow pig", "there is no yellow pig. It comes in pink"),
        ("three cats and a dog", "it has 4 things, but a scene holds at most 3"),
        ("two cats left of a dog", "'left of' needs one thing on each side"),
    ],
)
def test_parse_other_prompt_is_rejected(prompt: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"is not a prompt of the drawings: {reason}"):
        drawing_prompts.parse(prompt)


def test_satisfies_needs_every_part_of_a_request() -> None:
    cat, apple = Thing("cat", "orange", 0.25, 0.5, 0.4), Thing("apple", "red", 0.75, 0.5, 0.4)
    scene = Scene((cat, apple), "blue")
    for right in ("a cat and an apple", "an apple right of a cat on blue", "a cat next to a red apple"):
        assert drawings.satisfies(scene, drawing_prompts.parse(right)), right
    for wrong in (
        "a cat",
        "a cat and a pear",
        "two cats and an apple",
        "a blue cat and an apple",
        "a cat right of an apple",
        "a cat above an apple",
        "a cat and an apple on white",
    ):
        assert not drawings.satisfies(scene, drawing_prompts.parse(wrong)), wrong


def test_held_out_combinations_are_never_in_training_prompts_or_pairs() -> None:
    train, held_out = prompts_of("drawings-train"), prompts_of("drawings-held-out")
    pairs = pq.read_table(resolve_asset("drawings-faithfulness"), columns=["prompt"])["prompt"].to_pylist()
    assert (len(train), len(held_out), len(pairs)) == (1200, 300, 495)
    assert not any(drawings.is_held_out(drawing_prompts.parse(prompt).things) for prompt in train + pairs)
    assert all(drawings.is_held_out(drawing_prompts.parse(prompt).things) for prompt in held_out)


def test_is_held_out_counts_pairs_of_names_and_paints() -> None:
    things = [ThingRequest(name) for name in names()]
    pairs = [(a, b) for n, a in enumerate(things) for b in things[n + 1 :]]
    paints = [ThingRequest(name, 1, colour) for name, colour in kinds() if colour != usual_colour(name)]
    assert np.mean([drawings.is_held_out(pair) for pair in pairs]) == pytest.approx(1 / 10, abs=0.01)
    assert np.mean([drawings.is_held_out([thing]) for thing in paints]) == pytest.approx(1 / 7, abs=0.03)
    assert not any(drawings.is_held_out([thing, thing]) for thing in things)
    assert all(drawings.is_held_out(pair) == drawings.is_held_out(pair[::-1]) for pair in pairs[::50])


@pytest.mark.parametrize(("name", "count"), [("train", 1200), pytest.param("held-out", 300, marks=pytest.mark.slow)])
def test_bundled_prompts_are_those_of_sample_prompts(name: str, count: int) -> None:
    expected = drawing_prompts.sample_prompts(count, 0, held_out=name == "held-out")
    with Path(resolve_asset(f"drawings-{name}")).open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert rows == [[prompt, drawing_prompts.parse(prompt).category] for prompt in expected]


def test_scene_of_places_things_as_requested() -> None:
    rng = np.random.default_rng(2)
    for relation in drawings.RELATIONS:
        request = SceneRequest((ThingRequest("cow"), ThingRequest("bee")), relation, "pink")
        for _ in range(20):
            scene = drawings.scene_of(request, rng)
            cow, bee = sorted(scene.things, key=lambda thing: thing.name != "cow")
            assert drawings.holds(relation, cow, bee) and scene.background == "pink"
    with pytest.raises(ValueError, match="at most 3"):
        drawings.scene_of(SceneRequest((ThingRequest("cow", 4),)), rng)


def test_render_draws_sprites_at_any_size_on_the_background() -> None:
    scene = Scene((Thing("sun", None, 0.5, 0.5, 0.5),), "black")
    for size in (64, 128):
        pixels = np.asarray(drawings.render(scene, size=size))
        assert pixels.shape == (size, size, 3) and tuple(pixels[0, 0]) == BACKGROUNDS["black"]
        assert pixels[size // 2, size // 2, 0] > 200
    cut = drawings.render(Scene((Thing("sun", None, 0.0, 1.0, 0.5),), "black"))
    assert np.asarray(cut)[-1, 0, 0] > 200


def test_paint_turns_the_main_hue_and_leaves_the_outline() -> None:
    assert len(names()) == 119 and len(kinds()) == 269
    blue, red = painted("apple", "blue").astype(int), painted("apple", "red").astype(int)
    solid = red[..., 3] > 250
    assert red[solid, 0].mean() > red[solid, 2].mean() + 50 and blue[solid, 2].mean() > blue[solid, 0].mean() + 50
    assert np.array_equal(blue[..., 3], red[..., 3]) and np.array_equal(painted("apple", None), painted("apple", "red"))
    assert colours("lion") == () and colours("frog") == ("green",) and colours("apple") == tuple(HUES)
    with pytest.raises(ValueError, match="a lion cannot be painted blue"):
        sprite("lion", "blue", 20)


def test_visible_backgrounds_leave_out_the_drawings_own_colour() -> None:
    assert set(BACKGROUNDS) - set(visible_backgrounds("banana", None)) == {"orange", "yellow"}
    assert set(BACKGROUNDS) - set(visible_backgrounds("pig", "pink")) == {"pink"}
