from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dpo_mm.mining.mine_images as mining
from dpo_mm.config import MineConfig
from dpo_mm.data.schema import load_pairs
from dpo_mm.mining.mine_images import choose_pairs, mean_z_score, mine_images, parse_judges
from tests.contracts.families import WORDS


def brightness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    assert len(images) == len(prompts)
    return [float(np.asarray(image).mean()) for image in images]


def constant(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return [0.0] * len(images)


@pytest.mark.parametrize(
    ("scores", "gap", "count", "expected"),
    [
        ([[0.1, 0.9, 0.5]], 0.0, 1, [(1, 0)]),
        ([[0.1, 0.9, 0.5, 0.4]], 0.0, 2, [(1, 0), (2, 3)]),
        ([[0.1, 0.9, 0.5, 0.4]], 0.5, 2, [(1, 0)]),
        ([[0.1, 0.9]], 0.8, 1, []),
        ([[1, 1, 1]], 0.0, 1, []),
        ([[0, 1, 0, 1]], 0.0, 3, [(1, 2), (3, 0)]),
        ([[0.1, 0.9, 0.5], [1, 0, 1]], 0.0, 1, [(2, 0)]),
    ],
)
def test_choose_pairs_pairs_best_with_worst(
    scores: list[list[float]], gap: float, count: int, expected: list[tuple[int, int]]
) -> None:
    assert choose_pairs(np.array(scores, dtype=float), gap, count) == expected


def darkness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return [1000 * value for value in brightness(images, prompts)]


darkness.better = "lower"  # type: ignore[attr-defined]


def redness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return [float(np.asarray(image)[..., 0].mean()) for image in images]


def test_mean_z_score_is_taken_within_a_prompt() -> None:
    one, other = np.array([1.0, 2.0, 3.0, 10.0, 10.0, 10.0]), np.array([300.0, 0.0, 0.0, 5.0, 7.0, 9.0])
    assert mean_z_score([one], 3) is one
    got = mean_z_score([one, other], 3)
    z = lambda values: (values - values.mean()) / values.std()
    expected = [(z(one[:3]) + z(other[:3])) / 2, z(other[3:]) / 2]
    np.testing.assert_allclose(got, np.concatenate(expected))
    np.testing.assert_allclose(mean_z_score([1000 * one + 7, other], 3), got, atol=1e-12)


def test_choose_pairs_respects_every_guardrail() -> None:
    scores = np.array([[0.1, 0.9, 0.8, 0.7], [1, 0, 1, 1], [1, 1, 0, 1]], dtype=float)
    assert choose_pairs(scores, 0.0, 1) == [(3, 0)]
    assert choose_pairs(scores[:2], 0.0, 1) == [(2, 0)] and choose_pairs(scores[:1], 0.0, 1) == [(1, 0)]


def test_parse_judges_accepts_list_or_commas() -> None:
    assert parse_judges("a,b:c@d") == ("a", "b:c@d") and parse_judges(("a", "b")) == ("a", "b")
    assert parse_judges("a") == ("a",) and parse_judges(None) == ()


@pytest.fixture
def config(tiny_model: str, tmp_path: Path) -> MineConfig:
    (tmp_path / "prompts.txt").write_text("\n".join(WORDS) + "\n")
    return MineConfig(
        model=tiny_model,
        prompts=str(tmp_path / "prompts.txt"),
        output_dir=str(tmp_path / "mined"),
        judges="tests.unit.mining.test_mine_images:brightness",
        images_per_prompt=3,
        num_inference_steps=2,
        shard_size=2,
    )


def test_mined_rows_record_scores_seeds_and_group(config: MineConfig) -> None:
    rows = load_pairs(str(mine_images(config)))
    assert sorted(rows["prompt"]) == sorted(WORDS)
    for row in rows:
        better, worse = ("a", "b") if row["preference"] == "a" else ("b", "a")
        assert row[f"score_{better}"] > row[f"score_{worse}"]
        assert row[f"score_{better}"] == pytest.approx(float(np.asarray(row[f"image_{better}"]).mean()))
        assert row["seed_a"] != row["seed_b"] and row["group_id"] == row["prompt"]


def test_mining_with_several_judges_and_guardrails(config: MineConfig) -> None:
    here = "tests.unit.mining.test_mine_images"
    judges = (f"{here}:brightness", f"{here}:darkness", f"{here}:redness")
    alone = mine_images(dataclasses.replace(config, judges=f"{here}:redness", output_dir=config.output_dir + "-1"))
    both = mine_images(dataclasses.replace(config, judges=judges, guards=f"{here}:constant"))
    assert load_pairs(str(both))["axis"][0] == "+".join(judges)
    ids = [sorted(load_pairs(str(path))["id"]) for path in (alone, both)]
    assert ids[0] == ids[1], "brightness and flipped darkness cancel out"
    with pytest.raises(ValueError, match="Increase images_per_prompt"):
        mine_images(
            dataclasses.replace(
                config, guards=(f"{here}:constant", f"{here}:darkness"), output_dir=config.output_dir + "-2"
            )
        )


def test_mining_resumes_after_finished_shards(config: MineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = mining._mine_shard, []

    def interrupt(*arguments: object, **options: bool) -> object:
        calls.append(arguments[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(mining, "_mine_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        mine_images(config)
    path = mine_images(config)
    assert [len(prompts) for prompts in calls] == [2, 1, 1]  # type: ignore[arg-type]
    whole = mine_images(dataclasses.replace(config, output_dir=config.output_dir + "-whole"))
    columns = ["id", "preference", "score_a", "seed_a"]
    assert load_pairs(str(path)).select_columns(columns)[:] == load_pairs(str(whole)).select_columns(columns)[:]


def test_invalid_image_mining_raises(config: MineConfig) -> None:
    with pytest.raises(ValueError, match="Increase images_per_prompt or lower min_score_gap"):
        mine_images(dataclasses.replace(config, judges="tests.unit.mining.test_mine_images:constant"))
    with pytest.raises(ValueError, match=r"mined with other settings \(judge"):
        mine_images(config)
    with pytest.raises(ValueError, match="at least 2 images"):
        mine_images(dataclasses.replace(config, images_per_prompt=1))
    with pytest.raises(ValueError, match="judge 'faithfulnes' is unknown; did you mean 'faithfulness'"):
        mine_images(dataclasses.replace(config, judges="faithfulnes", output_dir=config.output_dir + "-2"))
    with pytest.raises(ValueError, match="no such file"):
        mine_images(dataclasses.replace(config, prompts="nothing.txt", output_dir=config.output_dir + "-3"))
