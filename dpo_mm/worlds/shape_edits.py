"""Edits of the synthetic shapes: instructions that name one object of a scene, and the scene that they lead to.

The grammar has three sentences: "make the [COLOUR] SHAPE COLOUR", "remove the [COLOUR] SHAPE" and "add a COLOUR SHAPE". The first
colour is there only if the scene has several objects of the shape. `dpo_mm.judges.edit_judge` scores images against an instruction
and the image to edit.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dpo_mm.worlds.shapes import COLOURS, SHAPES, ObjectSpec, Scene, SceneSpec, sample_scene

_COLOUR, _SHAPE = "|".join(COLOURS), "|".join(SHAPES)
_RECOLOUR = re.compile(rf"make the (?:(?P<colour>{_COLOUR}) )?(?P<shape>{_SHAPE}) (?P<new_colour>{_COLOUR})")
_REMOVE = re.compile(rf"remove the (?:(?P<colour>{_COLOUR}) )?(?P<shape>{_SHAPE})")
_ADD = re.compile(rf"add an? (?P<colour>{_COLOUR}) (?P<shape>{_SHAPE})")
KINDS = ("recolour", "remove", "add")


@dataclass(frozen=True)
class ShapeEdit:
    """An edit of one object.

    Attributes:
        shape: shape of the object.
        colour: colour by which the instruction names it. None if the shape alone names it.
        new_colour: its colour after the edit. None if the object is removed or added.
        is_added: True if the object is new.
    """

    shape: str
    colour: str | None = None
    new_colour: str | None = None
    is_added: bool = False

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return "add" if self.is_added else "recolour" if self.new_colour else "remove"

    @property
    def combination(self) -> tuple[str, str, str | None]:
        """Key of what is held out: the kind, the shape, and the new colour or the colour that names the object."""
        return self.kind, self.shape, self.new_colour or self.colour

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
    if edit.is_added:
        return f"add {'an' if name[0] in 'aeiou' else 'a'} {name}"
    return f"make the {name} {edit.new_colour}" if edit.new_colour else f"remove the {name}"


def parse(instruction: str) -> ShapeEdit:
    """Parse an instruction.

    Raises:
        ValueError: if the instruction is any other text.
    """
    text = instruction.strip()
    match = _RECOLOUR.fullmatch(text) or _REMOVE.fullmatch(text) or _ADD.fullmatch(text)
    if match is None:
        raise ValueError(
            f"prompt {instruction!r} is not an edit of the synthetic shapes, such as 'make the star red', 'remove the blue "
            "square' or 'add a red star'. Use another judge for other edits"
        )
    return ShapeEdit(**match.groupdict(), is_added=match.re is _ADD)


def check_prompts(prompts: Iterable[str]) -> None:
    """Raise ValueError for the first prompt that is not an edit of the synthetic shapes."""
    for prompt in prompts:
        parse(prompt)


def target(scene: Scene, edit: ShapeEdit) -> Scene:
    """Return the scene to which an edit of an object of the scene leads.

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


@functools.cache
def held_out_combinations(seed: int = 0) -> frozenset[tuple[str, str, str | None]]:
    """Return the combinations of the held-out edits: a fifth of each kind."""
    held_out = []
    for number, kind in enumerate(KINDS):
        keys = list(itertools.product([kind], SHAPES, [*([None] if kind == "remove" else []), *COLOURS]))
        order = np.random.default_rng((seed, number)).permutation(len(keys))
        held_out += [keys[n] for n in order[: len(keys) // 5]]
    return frozenset(held_out)


def tasks(count: int, *, seed: int, held_out: bool | None = None) -> Iterator[EditTask]:
    """Yield edits of random scenes with two or three objects, also counting one to add. Each kind is a third of them.

    Args:
        count: number of edits.
        seed: seed of the scenes.
        held_out: True for edits of held-out combinations only, False for the others only, None for all.
    """
    rng = np.random.default_rng(seed)
    for number in range(count):
        task = _task(KINDS[number % 3], rng)
        while held_out not in (None, parse(task.instruction).combination in held_out_combinations()):
            task = _task(KINDS[number % 3], rng)
        yield task


def _task(kind: str, rng: np.random.Generator) -> EditTask:
    """Sample an edit of this kind. In a third of the scenes two objects have one shape, so that a colour names one of them."""
    shapes, colours = list(rng.permutation(SHAPES)), list(rng.permutation(list(COLOURS)))
    is_shared = rng.random() < 1 / 3
    if is_shared:
        shapes[1] = shapes[0]
    specs = tuple(ObjectSpec(str(shapes[n]), colour=str(colours[n])) for n in range(2 + int(rng.integers(2))))
    scene = sample_scene(SceneSpec("edit", specs), rng)
    first = scene.objects[0]
    if kind == "add":
        source = dataclasses.replace(scene, objects=scene.objects[1:])
        return EditTask(source, describe(ShapeEdit(first.shape, first.colour, is_added=True)), scene)
    new_colour = str(colours[-1]) if kind == "recolour" else None
    edit = ShapeEdit(first.shape, first.colour if is_shared else None, new_colour)
    return EditTask(scene, describe(edit), target(scene, edit))
