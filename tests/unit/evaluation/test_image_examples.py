"""Images that a report shows: some of every category, and those that changed most."""

import dataclasses

import numpy as np
import pytest

from dpo_mm.evaluation.image_examples import examples, most_changed
from tests.unit.evaluation.test_compare_images import noise, scored


def plan_of(scores, *, samples=1, categories=()):
    """Scored images whose judge is "judge"."""
    one = scored({"judge": np.array(scores, dtype=float)}, noise(len(scores), 0), samples)
    return dataclasses.replace(one, plan=dataclasses.replace(one.plan, categories=categories))


@pytest.fixture(autouse=True)
def direction(monkeypatch):
    """Direction of the invented judge, to change."""
    found = {"judge": "higher"}
    monkeypatch.setattr("dpo_mm.evaluation.image_examples.better_of", found.__getitem__)
    return found


def test_largest_changes_come_first_each_way(direction):
    """Mutation that it catches: swapped ways, no order, an unchanged image, several images of a prompt."""
    base, tuned = plan_of([0, 0, 0, 5, 5, 5]), plan_of([1, 3, 0, 4, 1, 5])
    found = most_changed(base, tuned, "judge", count=4)
    assert [one.prompt for one in found.improved] == ["prompt 1", "prompt 0"]
    assert [one.prompt for one in found.worsened] == ["prompt 4", "prompt 3"]
    assert [(one.base_score, one.tuned_score) for one in found.improved] == [(0, 3), (0, 1)]
    assert found.improved[0].tuned is tuned.images[1] and found.improved[0].base is base.images[1]
    direction["judge"] = "lower"
    reverse = most_changed(base, tuned, "judge", count=1)
    assert [one.prompt for one in reverse.all] == ["prompt 4", "prompt 1"]


def test_prompt_has_one_image_and_equal_changes_keep_their_order():
    base, tuned = plan_of([0] * 6, samples=2), plan_of([1, 1, 1, 0, 0, 1], samples=2)
    found = most_changed(base, tuned, "judge", count=4)
    assert [(one.prompt, one.seed) for one in found.improved] == [("prompt 0", 0), ("prompt 1", 2), ("prompt 2", 5)]
    assert found.worsened == ()


def test_examples_are_the_first_of_each_category_in_turn():
    names = ("a", "a", "a", "b", "b", "c")
    base = plan_of([0, 1, 0, 1, 0, 1], categories=names)
    chosen = examples(base, base, "judge", count=5)
    assert [one.category for one in chosen] == ["a", "b", "c", "a", "b"]
    assert [one.prompt for one in chosen] == ["prompt 0", "prompt 3", "prompt 5", "prompt 1", "prompt 4"]
