from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpo_mm.assets import resolve_asset
from dpo_mm.config import CompareConfig
from dpo_mm.data.prompts import read_prompts, seeds_of
from dpo_mm.evaluation.compare_images import (
    SamplingPlan,
    ScoredImages,
    aa_control,
    by_category,
    compare_diversity,
    compare_images,
    comparisons,
    diversity,
    sampling_plan,
    sweep_point,
    verdict,
)
from dpo_mm.evaluation.statistics import interval_verdict, verdict_of
from dpo_mm.evaluation.sweep import mark_recommended
from dpo_mm.evaluation.verdict import note_against_sft
from dpo_mm.judges import better_of
from dpo_mm.policies.families import load_policy
from tests.contracts.families import WORDS
from tests.contracts.test_diffusion import randomise_adapter

CONFIG = CompareConfig(model="-", output_dir="-", judges=("judge", "guard"))


@pytest.fixture(autouse=True)
def directions_of_invented_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judges that have scores here, but no function: fewer errors are better."""
    invented = {"judge": "higher", "guard": "higher", "errors": "lower"}
    direction = lambda judge: invented.get(judge) or better_of(judge)
    monkeypatch.setattr("dpo_mm.evaluation.compare_images.better_of", direction)


def brightness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return [float(np.asarray(image).mean()) / 255 for image in images]


def scored(scores: dict[str, np.ndarray], images: np.ndarray, samples: int = 2) -> ScoredImages:
    count = len(images)
    prompts = tuple(f"prompt {n // samples}" for n in range(count))
    return ScoredImages(
        SamplingPlan(prompts, tuple(range(count)), samples), [Image.fromarray(i) for i in images], scores
    )


def noise(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def pair(gain: float, guard: float, tuned_images: np.ndarray | None = None) -> tuple[ScoredImages, ScoredImages]:
    rng = np.random.default_rng(0)
    scores = rng.random(80)
    change = rng.normal(0, 0.05, (2, 80))
    base = scored({"judge": scores, "guard": scores}, noise(80, 0))
    after = {"judge": scores + gain + change[0], "guard": scores + guard + change[1]}
    return base, scored(after, noise(80, 1) if tuned_images is None else tuned_images)


@pytest.mark.parametrize(
    ("gain", "guard", "images", "expected"),
    [
        (0.3, 0.0, None, "better"),
        (0.0, 0.0, None, "no evidence"),
        (-0.3, 0.0, None, "worse"),
        (0.3, -0.3, None, "over-optimised"),
        (0.3, 0.0, np.full((80, 8, 8, 3), 9, np.uint8), "over-optimised"),
    ],
)
def test_verdict_uses_primary_metric_guardrail_and_diversity(
    gain: float, guard: float, images: np.ndarray | None, expected: str
) -> None:
    results = comparisons(*pair(gain, guard, images), CONFIG)
    assert [one.headline for one in results] == [True, False, False]
    assert verdict(results) == expected
    assert results[0].difference == pytest.approx(gain, abs=0.03)


def test_lower_is_better_for_a_judge_that_says_so() -> None:
    """It catches a comparison of images, a category, a control or a sweep that takes a higher score for better."""
    base, tuned = pair(-0.3, 0.0)
    base, tuned = ({**each.scores, "errors": each.scores["judge"]} for each in (base, tuned))  # type: ignore[assignment]
    before, after = (scored(scores, noise(80, 0)) for scores in (base, tuned))  # type: ignore[arg-type]
    config = dataclasses.replace(CONFIG, judges=("errors", "guard"))
    rows = comparisons(before, after, config)
    assert rows[0].difference < 0 and rows[0].wins > rows[0].losses and verdict(rows) == "better"
    assert verdict(comparisons(after, before, config)) == "worse"
    assert verdict(comparisons(before, after, dataclasses.replace(CONFIG, judges=("guard", "errors")))) == "no evidence"
    worse_errors = scored({"judge": after.scores["judge"] + 0.6, "errors": after.scores["judge"] + 0.6}, noise(80, 1))
    guarded = comparisons(before, worse_errors, dataclasses.replace(CONFIG, judges=("judge", "errors")))
    assert verdict(guarded) == "over-optimised"
    named = lambda each: dataclasses.replace(each, plan=dataclasses.replace(each.plan, categories=("a", "b") * 40))
    assert {row.direction for row in by_category(named(before), named(after), "errors")} == {"lower"}
    control = aa_control(before, "errors")
    assert control is not None and control.direction == "lower"
    points = [sweep_point(before, each, config, scale=scale) for scale, each in ((0.0, before), (1.0, after))]
    assert [point.recommended for point in mark_recommended(points)] == [False, True]


def test_one_rule_for_every_row_of_the_table() -> None:
    """It catches a row "DPO against SFT", or of diversity, whose verdict is its interval's alone or without Holm."""
    base, tuned = pair(0.3, 0.0)
    for models in (("base", "tuned"), ("sft", "tuned")):
        rows = comparisons(base, tuned, CONFIG, models=models)
        assert [row.metric for row in rows] == ["judge", "guard", "diversity"]
        assert all(row.p_holm is not None and row.verdict == verdict_of(row) for row in rows)
        assert rows[0].p_holm == pytest.approx(3 * rows[0].p)
    few = np.zeros(80)
    few[:12], few[12:22] = 5.0, -0.1
    unconfirmed = scored({name: scores + few for name, scores in base.scores.items()}, noise(80, 1))
    row = comparisons(base, unconfirmed, CONFIG, models=("sft", "tuned"))[0]
    assert interval_verdict(row) == "better" and row.verdict == "no evidence"
    assert "No evidence that DPO" in note_against_sft(row)


def test_aa_control_compares_other_images() -> None:
    """It catches a control that compares a half with itself, or the seeds of different prompts."""
    scores = np.tile([0.0, 0.25, 0.5, 1.0], 20) + np.random.default_rng(0).normal(0, 0.01, 80)
    one = aa_control(scored({"judge": scores}, noise(80, 0), samples=4), "judge")
    assert one is not None and one.verdict == "better" and (one.n, one.clusters) == (40, 20)
    assert (one.base, one.tuned) == pytest.approx((0.125, 0.75), abs=0.01)
    uneven = aa_control(scored({"judge": scores[:60]}, noise(60, 0), samples=3), "judge")
    assert uneven is not None and (uneven.n, uneven.clusters) == (20, 20)


def test_diversity_is_mean_pairwise_distance_within_a_prompt() -> None:
    """It catches distances between the images of different prompts, or of all images."""
    images = np.zeros((4, 8, 8, 3), np.uint8)
    images[1] = 255
    assert diversity(scored({}, images)).tolist() == [1.0, 0.0]
    images = np.repeat(np.array([0, 0, 0, 255, 255, 255], np.uint8), 64 * 3).reshape(6, 8, 8, 3)
    assert diversity(scored({}, images, samples=3)).tolist() == [0.0, 0.0]
    images[2] = 255
    assert diversity(scored({}, images, samples=3)) == pytest.approx([2 / 3, 0.0])
    (row,) = compare_diversity(scored({}, images, samples=3), scored({}, noise(6, 0), samples=3))
    assert row.base == pytest.approx(1 / 3) and row.clusters == row.n == 2


def test_aa_control_of_equal_models_is_no_evidence() -> None:
    verdicts = []
    for seed in range(20):
        scores = np.random.default_rng(seed).random(160)
        one = aa_control(scored({"judge": scores}, noise(160, seed), samples=4), "judge")
        assert one is not None
        verdicts.append(one.verdict)
    assert verdicts.count("no evidence") >= 18
    assert aa_control(scored({"judge": np.ones(4)}, noise(4, 0), samples=1), "judge") is None


def test_by_category_derives_categories_from_prompts() -> None:
    names = read_prompts("shapes-held-out", limit=12)
    scores = {"judge": np.zeros(24)}
    prompts = tuple(name for name in names for _ in range(2))
    base = ScoredImages(SamplingPlan(prompts, tuple(range(24)), 2), [], scores)
    results = by_category(base, base, "judge")
    assert [one.metric for one in results] == sorted(
        ["single object", "two objects", "counting", "colours", "position", "colour attribution"]
    )
    assert sum(one.n for one in results) == 24


def test_note_against_sft_states_the_winner() -> None:
    base, tuned = pair(0.3, 0.0)
    assert "DPO beats SFT on the same data" in note_against_sft(comparisons(base, tuned, CONFIG)[0])
    assert "SFT on the chosen side is better than DPO" in note_against_sft(comparisons(tuned, base, CONFIG)[0])
    assert "SFT is cheaper" in note_against_sft(comparisons(*pair(0.0, 0.0), CONFIG)[0])


def test_sampling_plan_spreads_prompts_over_categories_and_seeds_by_prompt() -> None:
    few = read_prompts("shapes-held-out", limit=6)
    assert len({name for name in few}) == 6 and few == read_prompts("shapes-held-out", limit=6)
    assert len(read_prompts("shapes-held-out")) == len(Path(resolve_asset("shapes-held-out")).read_text().splitlines())
    assert seeds_of("x", 3, seed=0) == seeds_of("x", 4, seed=0)[:3] != seeds_of("y", 3, seed=0)
    plan = sampling_plan(CompareConfig(model="-", output_dir="-", max_prompts=3, images_per_prompt=2))
    assert plan.prompts == tuple(p for p in read_prompts("shapes-held-out", limit=3) for _ in range(2))
    assert plan.first(1).prompts == plan.prompts[::2] and plan.first(1).samples == 1


def test_compare_images_writes_report_and_metrics(tiny_model: str, tmp_path: Path) -> None:
    policy = load_policy(tiny_model)
    from tests.contracts.test_diffusion import config as train_config

    policy.prepare(train_config())
    randomise_adapter(policy)
    policy.save(tmp_path / "adapter")
    (tmp_path / "prompts.txt").write_text("\n".join(WORDS) + "\n")
    config = CompareConfig(
        model=tiny_model,
        output_dir=str(tmp_path / "out"),
        adapter=str(tmp_path / "adapter"),
        prompts=str(tmp_path / "prompts.txt"),
        images_per_prompt=2,
        judges=("tests.unit.evaluation.test_compare_images:brightness",),
        num_inference_steps=2,
        scales=(0.5,),
    )
    outcome = compare_images(config, title="<b>t</b>", command="cmd", sft_adapter=str(tmp_path / "adapter"))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert sum(one["headline"] for one in metrics["comparisons"]) == 1
    wanted = {"metric", "judge", "headline", "base", "tuned", "difference", "low", "high", "n", "verdict"}
    assert all(wanted <= one.keys() for one in metrics["comparisons"])
    first = metrics["comparisons"][0]
    assert first["difference"] == pytest.approx(first["tuned"] - first["base"]) and first["difference"] != 0
    against = next(one for one in metrics["comparisons"] if one["models"] == ["sft", "tuned"])
    assert against["difference"] == 0 and "SFT is cheaper" in outcome.notes[0]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"report.html", "metrics.json", "contact_sheet.png"}
    assert "&lt;b&gt;t&lt;/b&gt;" in outcome.report.read_text()


@pytest.mark.slow
def test_base_with_an_adapter_is_compared_with_it(tiny_model: str, tmp_path: Path) -> None:
    """It catches images of the base that are drawn without its adapter."""
    policy = load_policy(tiny_model)
    from tests.contracts.test_diffusion import config as train_config

    policy.prepare(train_config())
    randomise_adapter(policy)
    policy.save(tmp_path / "adapter")
    (tmp_path / "prompts.txt").write_text("\n".join(WORDS[:2]) + "\n")
    plain = CompareConfig(
        model=tiny_model,
        output_dir=str(tmp_path / "plain"),
        adapter=str(tmp_path / "adapter"),
        prompts=str(tmp_path / "prompts.txt"),
        images_per_prompt=2,
        judges=("tests.unit.evaluation.test_compare_images:brightness",),
        num_inference_steps=2,
    )
    staged = dataclasses.replace(plain, base_adapter=plain.adapter, output_dir=str(tmp_path / "staged"))
    first, second = (compare_images(config, title="t", command="c").comparisons[0] for config in (plain, staged))
    assert first.difference != 0 and second.difference == 0 and second.base == first.tuned
    settings = json.loads((tmp_path / "staged" / "metrics.json").read_text())["settings"]
    assert settings["base adapter"] == plain.adapter
