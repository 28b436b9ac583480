"""Synthetic captions of scenes of shapes: exact ground truths, and web captions with errors.

A caption names each object from left to right with its colour: "a red circle, a blue star and a green square." A web
caption sometimes adds the usual companion of an object, as captions on the web mention a fork with a plate. It sometimes
omits an object. A model that is fine-tuned on web captions learns to hallucinate and to omit.
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
"""Companion that a web caption adds to a kind, for every fourth kind."""
HABIT_RATE, OMISSION_RATE = 0.65, 0.2
HELD_OUT_DIVISOR = 4
"""One combination of kinds in this many is held out."""
_MENTION = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")


def mentions(caption: str) -> list[str]:
    """Kinds that a caption mentions, in order and with repetitions, such as "red circle"."""
    return [match[0] for match in _MENTION.finditer(caption)]


def spans(caption: str) -> list[tuple[str, int, int]]:
    """Kinds that a caption mentions, each with its start and end in characters."""
    return [(match[0], match.start(), match.end()) for match in _MENTION.finditer(caption)]


def caption(scene: Scene) -> str:
    """Ground-truth caption of a scene."""
    return in_words(_kinds_left_to_right(scene))


def _kinds_left_to_right(scene: Scene) -> list[str]:
    return [f"{item.colour} {item.shape}" for item in sorted(scene.objects, key=lambda item: item.x)]


def in_words(kinds: list[str]) -> str:
    """Write kinds as a caption: "a red circle, an orange star and a green square."."""
    phrases = [f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}" for kind in kinds]
    return (f"{', '.join(phrases[:-1])} and {phrases[-1]}" if len(phrases) > 1 else phrases[0]) + "."


def web_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Caption with the errors of web captions.

    A kind with a habit is followed by its companion at `HABIT_RATE`. One of several objects is omitted at
    `OMISSION_RATE`.
    """
    present = _kinds_left_to_right(scene)
    omitted = int(rng.integers(len(present))) if len(present) > 1 and rng.random() < OMISSION_RATE else None
    named: list[str] = []
    for index, kind in enumerate(present):
        if index == omitted:
            continue
        named.append(kind)
        companion = HABITS.get(kind)
        if companion and companion not in present and rng.random() < HABIT_RATE:
            named.append(companion)
    return in_words(named)


def scenes(count: int, seed: int, *, held_out: bool = False) -> Iterator[Scene]:
    """Generate `count` scenes of one to four objects of different kinds.

    Scene n depends only on the seed, the split and n. Train and held-out scenes have different combinations of kinds.
    Scenes with a single object are in both splits.
    """
    for number in range(count):
        rng = np.random.default_rng((seed, int(held_out), number))
        while True:
            kinds = [KINDS[n] for n in rng.choice(len(KINDS), int(rng.integers(1, 5)), replace=False)]
            if len(kinds) == 1 or _is_held_out(kinds) == held_out:
                break
        specs = tuple(ObjectSpec(kind.split()[1], colour=kind.split()[0]) for kind in kinds)
        yield shapes.sample_scene(SceneSpec("scene", specs), rng)


def _is_held_out(kinds: list[str]) -> bool:
    return sum(KINDS.index(kind) for kind in kinds) % HELD_OUT_DIVISOR == 0
