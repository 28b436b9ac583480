from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dpo_mm.assets import resolve_asset
from dpo_mm.worlds import shapes


def test_parse_inverts_describe_for_every_spec() -> None:
    every = shapes.all_specs()
    prompts = [shapes.describe(request) for request in every]
    assert len(every) == len(set(prompts)) == 845
    assert [shapes.parse(prompt) for prompt in prompts] == every
    assert {"an orange star", "three crosses", "a big circle", "a star left of a cross"} <= set(prompts)


@pytest.mark.parametrize("prompt", ["", "a cat", "a red circle near a star", "seven stars", "a red"])
def test_parse_other_prompt_is_rejected(prompt: str) -> None:
    with pytest.raises(ValueError, match="is not a prompt of the synthetic shapes"):
        shapes.parse(prompt)


def test_split_held_out_combinations_are_not_in_training() -> None:
    train, held_out = shapes.split()
    assert (len(train), len(held_out)) == (676, 169)
    trained = {shapes.combination(shapes.parse(prompt)) for prompt in train}
    assert not [prompt for prompt in held_out if shapes.combination(shapes.parse(prompt)) in trained]
    assert set(Counter(shapes.parse(prompt).category for prompt in held_out)) == set(shapes.CATEGORIES)
    assert shapes.split() == (train, held_out) != shapes.split(1)


def test_bundled_prompts_equal_the_split() -> None:
    train, held_out = shapes.split()
    assert Path(resolve_asset("shapes-train")).read_text().splitlines() == train
    assert Path(resolve_asset("shapes-held-out")).read_text().splitlines() == held_out


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a circle and a star", "a star and a circle"),
        ("a circle left of a star", "a star right of a circle"),
        ("a cross above a star", "a star below a cross"),
        ("a red circle and a blue star", "a blue star and a red circle"),
    ],
)
def test_combination_is_equal_for_two_wordings(one: str, other: str) -> None:
    assert shapes.combination(shapes.parse(one)) == shapes.combination(shapes.parse(other))


def test_sample_scene_satisfies_its_spec() -> None:
    rng = np.random.default_rng(0)
    for request in shapes.all_specs()[::5]:
        scene = shapes.sample_scene(request, rng)
        wanted = [(one.shape, one.colour) for one in request.objects for _ in range(one.count)]
        assert [thing.shape for thing in scene.objects] == [shape for shape, _ in wanted]
        assert all(colour in (None, thing.colour) for thing, (_, colour) in zip(scene.objects, wanted, strict=True))
        for n, a in enumerate(scene.objects):
            assert all(a.size / 2 < place < 64 - a.size / 2 for place in (a.x, a.y))
            gaps = [max(abs(a.x - b.x), abs(a.y - b.y)) - (a.size + b.size) / 2 for b in scene.objects[:n]]
            assert all(gap > 4 for gap in gaps)
        if request.relation:
            assert shapes.holds(request.relation, *scene.objects)


def test_holds_requires_a_clear_relation() -> None:
    def at(x: float, y: float) -> shapes.SceneObject:
        return shapes.SceneObject("star", "red", x, y, 10, (255, 0, 0))

    assert shapes.holds("left of", at(10, 30), at(40, 30)) and not shapes.holds("left of", at(40, 30), at(10, 30))
    assert shapes.holds("above", at(30, 10), at(30, 40)) and not shapes.holds("below", at(30, 10), at(30, 40))
    assert not shapes.holds("left of", at(10, 10), at(40, 60))
    assert not shapes.holds("left of", at(30, 30), at(36, 30))


def test_render_is_deterministic_and_anti_aliased() -> None:
    request = shapes.parse("a big circle")
    one, two = (shapes.render(shapes.sample_scene(request, np.random.default_rng(4))) for _ in range(2))
    assert np.array_equal(np.asarray(one), np.asarray(two)) and one.size == (64, 64)
    scene = shapes.Scene((shapes.SceneObject("circle", "red", 32.0, 32.0, 30.0, (255, 0, 0)),), (255,) * 3, (255,) * 3)
    green = np.asarray(shapes.render(scene))[..., 1]
    assert 40 < ((green > 20) & (green < 235)).sum() < 200
    assert (green < 20).sum() == pytest.approx(np.pi * 15**2, rel=0.08)
