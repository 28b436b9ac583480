"""The world of coloured shapes: prompts in GenEval's six categories, and scenes drawn to satisfy them.

A prompt is a `SceneSpec` in words, a `Scene` is where everything stands, `render` draws it with anti-aliasing.
What a picture really shows is for `dpo_mm.judges.scene` to say; it looks at pixels alone.

Source of the categories: GenEval (Ghosh et al. 2023, 2310.11513): single object, two objects, counting, colours,
position, colour attribution. Departure: a single object has a size here ("a big star"), so that there is something
to hold out.
"""

from __future__ import annotations

import itertools
import math
import re
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
    """So many objects of one kind; colour and size None where the prompt leaves them open."""

    shape: str
    count: int = 1
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class SceneSpec:
    """What a prompt asks for: the objects, all of them, and where the first stands from the second."""

    category: str
    objects: tuple[ObjectSpec, ...]
    relation: str | None = None


@dataclass(frozen=True)
class SceneObject:
    """One drawn object: centre (x, y) and side of its bounding box in pixels, colour as painted."""

    shape: str
    colour: str
    x: float
    y: float
    size: float
    rgb: tuple[int, int, int]


class HasCentre(Protocol):
    """Whatever has a centre."""

    @property
    def x(self) -> float: ...
    @property
    def y(self) -> float: ...


@dataclass(frozen=True)
class Scene:
    """Objects on a background that runs from `top` to `bottom` (RGB, 0-255)."""

    things: tuple[SceneObject, ...]
    top: tuple[int, int, int]
    bottom: tuple[int, int, int]


def plural(shape: str) -> str:
    return {"cross": "crosses"}.get(shape, shape + "s")


def describe(request: SceneSpec) -> str:
    """The prompt of a request, in English."""

    def words(wanted: ObjectSpec) -> str:
        kind = wanted.shape if wanted.count == 1 else plural(wanted.shape)
        number = {value: word for word, value in COUNTS.items()}.get(wanted.count)
        adjectives = [word for word in (wanted.size, wanted.colour) if word]
        article = number or ("an" if (adjectives or [kind])[0][0] in "aeiou" else "a")
        return " ".join([article, *adjectives, kind])

    return f" {request.relation or 'and'} ".join(words(wanted) for wanted in request.objects)


_PHRASE = re.compile(
    rf"(?P<number>an?|{'|'.join(COUNTS)})(?: (?P<size>{'|'.join(SIZES)}))?(?: (?P<colour>{'|'.join(COLOURS)}))?"
    rf" (?P<shape>{'|'.join(itertools.chain.from_iterable((plural(s), s) for s in SHAPES))})"
)


def parse(prompt: str) -> SceneSpec:
    """The request that a prompt of this world states. Raises ValueError for any other prompt."""
    relation = next((r for r in RELATIONS if f" {r} " in prompt), None)
    objects = []
    for phrase in re.split(rf" (?:and|{'|'.join(RELATIONS)}) ", prompt.strip()):
        match = _PHRASE.fullmatch(phrase)
        if match is None:
            raise ValueError(
                f"prompt {prompt!r} is not of the world of shapes: {phrase!r} should read like "
                "'a red circle', 'a big star' or 'three crosses'; other prompts need another judge"
            )
        shape = next(s for s in SHAPES if match["shape"] in (s, plural(s)))
        objects.append(ObjectSpec(shape, COUNTS.get(match["number"], 1), match["colour"], match["size"]))
    return SceneSpec(_category(objects, relation), tuple(objects), relation)


def _category(objects: list[ObjectSpec], relation: str | None) -> str:
    if relation:
        return "position"
    if len(objects) > 1:
        return "colour attribution" if objects[0].colour else "two objects"
    if objects[0].count > 1:
        return "counting"
    return "colours" if objects[0].colour else "single object"


def requests() -> list[SceneSpec]:
    """Every request of the world, in a fixed order."""
    found = [SceneSpec("single object", (ObjectSpec(s, size=z),)) for s in SHAPES for z in SIZES]
    found += [SceneSpec("two objects", (ObjectSpec(a), ObjectSpec(b))) for a, b in itertools.permutations(SHAPES, 2)]
    for shape, count in itertools.product(SHAPES, COUNTS.values()):
        found += [SceneSpec("counting", (ObjectSpec(shape, count, colour),)) for colour in (None, *COLOURS)]
    found += [SceneSpec("colours", (ObjectSpec(s, colour=c),)) for s in SHAPES for c in COLOURS]
    pairs = list(itertools.permutations(SHAPES, 2))
    colours = list(itertools.permutations(COLOURS, 2))
    for (a, b), relation in itertools.product(pairs, RELATIONS):
        found.append(SceneSpec("position", (ObjectSpec(a), ObjectSpec(b)), relation))
    for (a, b), (c, d) in itertools.product(pairs, colours):
        found.append(SceneSpec("colour attribution", (ObjectSpec(a, colour=c), ObjectSpec(b, colour=d))))
    return found


def split(seed: int = 0) -> tuple[list[str], list[str]]:
    """Prompts to train on and prompts held out, disjoint in their combinations (a fifth of each category is held out).

    "a circle and a square" and "a square and a circle" are one combination, as are a relation and its mirror.
    """
    groups: dict[str, dict[object, list[str]]] = {category: {} for category in CATEGORIES}
    for request in requests():
        groups[request.category].setdefault(combination(request), []).append(describe(request))
    train, held_out = [], []
    for number, category in enumerate(CATEGORIES):
        keys = sorted(groups[category], key=str)
        order = np.random.default_rng((seed, number)).permutation(len(keys))
        cut = max(1, len(keys) // 5)
        held_out += [prompt for i in order[:cut] for prompt in groups[category][keys[i]]]
        train += [prompt for i in order[cut:] for prompt in groups[category][keys[i]]]
    return train, held_out


def combination(request: SceneSpec) -> object:
    """What a request combines, the same for all ways to word it."""
    mirrored = {"right of": "left of", "below": "above"}.get(request.relation or "")
    objects = request.objects[::-1] if mirrored else request.objects
    if request.relation:
        return (mirrored or request.relation, objects)
    return (None, tuple(sorted(objects, key=str)))


def sample_scene(request: SceneSpec, rng: np.random.Generator) -> Scene:
    """A scene that satisfies the request: free colours, sizes and places drawn from `rng`."""
    wanted = [one for one in request.objects for _ in range(one.count)]
    while True:
        things: list[SceneObject] = []
        shared = rng.choice(list(COLOURS))
        for one in wanted:
            thing = _place(one, things, len(wanted), shared, rng)
            if thing is None:
                break
            things.append(thing)
        if len(things) == len(wanted) and (request.relation is None or holds(request.relation, things[0], things[1])):
            return Scene(tuple(things), *_background(rng))


def _place(
    one: ObjectSpec, others: list[SceneObject], total: int, shared: str, rng: np.random.Generator
) -> SceneObject | None:
    low, high = SIZES[one.size] if one.size else {1: (20, 34), 2: (18, 25), 3: (16, 22)}.get(total, (16, 19))
    colour = one.colour or (shared if one.count > 1 and rng.random() < 0.7 else rng.choice(list(COLOURS)))
    for _ in range(30):
        size = rng.uniform(low, high)
        x, y = rng.uniform(size / 2 + 2, SIZE - size / 2 - 2, 2)
        if all(max(abs(x - o.x), abs(y - o.y)) > (size + o.size) / 2 + 4 for o in others):
            return SceneObject(one.shape, str(colour), x, y, size, _tint(COLOURS[str(colour)], rng))
    return None


def _tint(rgb: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int, int]:
    """The colour as painted: somewhere between itself and a duller shade of itself."""
    dull = rng.uniform(0, 0.35)
    grey = sum(rgb) / 3
    r, g, b = (round(value + dull * (grey - value)) for value in rgb)
    return r, g, b


def _background(rng: np.random.Generator) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """A light neutral, plain or running to another shade from top to bottom."""
    light = rng.uniform(185, 252)
    other = light if rng.random() < 0.5 else float(np.clip(light + rng.uniform(-50, 50), 170, 252))
    return tuple(3 * [round(light)]), tuple(3 * [round(other)])  # type: ignore[return-value]


def holds(relation: str, first: HasCentre, second: HasCentre) -> bool:
    """Whether `first` stands so from `second`: clearly (8 pixels), and more that way than across it."""
    dx, dy = first.x - second.x, first.y - second.y
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along >= 8 and along >= abs(across)


def outline(shape: str, x: float, y: float, size: float) -> list[tuple[float, float]]:
    """The polygon of a shape whose bounding box has its centre at (x, y) and this side."""
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
    """The scene as a 64x64 RGB image, anti-aliased by drawing `oversample` times larger and averaging."""
    ramp = np.linspace(np.array(scene.top), np.array(scene.bottom), SIZE * oversample)[:, None, :]
    canvas = np.broadcast_to(ramp, (SIZE * oversample, SIZE * oversample, 3)).round().astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(canvas))
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        points = outline(thing.shape, thing.x, thing.y, thing.size)
        pen.polygon([(px * oversample - 0.5, py * oversample - 0.5) for px, py in points], fill=thing.rgb)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)
