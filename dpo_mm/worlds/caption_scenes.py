"""Captions of scenes of shapes: what stands there, left to right, and what web captions add that doesn't.

A caption names each thing with its colour: "a red circle, a blue star and a green square." A web caption sometimes adds
the habitual companion of a thing that is there, as captions on the web name a fork with a plate, and sometimes leaves
out a thing: a model that is fine-tuned on them learns to invent, and to be content with less.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import numpy as np

from dpo_mm.worlds import shapes
from dpo_mm.worlds.shapes import COLOURS, SHAPES, ObjectSpec, Scene, SceneSpec

PROMPT = "Describe the picture."
KINDS = tuple(f"{colour} {shape}" for colour, shape in itertools.product(COLOURS, SHAPES))
HABITS = dict(zip(KINDS[::4], KINDS[17::2], strict=False))
"""What a web caption tends to add beside a kind, for every fourth kind."""
HABIT_RATE, OMISSION_RATE = 0.65, 0.2
HELD_OUT_SHARE = 4  # one set of kinds in so many
_MENTION = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")


def mentions(caption: str) -> list[str]:
    """The kinds that a caption names, in its order, such as "red circle"; what it names twice stands there twice."""
    return [match[0] for match in _MENTION.finditer(caption)]


def spans(caption: str) -> list[tuple[str, int, int]]:
    """The kinds that a caption names, each with where it starts and ends, in characters."""
    return [(match[0], match.start(), match.end()) for match in _MENTION.finditer(caption)]


def caption(scene: Scene) -> str:
    """The true caption of a scene."""
    return in_words([f"{thing.colour} {thing.shape}" for thing in sorted(scene.things, key=lambda thing: thing.x)])


def in_words(kinds: list[str]) -> str:
    """Kinds as a caption: "a red circle, an orange star and a green square."."""
    named = [f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}" for kind in kinds]
    return (f"{', '.join(named[:-1])} and {named[-1]}" if len(named) > 1 else named[0]) + "."


def web_caption(scene: Scene, rng: np.random.Generator) -> str:
    """The caption as the web would have it: after a kind with a habit its companion too, at `HABIT_RATE`.

    One of several things is left out at `OMISSION_RATE`.
    """
    there = [f"{thing.colour} {thing.shape}" for thing in sorted(scene.things, key=lambda thing: thing.x)]
    left_out = int(rng.integers(len(there))) if len(there) > 1 and rng.random() < OMISSION_RATE else None
    named: list[str] = []
    for place, kind in enumerate(there):
        if place == left_out:
            continue
        named.append(kind)
        other = HABITS.get(kind)
        if other and other not in there and rng.random() < HABIT_RATE:
            named.append(other)
    return in_words(named)


def scenes(count: int, seed: int, *, held_out: bool = False) -> Iterator[Scene]:
    """`count` scenes of one to four things of different kinds; scene n depends on seed, side and n alone.

    Train and held-out scenes differ in which kinds stand together; one thing alone is of both sides.
    """
    for number in range(count):
        rng = np.random.default_rng((seed, int(held_out), number))
        while True:
            kinds = [KINDS[n] for n in rng.choice(len(KINDS), int(rng.integers(1, 5)), replace=False)]
            if len(kinds) == 1 or _of_held_out(kinds) == held_out:
                break
        wanted = tuple(ObjectSpec(kind.split()[1], colour=kind.split()[0]) for kind in kinds)
        yield shapes.sample_scene(SceneSpec("scene", wanted), rng)


def _of_held_out(kinds: list[str]) -> bool:
    return sum(KINDS.index(kind) for kind in kinds) % HELD_OUT_SHARE == 0
