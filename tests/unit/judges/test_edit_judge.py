"""Edits of shapes: done, not done, done elsewhere and overdone images are told apart by the two judges."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from dpo_mm.data.prompts import read_prompt_set
from dpo_mm.judges.edit_judge import MAX_DIFFERENCE, _box, _read, edit_followed, edit_preserved
from dpo_mm.judges.self_test import self_test
from dpo_mm.worlds import shape_edits, shapes
from dpo_mm.worlds.shape_edits import ShapeEdit, parse
from dpo_mm.worlds.shapes import COLOURS, Scene, SceneObject

COUNT = 90
GREY = ((220, 220, 220), (220, 220, 220))
STAR = SceneObject("star", "blue", 16, 16, 20, COLOURS["blue"])
SQUARE = SceneObject("square", "green", 46, 46, 18, COLOURS["green"])
SOURCE = Scene((STAR, SQUARE), *GREY)
RED = dataclasses.replace(STAR, colour="red", rgb=COLOURS["red"])
CROSS = SceneObject("cross", "red", 46, 16, 16, COLOURS["red"])


def both(prompt: str, *objects: SceneObject, background: tuple[int, int, int] = (220, 220, 220)) -> tuple[float, float]:
    """Whether an image of these objects follows the instruction, and whether it preserves the rest."""
    image = shapes.render(Scene(objects, background, background))
    arguments = [image], [prompt], [[shapes.render(SOURCE)]]
    return edit_followed(*arguments)[0], edit_preserved(*arguments)[0]


def moved(one: SceneObject, x: float, y: float = 0) -> SceneObject:
    return dataclasses.replace(one, x=one.x + x, y=one.y + y)


@pytest.mark.parametrize(
    ("prompt", "objects", "expected"),
    [
        ("make the star red", (RED, SQUARE), (1, 1)),
        ("make the blue star red", (RED, SQUARE), (1, 1)),
        ("make the star red", (STAR, SQUARE), (0, 1)),  # nothing was done
        ("make the star red", (RED, dataclasses.replace(SQUARE, colour="red", rgb=COLOURS["red"])), (1, 0)),
        ("make the star red", (RED,), (1, 0)),  # the square is gone
        ("make the star red", (RED, moved(SQUARE, -8)), (1, 0)),
        ("make the star red", (RED, SQUARE, CROSS), (1, 0)),
        ("make the star red", (moved(RED, 20), SQUARE), (0, 0)),  # another red star, elsewhere
        ("make the star red", (dataclasses.replace(RED, shape="circle"), SQUARE), (0, 1)),
        ("make the star red", (SQUARE,), (0, 1)),  # removed instead
        ("remove the star", (SQUARE,), (1, 1)),
        ("remove the star", (STAR, SQUARE), (0, 1)),
        ("remove the star", (STAR,), (0, 0)),  # removed the other one
        ("remove the star", (), (1, 0)),
        ("remove the star", (moved(STAR, 24), SQUARE), (0, 0)),  # moved instead
        ("remove the star", (dataclasses.replace(STAR, shape="circle"), SQUARE), (0, 1)),
        ("remove the star", (dataclasses.replace(STAR, rgb=(120, 120, 120)), SQUARE), (0, 1)),  # painted grey
        ("add a red cross", (STAR, SQUARE, CROSS), (1, 1)),
        ("add a red cross", (STAR, SQUARE), (0, 1)),
        ("add a red cross", (STAR, SQUARE, dataclasses.replace(CROSS, shape="circle")), (0, 1)),
        ("add a red cross", (STAR, CROSS), (1, 0)),  # the square is gone
        ("add a red cross", (STAR, SQUARE, CROSS, moved(RED, 30, 30)), (1, 0)),  # and another star
        ("add a blue star", (STAR, SQUARE), (0, 1)),  # there was one already
        ("add a blue star", (STAR, SQUARE, moved(STAR, 30)), (1, 1)),
        ("add a blue star", (moved(STAR, 30), SQUARE), (1, 0)),  # the old one moved
    ],
)
def test_two_readings(prompt: str, objects: tuple[SceneObject, ...], expected: tuple[float, float]) -> None:
    assert both(prompt, *objects) == expected


def test_another_background_is_not_preserved() -> None:
    assert both("make the star red", RED, SQUARE, background=(200, 200, 200)) == (1, 0)


@pytest.mark.slow
def test_every_task_is_right_when_done_and_unchanged_when_not() -> None:
    """Also with noise of a decoder, and with the wrong object edited."""
    tasks, rng = list(shape_edits.tasks(COUNT, seed=3)), np.random.default_rng(0)
    prompts, sources = [task.instruction for task in tasks], [[shapes.render(task.source)] for task in tasks]
    done, undone = [shapes.render(task.target) for task in tasks], [images[0] for images in sources]
    noise = [np.asarray(image) + rng.normal(0, 4, (64, 64, 3)) for image in done]
    noisy = [Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8)) for pixels in noise]
    removed = [n for n, prompt in enumerate(prompts) if parse(prompt).kind == "remove"]
    for n in removed:  # what a judge by pixels alone would see of an object that is still there
        box, edited = _box(_read(undone[n], prompts[n], parse(prompts[n]), sources[n]).named, (64, 64)), undone[n]
        difference = np.abs(np.asarray(edited, dtype=float) - np.asarray(done[n], dtype=float))[box].mean()
        assert difference > 1.2 * MAX_DIFFERENCE
    for images, followed in ((done, 1), (noisy, 1), (undone, 0)):
        assert edit_followed(images, prompts, sources) == [followed] * COUNT
        assert edit_preserved(images, prompts, sources) == [1] * COUNT
    gone = [shapes.render(dataclasses.replace(task.target, objects=task.target.objects[:-1])) for task in tasks]
    assert edit_preserved(gone, prompts, sources) == [0] * COUNT
    kinds = [parse(prompt).kind for prompt in prompts]
    assert [kinds.count(kind) for kind in shape_edits.KINDS] == [COUNT // 3] * 3
    assert 10 < sum(parse(prompt).colour is not None for prompt in prompts) - COUNT // 3 < 35


def test_training_and_held_out_edits_have_no_combination_in_common() -> None:
    """The bundled lists are among them. Mutation that it catches: a list with the other list's edits."""
    held_out, train = (
        {parse(one.text).combination for one in read_prompt_set(f"shapes-edits-{name}").prompts}
        for name in ("held-out", "train")
    )
    assert held_out <= shape_edits.held_out_combinations() and not train & shape_edits.held_out_combinations()
    assert {kind for kind, *_ in held_out} == {kind for kind, *_ in train} == set(shape_edits.KINDS)
    assert len(shape_edits.held_out_combinations()) == 19


def test_instructions_are_read_as_they_are_written() -> None:
    edits = [ShapeEdit(s, c, n) for s in shapes.SHAPES for c in (None, "red") for n in (None, "blue")]
    edits += [ShapeEdit("star", "orange", is_added=True), ShapeEdit("star", "red", is_added=True)]
    assert [parse(shape_edits.describe(edit)) for edit in edits] == edits and len(edits) == 22
    assert shape_edits.describe(edits[-2]) == "add an orange star"
    with pytest.raises(ValueError, match="'make it red' is not an edit of the synthetic shapes"):
        shape_edits.check_prompts(["remove the star", "make it red"])


@pytest.mark.parametrize("prompt", ["remove the circle", "remove the red star"])
def test_instruction_must_name_one_object(prompt: str) -> None:
    with pytest.raises(ValueError, match="names 0 objects of its image"):
        both(prompt, STAR)
    with pytest.raises(ValueError, match="names 0 objects of the scene"):
        shape_edits.target(SOURCE, parse(prompt))


def test_self_test_of_a_judge_of_edits() -> None:
    assert [check.passed for check in self_test("edit_followed")] == [True, True, None, None]
