from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dpo_mm.judges.scene import detect_objects, faithfulness, satisfies
from dpo_mm.worlds import shapes
from dpo_mm.worlds.shapes import ObjectSpec, SceneSpec

COUNT = 600


def scenes(count: int) -> list[tuple[SceneSpec, Image.Image]]:
    """Specs of all categories in turn, each with a rendered scene."""
    rng = np.random.default_rng(0)
    groups = [[spec for spec in shapes.all_specs() if spec.category == category] for category in shapes.CATEGORIES]
    specs = [groups[n % 6][rng.integers(len(groups[n % 6]))] for n in range(count)]
    return [(spec, shapes.render(shapes.sample_scene(spec, rng))) for spec in specs]


@pytest.fixture(scope="module")
def truths() -> list[tuple[SceneSpec, Image.Image]]:
    return scenes(COUNT)


def right(truths: list[tuple[SceneSpec, Image.Image]], change: Callable[[Image.Image], Image.Image]) -> float:
    return float(np.mean([satisfies(change(image), request) for request, image in truths]))


def jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return Image.open(buffer)


def blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(0.7))


def noisy(image: Image.Image) -> Image.Image:
    noise = np.random.default_rng(1).normal(0, 8, (64, 64, 3))
    return Image.fromarray((np.asarray(image) + noise).round().clip(0, 255).astype(np.uint8))


def test_satisfies_accepts_some_rendered_scenes() -> None:
    assert right(scenes(180), lambda image: image) >= 0.99


@pytest.mark.slow
def test_satisfies_accepts_rendered_scenes(truths: list[tuple[SceneSpec, Image.Image]]) -> None:
    assert len(truths) == COUNT
    assert right(truths, lambda image: image) >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("damage", [jpeg, blurred, noisy])
def test_satisfies_tolerates_light_damage(
    damage: Callable[[Image.Image], Image.Image], truths: list[tuple[SceneSpec, Image.Image]]
) -> None:
    assert right(truths, damage) >= 0.97


def wrong(request: SceneSpec, rng: np.random.Generator) -> SceneSpec:
    """Change one attribute of a spec so that none of its scenes satisfies the original."""
    while True:
        which = int(rng.integers(len(request.objects)))
        one, others = request.objects[which], request.objects[:which] + request.objects[which + 1 :]
        kind = rng.choice(["shape", "colour", "count", "relation", "size", "extra"])
        if kind == "shape":
            changed = dataclasses.replace(one, shape=str(rng.choice([s for s in shapes.SHAPES if s != one.shape])))
        elif kind == "colour" and one.colour:
            changed = dataclasses.replace(one, colour=str(rng.choice([c for c in shapes.COLOURS if c != one.colour])))
        elif kind == "count" and not request.relation and len(request.objects) == 1 and one.count > 1:
            changed = dataclasses.replace(one, count=one.count - 1)
        elif kind == "size" and one.size:
            changed = dataclasses.replace(one, size="small" if one.size == "big" else "big")
        elif kind == "relation" and request.relation:
            opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
            return dataclasses.replace(request, relation=opposite[request.relation])
        elif kind == "extra" and len(request.objects) == 1 and one.count < 4:
            return dataclasses.replace(request, objects=(one, ObjectSpec(str(rng.choice(shapes.SHAPES)))))
        else:
            continue
        if sorted(map(str, (changed, *others))) != sorted(map(str, request.objects)):
            return dataclasses.replace(
                request, objects=(*request.objects[:which], changed, *request.objects[which + 1 :])
            )


@pytest.mark.slow
def test_satisfies_rejects_scenes_with_one_error(truths: list[tuple[SceneSpec, Image.Image]]) -> None:
    rng = np.random.default_rng(2)
    rejected = []
    for request, _ in truths:
        image = shapes.render(shapes.sample_scene(wrong(request, rng), rng))
        rejected.append(not satisfies(image, request))
    assert len(rejected) == COUNT and np.mean(rejected) >= 0.99


def test_satisfies_rejects_blank_and_noisy_images() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for image in (Image.new("RGB", (64, 64), "white"), Image.new("RGB", (64, 64), "red"), noise):
        assert not any(satisfies(image, request) for request in shapes.all_specs()[::7])


def test_detect_objects_returns_positions_and_sizes() -> None:
    things = (
        shapes.SceneObject("star", "yellow", 20, 18, 24, shapes.COLOURS["yellow"]),
        shapes.SceneObject("square", "blue", 45, 46, 20, shapes.COLOURS["blue"]),
    )
    seen = {one.shape: one for one in detect_objects(shapes.render(shapes.Scene(things, (240,) * 3, (200,) * 3)))}
    assert set(seen) == {"star", "square"}
    assert (seen["star"].colour, seen["square"].colour) == ("yellow", "blue")
    assert (seen["square"].x, seen["square"].y) == pytest.approx((45, 46), abs=1)
    assert seen["star"].width == pytest.approx(24, abs=2)


def test_faithfulness_rejects_an_additional_smudge() -> None:
    image = shapes.render(
        shapes.Scene((shapes.SceneObject("circle", "red", 20, 20, 24, (222, 42, 42)),), (240,) * 3, (240,) * 3)
    )
    assert faithfulness([image], ["a red circle"]) == [1.0]
    image.paste((45, 90, 220), (50, 40, 54, 62))
    assert faithfulness([image], ["a red circle"]) == [0.0]


def test_detect_objects_other_size_is_rejected() -> None:
    with pytest.raises(ValueError, match="image is 32x32"):
        detect_objects(Image.new("RGB", (32, 32)))
