"""Synthetic shapes: prompts in GenEval's six categories, and rendered scenes that satisfy them.

A `SceneSpec` is what a prompt describes, a `Scene` contains the positions of all objects, and `render` renders it with
anti-aliasing. `dpo_mm.judges.scene` detects what an image really shows, from its pixels.

Source of the categories: GenEval (Ghosh et al. 2023, 2310.11513): single object, two objects, counting, colours,
position, colour attribution. Departure: a single object has a size here ("a big star"), so that there is something
to hold out.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (222, 42, 42),
    "orange": (245, 140, 25),
    "yellow": (240, 212, 40),
    "green": (46, 165, 72),
    "blue": (45, 90, 220),
    "purple": (150, 55, 190),
}
COUNTS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")
SIZES = {"big": (28, 36), "small": (14, 18)}
CATEGORIES = ("single object", "two objects", "counting", "colours", "position", "colour attribution")


@dataclass(frozen=True)
class ObjectSpec:
    """A number of objects of one kind. Colour and size are None if the prompt does not specify them."""

    shape: str
    count: int = 1
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class SceneSpec:
    """Content of a prompt: all objects, and the position of the first relative to the second."""

    category: str
    objects: tuple[ObjectSpec, ...]
    relation: str | None = None


@dataclass(frozen=True)
class SceneObject:
    """An object of a scene.

    Attributes:
        shape, colour: names.
        x, y: centre of the bounding box, in pixels.
        size: edge of the bounding box, in pixels.
        rgb: painted colour, 0-255.
    """

    shape: str
    colour: str
    x: float
    y: float
    size: float
    rgb: tuple[int, int, int]


class HasCentre(Protocol):
    """Protocol of an object with a centre."""

    @property
    def x(self) -> float: ...
    @property
    def y(self) -> float: ...


@dataclass(frozen=True)
class Scene:
    """Objects on a background gradient from `top` to `bottom` (RGB, 0-255)."""

    objects: tuple[SceneObject, ...]
    top: tuple[int, int, int]
    bottom: tuple[int, int, int]


def plural(shape: str) -> str:
    """Plural of a shape's name."""
    return {"cross": "crosses"}.get(shape, shape + "s")


def describe(spec: SceneSpec) -> str:
    """Write the prompt of a scene."""

    def phrase(wanted: ObjectSpec) -> str:
        noun = wanted.shape if wanted.count == 1 else plural(wanted.shape)
        number = {value: word for word, value in COUNTS.items()}.get(wanted.count)
        adjectives = [word for word in (wanted.size, wanted.colour) if word]
        article = number or ("an" if (adjectives or [noun])[0][0] in "aeiou" else "a")
        return " ".join([article, *adjectives, noun])

    return f" {spec.relation or 'and'} ".join(phrase(wanted) for wanted in spec.objects)


_PHRASE = re.compile(
    rf"(?P<number>an?|{'|'.join(COUNTS)})(?: (?P<size>{'|'.join(SIZES)}))?(?: (?P<colour>{'|'.join(COLOURS)}))?"
    rf" (?P<shape>{'|'.join(itertools.chain.from_iterable((plural(s), s) for s in SHAPES))})"
)


def parse(prompt: str) -> SceneSpec:
    """Parse a prompt of the synthetic shapes.

    Raises:
        ValueError: if the prompt is any other text.
    """
    relation = next((r for r in RELATIONS if f" {r} " in prompt), None)
    objects = []
    for phrase in re.split(rf" (?:and|{'|'.join(RELATIONS)}) ", prompt.strip()):
        match = _PHRASE.fullmatch(phrase)
        if match is None:
            raise ValueError(
                f"prompt {prompt!r} is not a prompt of the synthetic shapes: {phrase!r} is not a phrase like "
                "'a red circle', 'a big star' or 'three crosses'. Use another judge for other prompts."
            )
        shape = next(s for s in SHAPES if match["shape"] in (s, plural(s)))
        objects.append(ObjectSpec(shape, COUNTS.get(match["number"], 1), match["colour"], match["size"]))
    return SceneSpec(_category(objects, relation), tuple(objects), relation)


def check_prompts(prompts: Iterable[str]) -> None:
    """Raise ValueError for the first prompt that is not a prompt of the synthetic shapes."""
    for prompt in prompts:
        parse(prompt)


def _category(objects: list[ObjectSpec], relation: str | None) -> str:
    if relation:
        return "position"
    if len(objects) > 1:
        return "colour attribution" if objects[0].colour else "two objects"
    if objects[0].count > 1:
        return "counting"
    return "colours" if objects[0].colour else "single object"


def all_specs() -> list[SceneSpec]:
    """List every possible spec, in a fixed order."""
    specs = [SceneSpec("single object", (ObjectSpec(s, size=z),)) for s in SHAPES for z in SIZES]
    specs += [SceneSpec("two objects", (ObjectSpec(a), ObjectSpec(b))) for a, b in itertools.permutations(SHAPES, 2)]
    for shape, count in itertools.product(SHAPES, COUNTS.values()):
        specs += [SceneSpec("counting", (ObjectSpec(shape, count, colour),)) for colour in (None, *COLOURS)]
    specs += [SceneSpec("colours", (ObjectSpec(s, colour=c),)) for s in SHAPES for c in COLOURS]
    pairs = list(itertools.permutations(SHAPES, 2))
    colours = list(itertools.permutations(COLOURS, 2))
    for (a, b), relation in itertools.product(pairs, RELATIONS):
        specs.append(SceneSpec("position", (ObjectSpec(a), ObjectSpec(b)), relation))
    for (a, b), (c, d) in itertools.product(pairs, colours):
        specs.append(SceneSpec("colour attribution", (ObjectSpec(a, colour=c), ObjectSpec(b, colour=d))))
    return specs


def split(seed: int = 0) -> tuple[list[str], list[str]]:
    """Split all prompts into training and held-out prompts with disjoint combinations.

    A fifth of each category is held out. "a circle and a square" and "a square and a circle" are one combination, as
    are a relation and its mirror image.
    """
    groups: dict[str, dict[object, list[str]]] = {category: {} for category in CATEGORIES}
    for spec in all_specs():
        groups[spec.category].setdefault(combination(spec), []).append(describe(spec))
    train, held_out = [], []
    for number, category in enumerate(CATEGORIES):
        keys = sorted(groups[category], key=str)
        order = np.random.default_rng((seed, number)).permutation(len(keys))
        num_held_out = max(1, len(keys) // 5)
        held_out += [prompt for i in order[:num_held_out] for prompt in groups[category][keys[i]]]
        train += [prompt for i in order[num_held_out:] for prompt in groups[category][keys[i]]]
    return train, held_out


def combination(spec: SceneSpec) -> object:
    """Key of the combination in a spec, equal for all its wordings."""
    mirrored = {"right of": "left of", "below": "above"}.get(spec.relation or "")
    objects = spec.objects[::-1] if mirrored else spec.objects
    if spec.relation:
        return (mirrored or spec.relation, objects)
    return (None, tuple(sorted(objects, key=str)))


def sample_scene(spec: SceneSpec, rng: np.random.Generator) -> Scene:
    """Sample a scene that satisfies a spec. Unspecified colours, sizes and positions come from `rng`."""
    wanted = [one for one in spec.objects for _ in range(one.count)]
    while True:
        placed: list[SceneObject] = []
        shared_colour = rng.choice(list(COLOURS))
        for one in wanted:
            scene_object = _sample_object(one, placed, len(wanted), shared_colour, rng)
            if scene_object is None:
                break
            placed.append(scene_object)
        if len(placed) == len(wanted) and (spec.relation is None or holds(spec.relation, placed[0], placed[1])):
            return Scene(tuple(placed), *_background(rng))


def _sample_object(
    wanted: ObjectSpec, placed: list[SceneObject], total: int, shared_colour: str, rng: np.random.Generator
) -> SceneObject | None:
    """Sample an object that does not touch those already placed, or return None after 30 attempts."""
    low, high = SIZES[wanted.size] if wanted.size else {1: (20, 34), 2: (18, 25), 3: (16, 22)}.get(total, (16, 19))
    colour = wanted.colour or (shared_colour if wanted.count > 1 and rng.random() < 0.7 else rng.choice(list(COLOURS)))
    for _ in range(30):
        size = rng.uniform(low, high)
        x, y = rng.uniform(size / 2 + 2, SIZE - size / 2 - 2, 2)
        if all(max(abs(x - o.x), abs(y - o.y)) > (size + o.size) / 2 + 4 for o in placed):
            return SceneObject(wanted.shape, str(colour), x, y, size, _tint(COLOURS[str(colour)], rng))
    return None


def _tint(rgb: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int, int]:
    """Painted colour: between the pure colour and a duller shade of it."""
    dullness = rng.uniform(0, 0.35)
    grey = sum(rgb) / 3
    r, g, b = (round(value + dullness * (grey - value)) for value in rgb)
    return r, g, b


def _background(rng: np.random.Generator) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Light neutral background, plain or a gradient from top to bottom."""
    top = rng.uniform(185, 252)
    bottom = top if rng.random() < 0.5 else float(np.clip(top + rng.uniform(-50, 50), 170, 252))
    return tuple(3 * [round(top)]), tuple(3 * [round(bottom)])  # type: ignore[return-value]


def holds(relation: str, first: HasCentre, second: HasCentre) -> bool:
    """Check if `first` is clearly (8 pixels) in this relation to `second`, and further along it than across it."""
    dx, dy = first.x - second.x, first.y - second.y
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along >= 8 and along >= abs(across)


def outline(shape: str, x: float, y: float, size: float) -> list[tuple[float, float]]:
    """Polygon of a shape whose bounding box is centred at (x, y) with edges of `size`."""
    half = size / 2
    if shape == "circle":
        return [(x + half * math.cos(t), y + half * math.sin(t)) for t in np.linspace(0, 2 * math.pi, 64, False)]
    if shape == "square":
        return [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]
    if shape == "triangle":
        return [(x, y - half), (x + half, y + half), (x - half, y + half)]
    if shape == "cross":
        arm = half * 0.36
        return [
            *[(x - arm, y - half), (x + arm, y - half), (x + arm, y - arm), (x + half, y - arm)],
            *[(x + half, y + arm), (x + arm, y + arm), (x + arm, y + half), (x - arm, y + half)],
            *[(x - arm, y + arm), (x - half, y + arm), (x - half, y - arm), (x - arm, y - arm)],
        ]
    assert shape == "star"
    radii = itertools.cycle((1.0, 0.48))
    points = [(r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5)) for k, r in zip(range(10), radii)]
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    left, wide, up, tall = min(xs), max(xs) - min(xs), min(ys), max(ys) - min(ys)
    return [(x - half + size * (px - left) / wide, y - half + size * (py - up) / tall) for px, py in points]


def render(scene: Scene, *, oversample: int = 4) -> Image.Image:
    """Render a scene as a 64x64 RGB image, anti-aliased by rendering `oversample` times larger and averaging."""
    ramp = np.linspace(np.array(scene.top), np.array(scene.bottom), SIZE * oversample)[:, None, :]
    canvas = np.broadcast_to(ramp, (SIZE * oversample, SIZE * oversample, 3)).round().astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(canvas))
    pen = ImageDraw.Draw(image)
    for item in scene.objects:
        points = outline(item.shape, item.x, item.y, item.size)
        pen.polygon([(px * oversample - 0.5, py * oversample - 0.5) for px, py in points], fill=item.rgb)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)
