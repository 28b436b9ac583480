"""Edits of the synthetic shapes: instructions that name one object of a scene, and the scene that they lead to.

The grammar has two sentences: "make the [COLOUR] SHAPE COLOUR" and "remove the [COLOUR] SHAPE". The first colour is there only if the
scene has several objects of the shape. `dpo_mm.judges.edit_judge` scores images against an instruction and the image to edit.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dpo_mm.worlds.shapes import COLOURS, SHAPES, ObjectSpec, Scene, SceneSpec, sample_scene

_COLOUR, _SHAPE = "|".join(COLOURS), "|".join(SHAPES)
_RECOLOUR = re.compile(rf"make the (?:(?P<colour>{_COLOUR}) )?(?P<shape>{_SHAPE}) (?P<new_colour>{_COLOUR})")
_REMOVE = re.compile(rf"remove the (?:(?P<colour>{_COLOUR}) )?(?P<shape>{_SHAPE})")


@dataclass(frozen=True)
class ShapeEdit:
    """An edit of one object.

    Attributes:
        shape: shape of the object.
        colour: its colour before the edit. None if the shape alone names it.
        new_colour: its colour after the edit. None if the object is removed.
    """

    shape: str
    colour: str | None = None
    new_colour: str | None = None

    def names(self, shape: str | None, colour: str | None) -> bool:
        """Check if the instruction may mean an object of this shape and colour, each None if it is unclear."""
        return shape == self.shape and self.colour in (None, colour)


class EditTask(NamedTuple):
    """A scene, an instruction, and the scene that the instruction leads to."""

    source: Scene
    instruction: str
    target: Scene


def describe(edit: ShapeEdit) -> str:
    """Write the instruction of an edit."""
    name = " ".join(word for word in (edit.colour, edit.shape) if word)
    return f"make the {name} {edit.new_colour}" if edit.new_colour else f"remove the {name}"


def parse(instruction: str) -> ShapeEdit:
    """Parse an instruction.

    Raises:
        ValueError: if the instruction is any other text.
    """
    match = _RECOLOUR.fullmatch(instruction.strip()) or _REMOVE.fullmatch(instruction.strip())
    if match is None:
        raise ValueError(
            f"prompt {instruction!r} is not an edit of the synthetic shapes, such as 'make the star red' or 'remove the blue "
            "square'. Use another judge for other edits"
        )
    return ShapeEdit(**match.groupdict())


def check_prompts(prompts: Iterable[str]) -> None:
    """Raise ValueError for the first prompt that is not an edit of the synthetic shapes."""
    for prompt in prompts:
        parse(prompt)


def target(scene: Scene, edit: ShapeEdit) -> Scene:
    """Return the scene that an edit leads to.

    Raises:
        ValueError: unless the instruction names exactly one object.
    """
    named = [one for one in scene.objects if edit.names(one.shape, one.colour)]
    if len(named) != 1:
        raise ValueError(f"{describe(edit)!r} names {len(named)} objects of the scene. Name one")
    objects = [one for one in scene.objects if one is not named[0]]
    if edit.new_colour:
        painted = dataclasses.replace(named[0], colour=edit.new_colour, rgb=COLOURS[edit.new_colour])
        objects.insert(scene.objects.index(named[0]), painted)
    return dataclasses.replace(scene, objects=tuple(objects))


def tasks(count: int, *, seed: int) -> Iterator[EditTask]:
    """Yield edits of random scenes with two or three objects. A third of the scenes has two objects of one shape."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        shapes, colours = list(rng.permutation(SHAPES)), list(rng.permutation(list(COLOURS)))
        if number % 3 == 0:
            shapes[1] = shapes[0]
        specs = tuple(ObjectSpec(str(shapes[n]), colour=str(colours[n])) for n in range(2 + int(rng.integers(2))))
        scene = sample_scene(SceneSpec("edit", specs), rng)
        first = scene.objects[0]
        new_colour = str(colours[-1]) if rng.random() < 0.5 else None
        edit = ShapeEdit(first.shape, first.colour if number % 3 == 0 else None, new_colour)
        yield EditTask(scene, describe(edit), target(scene, edit))
