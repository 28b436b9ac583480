from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.optimize import minimize_scalar

from dpo_mm.config import RelabelConfig
from dpo_mm.data.image_files import encode_png
from dpo_mm.data.schema import drop_ties, load_pairs
from dpo_mm.judges import relabel as module
from dpo_mm.judges.relabel import given_probability, labels, most_likely_unit, relabel, spread

HERE = "tests.unit.judges.test_relabel"
EQUAL, LIGHT, DARK = (90, 90), (200, 100), (40, 160)
"""Grey of a and of b."""


def brightness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    assert len(images) == len(prompts)
    return [float(np.asarray(image).mean()) for image in images]


def darkness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return brightness(images, prompts)


darkness.better = "lower"  # type: ignore[attr-defined]


def broken(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return [math.nan] * len(images)


def brighter(a: Sequence[Image.Image], b: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    pairs = zip(brightness(a, prompts), brightness(b, prompts), strict=True)
    return [0.5 + (one > other) / 2 - (one < other) / 2 for one, other in pairs]


brighter.pairwise = True  # type: ignore[attr-defined]


def row(name: str, greys: tuple[int, int], preference: str, **more: Any) -> dict[str, Any]:
    cells = {
        f"image_{side}": {"bytes": encode_png(Image.new("RGB", (8, 8), (grey,) * 3)), "path": None}
        for side, grey in zip("ab", greys, strict=True)
    }
    return {"id": name, "prompt": f"prompt {name}", "preference": preference, **cells, **more}


@pytest.fixture
def config(write_pairs: Callable[..., str], tmp_path: Path) -> RelabelConfig:
    rows = [
        row("kept", LIGHT, "a", p_a=0.9, votes_a=9, votes_b=1),
        row("turned", LIGHT, "b", axis="beauty", source="people"),
        row("was a tie", DARK, "tie"),
        row("equal", EQUAL, "a"),
        row("bad", LIGHT, "both_bad"),
    ]
    return RelabelConfig(write_pairs(rows), (f"{HERE}:brightness",), str(tmp_path / "new.parquet"), scales=(50.0,))


def test_relabel_writes_new_and_given_labels(config: RelabelConfig) -> None:
    done = relabel(config)
    assert done is not None
    rows = load_pairs(str(done.path))
    by = {one["id"]: one for one in rows}
    assert {name: one["preference"] for name, one in by.items()} == {
        "kept": "a",
        "turned": "a",
        "was a tie": "b",
        "equal": "tie",
        "bad": "both_bad",
    }
    assert by["turned"]["p_a"] == pytest.approx(1 / (1 + math.exp(-2))) and by["was a tie"]["p_a"] == pytest.approx(
        1 / (1 + math.exp(2.4))
    )
    assert by["equal"]["p_a"] == 0.5 and by["bad"]["p_a"] is None
    assert by["kept"]["given_preference"] == "a" and by["kept"]["given_p_a"] == 0.9 and by["kept"]["votes_a"] == 9
    assert by["turned"]["given_preference"] == "b" and by["turned"]["axis"] == "beauty"
    assert by["turned"]["source"] == f"people, relabelled by {HERE}:brightness"
    assert by["kept"]["judged"] == [
        {"judge": f"{HERE}:brightness", "score_a": 200.0, "score_b": 100.0, "p_a": by["kept"]["p_a"]}
    ]
    assert by["kept"]["score_a"] - by["kept"]["score_b"] == pytest.approx(2.0)
    assert sorted(drop_ties(rows)["id"]) == ["kept", "turned", "was a tie"]
    counts = {key: value for key, value in done.summary.items() if isinstance(value, int)}
    assert list(counts.values()) == [5, 5, 0, 0, 2, 1, 1, 1]
    written = json.loads(Path(config.output).with_suffix(".json").read_text())
    assert written == done.summary and written["judges"][0]["with the set's label"] == 1


def test_labels_equal_scores_never_become_wins() -> None:
    rng = np.random.default_rng(0)
    scores = np.repeat(rng.normal(size=(3, 50, 1)), 2, axis=2)
    tied = labels(scores, [0.1, 1.0, math.inf], np.full(50, 0.5))
    assert [module._preference(p, "a", 0.0) for p in tied.p] == ["tie"] * 50
    two = np.array([[[0.3, 0.1]], [[0.1, 0.3]]])
    (p,) = labels(two, [0.7, 0.7], np.array([0.5])).p
    assert module._preference(p, "b", 0.0) == "tie", "opposite judges give a tie"
    assert module._preference(0.52, "a", 0.05) == "tie" and module._preference(0.56, "b", 0.05) == "a"


@pytest.mark.parametrize("trust", [None, 0.75])
def test_labels_swapped_pair_returns_opposite_label(trust: float | None) -> None:
    rng = np.random.default_rng(1)
    scores, given = rng.normal(size=(4, 200, 2)), rng.choice([0.0, 0.3, 0.5, 1.0], 200)
    units = [0.5, 1.0, 2.0, 7.0]
    one = labels(scores, units, given, trust=trust, agreement=0.75)
    other = labels(scores[..., ::-1], units, 1 - given, trust=trust, agreement=0.75)
    np.testing.assert_allclose(one.p, 1 - other.p, atol=1e-12)
    np.testing.assert_allclose(one.each, 1 - other.each, atol=1e-12)
    assert (one.accepted == other.accepted).all() and 0 < one.accepted.sum() < 200


def test_labels_equal_mean_of_logistic_differences() -> None:
    scores = np.array([[[3.0, 1.0]], [[0.0, 0.5]]])
    (p,) = labels(scores, [2.0, 0.25], np.array([1.0])).p
    assert p == pytest.approx((1 / (1 + math.exp(-1)) + 1 / (1 + math.exp(2))) / 2)
    (trusted,) = labels(scores, [2.0, 0.25], np.array([1.0]), trust=0.8).p
    assert trusted / (1 - trusted) == pytest.approx(p / (1 - p) * 4)
    (half,) = labels(scores, [2.0, 0.25], np.array([0.75]), trust=0.8).p
    assert half / (1 - half) == pytest.approx(p / (1 - p) * 0.65 / 0.35)


def test_labels_disagreement_is_not_accepted() -> None:
    gaps = np.array([[1, 1, 1, 1], [1, 1, 1, -1], [1, 0, -1, -1], [1, 1, -1, 0]], dtype=float)
    scores = np.stack([gaps, np.zeros_like(gaps)], axis=2)
    accepted = {
        level: labels(scores, [1.0] * 4, np.full(4, 0.5), agreement=level).accepted.tolist()
        for level in (0.5, 0.8, 1.0)
    }
    assert accepted == {0.5: [True] * 4, 0.8: [True, True, False, False], 1.0: [True, False, False, False]}


def test_most_likely_unit_maximises_the_likelihood() -> None:
    rng = np.random.default_rng(2)
    gaps = rng.normal(scale=30, size=400)
    given = (rng.random(400) < 1 / (1 + np.exp(-gaps / 12))).astype(float)
    size = spread(gaps)
    assert size == pytest.approx(math.sqrt((gaps**2).mean()))

    def loss(log_unit: float) -> float:
        z = np.append(gaps, [size, size]) / math.exp(log_unit)
        y = np.append(given, [1, 0])
        return float((y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z)).sum())

    best = minimize_scalar(loss, bounds=(-2, 8), method="bounded", options={"xatol": 1e-6}).x
    assert (
        most_likely_unit(gaps, given) == pytest.approx(math.exp(best), rel=1e-3)
        and 9 < most_likely_unit(gaps, given) < 16
    )
    assert math.isinf(most_likely_unit(gaps, 1 - given)) and math.isinf(most_likely_unit(np.zeros(5), np.ones(5)))
    (p,) = labels(np.array([[[9.0, 1.0]]]), [math.inf], np.array([1.0])).p
    assert p == 0.5, "a judge that is right no more often than wrong has no weight"
    assert math.isfinite(most_likely_unit(np.ones(100), np.ones(100)))


def test_given_probability_uses_p_a_then_votes_then_preference() -> None:
    no_label = {"p_a": None, "votes_a": None, "votes_b": None}
    assert given_probability({**no_label, "preference": "a", "p_a": 0.3}) == 0.3
    assert given_probability({**no_label, "preference": "a", "votes_a": 3, "votes_b": 1}) == 0.75
    assert [given_probability({**no_label, "preference": one}) for one in ("a", "b", "tie", "both_bad")] == [
        1,
        0,
        0.5,
        0.5,
    ]


def test_relabel_accepts_every_kind_of_judge(config: RelabelConfig) -> None:
    judges = tuple(f"{HERE}:{name}" for name in ("brightness", "darkness", "brighter"))
    done = relabel(dataclasses.replace(config, judges=judges, scales=(), agreement=0.6))
    assert done is not None
    preferences = {one["id"]: [judged["p_a"] > 0.5 for judged in one["judged"]] for one in load_pairs(str(done.path))}
    assert preferences["kept"] == [True, False, True] and preferences["was a tie"] == [False, True, False]
    units = [judge["unit"] for judge in done.summary["judges"]]
    assert units[0] == units[1] == pytest.approx(math.sqrt((3 * 100**2 + 120**2) / 5))
    assert units[2] == pytest.approx(math.sqrt(4 / 5))


def source_darkness(
    images: Sequence[Image.Image], prompts: Sequence[str], sources: Sequence[Sequence[Image.Image]]
) -> list[float]:
    return [
        -abs(brightness([image], [""])[0] - brightness([source], [""])[0])
        for image, (source,) in zip(images, sources, strict=True)
    ]


source_darkness.takes_sources = True  # type: ignore[attr-defined]


def test_judge_of_edits_relabels_by_each_rows_image_to_edit(
    config: RelabelConfig, write_pairs: Callable[..., str]
) -> None:
    """It catches sources of another row, and one of side a that side b does not get."""
    grey = lambda value: {"bytes": encode_png(Image.new("RGB", (8, 8), (value,) * 3)), "path": None}
    near = [row("a", (10, 200), "tie", image_source=grey(20)), row("b", (10, 200), "tie", image_source=grey(190))]
    edits = dataclasses.replace(config, judges=(f"{HERE}:source_darkness",), pairs=write_pairs(near))
    done = relabel(edits)
    assert done and load_pairs(str(done.path))["preference"] == ["a", "b"]
    without = write_pairs([near[0], row("c", (1, 2), "a")])
    with pytest.raises(ValueError, match=r"row 1: no image_source\. Judge '.*source_darkness' scores edits"):
        relabel(dataclasses.replace(edits, pairs=without, overwrite=True))


def test_relabel_interrupted_run_skips_finished_shards(config: RelabelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config, real, calls = dataclasses.replace(config, shard_size=2), module._score_shard, []

    def cut(part: Any, *arguments: Any, **more: Any) -> Any:
        calls.append(list(part["id"]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(part, *arguments, **more)

    monkeypatch.setattr(module, "_score_shard", cut)
    with pytest.raises(KeyboardInterrupt):
        relabel(config)
    relabel(config)
    assert calls == [["kept", "turned"], ["was a tie", "equal"], ["was a tie", "equal"], ["bad"]]
    other = dataclasses.replace(config, trust=0.9, scales=(10.0,))
    with pytest.raises(ValueError, match=r"has another result\. .* replace it with --overwrite"):
        relabel(other)
    relabel(dataclasses.replace(other, overwrite=True))
    assert len(calls) == 4, "another rule for labels must not score again"
    with pytest.raises(ValueError, match=r"judged with other settings \(judges"):
        relabel(dataclasses.replace(config, judges=(f"{HERE}:darkness",)))


def test_relabel_processes_divide_the_shards(config: RelabelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(config, shard_size=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert relabel(config) is None
    monkeypatch.setenv("RANK", "0")
    done = relabel(config)
    assert done is not None and len(load_pairs(str(done.path))) == 5


def test_relabel_undecodable_image_raises_or_is_left_out(
    write_pairs: Callable[..., str], config: RelabelConfig
) -> None:
    bad = row("cut", LIGHT, "a")
    bad["image_b"] = {"bytes": bad["image_b"]["bytes"][:40], "path": None}
    config = dataclasses.replace(config, pairs=write_pairs([row("whole", LIGHT, "b"), bad]))
    with pytest.raises(ValueError, match=r"row 1: an image does not decode .*--undecodable-images drop"):
        relabel(config)
    done = relabel(dataclasses.replace(config, undecodable_images="drop"))
    assert done is not None and list(load_pairs(str(done.path))["id"]) == ["whole"]
    assert done.summary["left out, an image does not decode"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"judges": ()}, "judges is empty"),
        ({"judges": ("faithfulnes",)}, "did you mean 'faithfulness'"),
        ({"judges": (f"{HERE}:broken",), "scales": ()}, "returned nan for prompt 'prompt kept'"),
        ({"scale": "wide"}, "'spread' or 'labels'"),
        ({"scales": (1.0, 2.0)}, "a number above 0 for each of 1 judges"),
        ({"scales": (0.0,)}, "a number above 0"),
        ({"trust": 1.0}, "a probability in"),
        ({"agreement": 0.3}, r"agreement in \[0\.5, 1\]"),
        ({"undecodable_images": "skip"}, "'raise' or 'drop'"),
        ({"output": "new"}, r"ends in \.parquet"),
        (
            {"judges": (f"{HERE}:brightness", f"{HERE}:darkness"), "scales": (), "agreement": 1.0, "pairs": "light"},
            "agree on none",
        ),
    ],
)
def test_relabel_invalid_settings_are_rejected(
    change: dict[str, Any], message: str, config: RelabelConfig, write_pairs: Callable[..., str]
) -> None:
    if change.get("pairs") == "light":
        change = {**change, "pairs": write_pairs([row("light", LIGHT, "a")])}
    with pytest.raises(ValueError, match=message):
        relabel(dataclasses.replace(config, **change))


def test_relabelled_dataset_trains(tiny_model: str, pairs: str, tmp_path: Path) -> None:
    from dpo_mm.config import TrainConfig
    from dpo_mm.training.run import train

    done = relabel(RelabelConfig(pairs, (f"{HERE}:brightness",), str(tmp_path / "new.parquet")))
    assert done is not None
    trained = train(
        TrainConfig(
            tiny_model,
            str(done.path),
            str(tmp_path / "out"),
            objective="soft",
            steps=1,
            batch_size=2,
            lora_rank=2,
            lora_alpha=2,
            eval_fraction=0,
            log_every=1,
        )
    )
    first = next(entry["loss"] for entry in trained.history if "loss" in entry)
    assert first == pytest.approx(math.log(2), rel=1e-4), (
        "policy and reference agree at the first step, whatever the label"
    )
