"""The world of drawings: scenes of one to three things that people recognise, on a plain background.

    rng = np.random.default_rng(0)
    scene = sample_scene(rng)
    image, text = render(scene), drawing_prompts.caption(scene, rng)

A `Scene` has all positions as fractions of the image's edge, so it renders at any size. A `SceneRequest` is the content of a
prompt, and `satisfies` tells whether a scene, rendered or detected, is what a request describes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image

from dpo_mm.worlds.drawing_sprites import (
    BACKGROUNDS,
    colours,
    names,
    sprite,
    usual_colour,
    visible_backgrounds,
)

SIZE = 64
MAX_THINGS = 3
RELATIONS = ("left of", "right of", "above", "below", "next to")
MIRRORED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", "next to": "next to"}
LAYOUTS = {
    "across": ((0.265, 0.5), (0.735, 0.5)),
    "down": ((0.5, 0.265), (0.5, 0.735)),
    "heap": ((0.5, 0.26), (0.26, 0.73), (0.74, 0.73)),
    "fan": ((0.26, 0.27), (0.74, 0.27), (0.5, 0.74)),
}
"""Centres of two or three things."""
JITTER = {"across": (0.02, 0.17), "down": (0.17, 0.02), "heap": (0.025, 0.025), "fan": (0.025, 0.025)}
"""Largest distance of a thing from its centre, in x and y."""
HELD_OUT_PAIRS, HELD_OUT_PAINTS = 1 / 10, 1 / 7
"""Fraction of the pairs of names, and of the painted things, that are held out."""

Kind = tuple[str, str | None]
T = TypeVar("T")


class HasKindAndCentre(Protocol):
    """Protocol of a thing in a scene. The name is None if it is not recognised."""

    @property
    def name(self) -> str | None: ...
    @property
    def colour(self) -> str | None: ...
    @property
    def x(self) -> float: ...
    @property
    def y(self) -> float: ...


class HasThings(Protocol):
    """Protocol of a scene, rendered or detected. It has several backgrounds if their colours cannot be told apart."""

    @property
    def things(self) -> Sequence[HasKindAndCentre]: ...
    @property
    def backgrounds(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Thing:
    """A drawing in a scene.

    Attributes:
        name, colour: which drawing, and its colour. None: as published.
        x, y: centre, as fractions of the image's edge.
        side: edge of its square, likewise.
    """

    name: str
    colour: str | None
    x: float
    y: float
    side: float


@dataclass(frozen=True)
class Scene:
    """Things on a background, later ones in front. shade: levels of 255 added to the background's RGB."""

    things: tuple[Thing, ...]
    background: str
    shade: tuple[int, int, int] = (0, 0, 0)

    @property
    def backgrounds(self) -> tuple[str, ...]:
        """Return the background, as `HasThings` has it."""
        return (self.background,)


@dataclass(frozen=True)
class ThingRequest:
    """A number of things of one kind. The colour is None if the prompt does not specify it."""

    name: str
    count: int = 1
    colour: str | None = None


@dataclass(frozen=True)
class SceneRequest:
    """Content of a prompt: all things, the position of the first relative to the second, and the background."""

    things: tuple[ThingRequest, ...]
    relation: str | None = None
    background: str | None = None

    @property
    def category(self) -> str:
        """Kind of prompt, for reports."""
        if self.relation:
            return "position"
        if len(self.things) > 1:
            return ("two kinds", "three kinds")[len(self.things) - 2]
        return "several of a kind" if self.things[0].count > 1 else "one thing"


def render(scene: Scene, *, size: int = SIZE) -> Image.Image:
    """Render a scene as an RGB image with edges of `size` pixels."""
    background = np.clip(np.array(BACKGROUNDS[scene.background]) + scene.shade, 0, 255).astype(np.uint16)
    canvas = np.empty((size, size, 3), np.uint16)
    canvas[:] = background
    for thing in scene.things:
        side = max(6, round(thing.side * size))
        light, through = sprite(thing.name, thing.colour, side)
        left, top = round(thing.x * size - side / 2), round(thing.y * size - side / 2)
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, size), min(top + side, size)
        inside = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
        canvas[y0:y1, x0:x1] = light[inside] + (canvas[y0:y1, x0:x1] * through[inside] + 127) // 255
    return Image.fromarray(np.minimum(canvas, 255).astype(np.uint8))


def sample_scene(rng: np.random.Generator) -> Scene:
    """Sample a scene: one thing (34 %), two or three of a kind (20 %), two kinds (30 %), three things (16 %)."""
    choice = int(np.searchsorted((0.34, 0.54, 0.84, 0.94), rng.random(), side="right"))
    count = (1, int(rng.integers(2, 4)), 2, 3, 3)[choice]
    chosen: list[str] = []
    while len(chosen) < (1, 1, 2, 3, 2)[choice]:
        name = _pick(names(), rng)
        if name not in chosen:
            chosen.append(name)
    kinds = [(name, _sample_colour(name, rng)) for name in chosen]
    if choice == 1:
        kinds = kinds * count
    elif choice == 4:
        kinds = [kinds[0], kinds[0], kinds[1]] if rng.random() < 0.5 else [kinds[1], kinds[0], kinds[0]]
    layout = _pick({2: ("across", "down"), 3: ("heap", "fan")}[count], rng) if count > 1 else None
    return _place(kinds, layout, _sample_background(kinds, rng), rng)


def scene_of(request: SceneRequest, rng: np.random.Generator) -> Scene:
    """Sample a scene that satisfies a request. Unspecified colours are the usual ones, the rest comes from `rng`.

    Raises:
        ValueError: if the request has more than three things.
    """
    kinds: list[Kind] = [
        (wanted.name, wanted.colour or usual_colour(wanted.name))
        for wanted in request.things
        for _ in range(wanted.count)
    ]
    check_count(len(kinds))
    background = request.background or _sample_background(kinds, rng)
    if len(kinds) != 2:
        layout = _pick(("heap", "fan"), rng) if kinds[1:] else None
        return _place(kinds, layout, background, rng)
    relation = request.relation
    if relation is None:
        layout = _pick(("across", "down"), rng)
    else:
        layout = "down" if relation in ("above", "below") else "across"
    if relation in ("right of", "below") or (relation in (None, "next to") and rng.random() < 0.5):
        kinds = kinds[::-1]
    return _place(kinds, layout, background, rng)


def check_count(count: int) -> None:
    """Raise ValueError if a request has more things than a scene can hold."""
    if count > MAX_THINGS:
        raise ValueError(f"it has {count} things, but a scene holds at most {MAX_THINGS}. Remove some of them")


def _place(kinds: Sequence[Kind], layout: str | None, background: str, rng: np.random.Generator) -> Scene:
    """Place things of these kinds at the centres of a layout, or one thing near the middle, with random offsets."""

    def offset(largest: float) -> float:
        return float(rng.uniform(-largest, largest))

    things = []
    if layout is None:
        side = float(rng.uniform(0.60, 0.84))
        margin = (1 - side) / 2 - 0.02
        things.append(Thing(*kinds[0], 0.5 + offset(margin), 0.5 + offset(margin), side))
    else:
        is_alike = len(set(kinds)) == 1
        shared = float(rng.uniform(0.39, 0.46))
        largest_x, largest_y = JITTER[layout]
        for (name, colour), (x, y) in zip(kinds, LAYOUTS[layout], strict=True):
            side = shared + offset(0.015) if is_alike else float(rng.uniform(0.39, 0.47))
            things.append(Thing(name, colour, x + offset(largest_x), y + offset(largest_y), side))
    red, green, blue = (int(level) for level in rng.integers(-7, 8, 3))
    return Scene(tuple(things), background, (red, green, blue))


def _pick(options: Sequence[T], rng: np.random.Generator) -> T:
    return options[int(rng.integers(len(options)))]


def _sample_colour(name: str, rng: np.random.Generator) -> str | None:
    """Sample a colour for a paintable drawing in 55 % of the cases. Otherwise it has its usual one."""
    options = colours(name)
    return _pick(options, rng) if len(options) > 1 and rng.random() < 0.55 else usual_colour(name)


def _sample_background(kinds: Sequence[Kind], rng: np.random.Generator) -> str:
    """Sample a background on which all of the things show."""
    common = [b for b in visible_backgrounds(*kinds[0]) if all(b in visible_backgrounds(*kind) for kind in kinds[1:])]
    return _pick(common or tuple(BACKGROUNDS), rng)


def relation_of(first: HasKindAndCentre, second: HasKindAndCentre) -> str:
    """Position of the first thing relative to the second, along the axis on which they are further apart."""
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dx) >= abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def holds(relation: str, first: HasKindAndCentre, second: HasKindAndCentre) -> bool:
    """Check if `first` is in this relation to `second`. "next to" is left or right."""
    position = relation_of(first, second)
    return position == relation or (relation == "next to" and position in ("left of", "right of"))


def matches(thing: HasKindAndCentre, wanted: ThingRequest) -> bool:
    """Check if a thing is of the requested kind. An unspecified colour is the usual one."""
    usual = usual_colour(wanted.name)
    return thing.name == wanted.name and (thing.colour or usual) == (wanted.colour or usual)


def satisfies(scene: HasThings, request: SceneRequest) -> bool:
    """Check if a scene has exactly the things of a request, in their positions and on its background."""
    unmatched = list(scene.things)
    first_matches: list[HasKindAndCentre] = []
    for wanted in request.things:
        fitting = [thing for thing in unmatched if matches(thing, wanted)][: wanted.count]
        if len(fitting) < wanted.count:
            return False
        unmatched = [thing for thing in unmatched if not any(thing is match for match in fitting)]
        first_matches.append(fitting[0])
    if unmatched or request.background not in (None, *scene.backgrounds):
        return False
    return request.relation is None or holds(request.relation, *first_matches[:2])


def is_held_out(things: Sequence[Thing | ThingRequest]) -> bool:
    """Check if a scene or prompt has a held-out combination: two names together, or a thing painted in a colour.

    A hash of the words decides, so the combinations are the same everywhere.
    """
    distinct = sorted({thing.name for thing in things})
    pairs = [f"{a}+{b}" for number, a in enumerate(distinct) for b in distinct[number + 1 :]]
    painted = {
        f"{thing.colour} {thing.name}" for thing in things if thing.colour not in (None, usual_colour(thing.name))
    }
    return any(_fraction(pair) < HELD_OUT_PAIRS for pair in pairs) or any(
        _fraction(text) < HELD_OUT_PAINTS for text in painted
    )


def _fraction(text: str) -> float:
    """Hash of a text, in [0, 1)."""
    return int.from_bytes(hashlib.md5(text.encode(), usedforsecurity=False).digest()[:4], "big") / 2**32
