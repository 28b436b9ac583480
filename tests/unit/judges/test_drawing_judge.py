from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dpo_mm.config import CompareConfig, MineConfig
from dpo_mm.evaluation.compare_images import read_plans
from dpo_mm.judges import check_prompts
from dpo_mm.judges.drawing_judge import UNCLEAR, agreement, detect_scenes, drawings_agreement, drawings_faithfulness
from dpo_mm.judges.self_test import self_test
from dpo_mm.mining.mine_images import mine_images
from dpo_mm.worlds import drawing_prompts, drawings
from dpo_mm.worlds.drawing_sprites import BACKGROUNDS
from dpo_mm.worlds.drawings import Scene, Thing

COUNT = 48


@pytest.fixture(scope="module")
def held_out() -> tuple[list[str], list[Image.Image]]:
    """Held-out captions with their rendered scenes."""
    rng = np.random.default_rng(5)
    sampled = (drawings.sample_scene(rng) for _ in range(10_000))
    scenes = [scene for scene, _ in zip((s for s in sampled if drawings.is_held_out(s.things)), range(COUNT))]
    return [drawing_prompts.caption(scene, rng) for scene in scenes], [drawings.render(scene) for scene in scenes]


def distorted(image: Image.Image, seed: int) -> Image.Image:
    """Blur, uneven colour and noise, as a small autoencoder leaves them."""
    rng = np.random.default_rng(seed)
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(0.6)), dtype=float)
    blotches = [Image.fromarray(rng.normal(0, 6, (8, 8)).astype(np.float32)).resize((64, 64)) for _ in range(3)]
    pixels += np.stack([np.asarray(blotch) for blotch in blotches], -1) + rng.normal(0, 6, pixels.shape)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


@pytest.mark.slow
def test_judge_accepts_clean_and_distorted_held_out_scenes(held_out: tuple[list[str], list[Image.Image]]) -> None:
    prompts, images = held_out
    assert len(images) == COUNT
    assert np.mean(drawings_faithfulness(images, prompts)) >= 0.97
    spoilt = [distorted(image, seed) for seed, image in enumerate(images)]
    assert np.mean(drawings_faithfulness(spoilt, prompts)) >= 0.95


def test_judge_rejects_the_images_of_other_prompts(held_out: tuple[list[str], list[Image.Image]]) -> None:
    prompts, images = held_out
    assert np.mean(drawings_faithfulness(images[:24], prompts[1:25])) <= 0.05
    assert np.mean(drawings_agreement(images[:24], prompts[1:25])) < 0.5


def test_detect_scenes_returns_kinds_positions_and_the_background() -> None:
    things = (Thing("snail", None, 0.27, 0.5, 0.42), Thing("apple", "purple", 0.74, 0.45, 0.42))
    (scene,) = detect_scenes([drawings.render(Scene(things, "yellow", (3, -3, 2)))])
    assert scene.backgrounds == ("yellow",)
    assert [(one.name, one.colour) for one in scene.things] == [("snail", None), ("apple", "purple")]
    for one, thing in zip(scene.things, things, strict=True):
        assert (one.x, one.y, one.side) == pytest.approx((thing.x, thing.y, thing.side), abs=0.03)


def test_detect_scenes_gives_no_name_to_a_fused_thing_and_nothing_to_an_empty_image() -> None:
    left = np.asarray(drawings.render(Scene((Thing("cow", None, 0.5, 0.5, 0.7),), "white")))
    right = np.asarray(drawings.render(Scene((Thing("rocket", None, 0.5, 0.5, 0.7),), "white")))
    fused = Image.fromarray(np.concatenate([left[:, :32], right[:, 32:]], 1))
    empty, noise = Image.new("RGB", (64, 64), "white"), np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    scenes = detect_scenes([fused, empty, Image.fromarray(noise.astype(np.uint8))])
    assert all(thing.name is None for thing in scenes[0].things) and scenes[0].things
    assert scenes[1].things == () and all(thing.name is None for thing in scenes[2].things)


def test_detect_scenes_names_a_distorted_thing_that_no_other_drawing_explains() -> None:
    pixels = np.asarray(drawings.render(Scene((Thing("bicycle", None, 0.5, 0.5, 0.75),), "purple")))
    zigzag = np.stack([np.roll(row, 1 if y // 2 % 2 else -1, axis=0) for y, row in enumerate(pixels)])
    ((thing,),) = (scene.things for scene in detect_scenes([Image.fromarray(zigzag)]))
    assert thing.name == "bicycle" and thing.unexplained > UNCLEAR


def test_a_blob_that_two_drawings_explain_has_no_name() -> None:
    pixels = np.full((64, 64, 3), BACKGROUNDS["yellow"])
    y, x = np.mgrid[:64, :64]
    pixels[((x - 32) / 12) ** 2 + ((y - 32) / 10) ** 2 < 1] = (40, 190, 60)
    blob = Image.fromarray(pixels.astype(np.uint8)).filter(ImageFilter.GaussianBlur(2))
    (scene,) = detect_scenes([blob])
    assert [thing.name for thing in scene.things] == [None]


def test_a_large_thing_is_not_read_as_several_and_a_small_one_next_to_it_counts() -> None:
    large, small = Thing("dinosaur", "orange", 0.4, 0.4, 0.62), Thing("bee", None, 0.83, 0.83, 0.3)
    images = [distorted(drawings.render(Scene(things, "pink")), 3) for things in ((large,), (large, small))]
    assert drawings_faithfulness(images, ["an orange dinosaur"] * 2) == [1.0, 0.0]


def test_a_background_between_two_colours_satisfies_both() -> None:
    pixels = np.asarray(drawings.render(Scene((Thing("cow", None, 0.5, 0.5, 0.7),), "pink"))).copy()
    pixels[(pixels == BACKGROUNDS["pink"]).all(-1)] = (np.array(BACKGROUNDS["pink"]) + BACKGROUNDS["purple"]) // 2
    prompts = ["a cow on pink", "a cow on purple", "a cow on white"]
    assert drawings_faithfulness([Image.fromarray(pixels)] * 3, prompts) == [1.0, 1.0, 0.0]


def test_agreement_is_the_fraction_of_the_request() -> None:
    scene = Scene((Thing("cat", "blue", 0.25, 0.5, 0.42), Thing("bee", None, 0.75, 0.5, 0.42)), "white")
    (detected,) = detect_scenes([drawings.render(scene)])
    expected = {
        "a blue cat left of a bee on white": 1.0,
        "a blue cat and a bee": 1.0,
        "a blue cat right of a bee on white": 5 / 6,
        "a green cat left of a bee on pink": 4 / 6,
        "a bee": 1.5 / 2,
        "three bees": (1 + 0.5) / 4,
    }
    assert {text: agreement(detected, drawing_prompts.parse(text)) for text in expected} == pytest.approx(expected)


def test_other_size_is_rejected() -> None:
    with pytest.raises(ValueError, match="image is 32x32"):
        drawings_faithfulness([Image.new("RGB", (32, 32))], ["a cat"])


def test_prompts_that_the_judge_cannot_score_are_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a penguin\na dragon\n")
    wrong = "'a dragon' is not a prompt of the drawings"
    with pytest.raises(ValueError, match=wrong):
        mine_images(MineConfig("no-such-model", str(prompts), str(tmp_path / "out"), "drawings_agreement"))
    judges = ("drawings_faithfulness",)
    with pytest.raises(ValueError, match=wrong):
        read_plans(CompareConfig("no-such-model", str(tmp_path), prompts=str(prompts), judges=judges))
    with pytest.raises(ValueError, match="'a penguin' is not a prompt of the synthetic shapes"):
        check_prompts(["aesthetic", "faithfulness"], ["a star", "a penguin"])
    check_prompts(["aesthetic", "tests.my_judge:score"], ["a dragon"])


def test_self_test_of_the_judge_passes() -> None:
    results = {check.name: check.passed for check in self_test("drawings_faithfulness")}
    assert results["captions"] is results["same scores twice"] is results["same scores in batches"] is True
