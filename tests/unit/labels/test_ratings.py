"""Ratings from votes, exports for other tools, and fresh images to label."""

from __future__ import annotations

import base64
import io
import json
import math
import uuid
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpo_mm.labels.export import export, model_ratings, open_votes
from dpo_mm.labels.fresh_samples import base_and_adapter, generate_samples, model_names
from dpo_mm.labels.pairs import open_pairs
from dpo_mm.labels.ratings import MEAN_RATING, POINTS_PER_LOGIT, PRIOR, fit_log_odds, rate_models
from dpo_mm.labels.store import Vote, VoteStore
from tests.conftest import noise_image


def vote(pair: str, choice: str, annotator: str = "Ada", is_repeat: bool = False) -> Vote:
    return Vote(annotator, pair, is_repeat, False, choice, 0.0, 1.5)


def test_fit_log_odds_two_models_matches_bisection() -> None:
    """With half a win and half a loss against the average model, the maximum is the root of the slope."""
    wins, losses = 6.0, 2.0

    def slope(r: float) -> float:
        gap = 1 / (1 + math.exp(-2 * r))
        return wins * (1 - gap) - losses * gap - PRIOR * math.tanh(r / 2)

    low, high = 0.0, 5.0
    for _ in range(60):
        low, high = ((low + high) / 2, high) if slope((low + high) / 2) > 0 else (low, (low + high) / 2)
    assert fit_log_odds(np.array([[0, wins], [losses, 0]])) == pytest.approx([low, -low], abs=1e-4)


def test_rate_models_recovers_known_strengths() -> None:
    strength, rng = np.array([1.0, 0.0, -1.0]), np.random.default_rng(0)
    models: dict[str, tuple[str | None, str | None]] = {}
    votes = []
    for n in range(900):
        i, j = list(combinations(range(3), 2))[n % 3]
        won = rng.random() < 1 / (1 + math.exp(strength[j] - strength[i]))
        models[str(n)] = ("ABC"[i], "ABC"[j])
        votes.append(vote(str(n), "ba"[won]))
    ratings = rate_models(votes, models)
    assert [rating.model for rating in ratings] == ["A", "B", "C"]
    for rating, true in zip(ratings, strength, strict=True):
        assert rating.low < MEAN_RATING + POINTS_PER_LOGIT * true < rating.high
        assert 35 < rating.high - rating.low < 90, "the Fisher information of 600 votes gives about 50"
    assert sum(rating.wins for rating in ratings) == sum(rating.losses for rating in ratings) == 900


def test_models_that_no_votes_join_are_rated_in_groups() -> None:
    """It catches one scale for A against B and C against D, and a chain A-B-C that is taken for two groups."""
    models: dict[str, tuple[str | None, str | None]] = {str(n): ("AB", "CD")[n % 2] for n in range(60)}  # type: ignore[misc]
    votes = [vote(str(n), "ab"[n % 20 > (16, 12)[n % 2]]) for n in range(60)]
    ratings = rate_models(votes, {pair: (names[0], names[1]) for pair, names in models.items()})  # type: ignore[index]
    assert [(rating.model, rating.group) for rating in ratings] == [("A", 0), ("B", 0), ("C", 1), ("D", 1)]
    assert ratings[0].rating + ratings[1].rating == pytest.approx(2 * MEAN_RATING)
    assert ratings[2].rating + ratings[3].rating == pytest.approx(2 * MEAN_RATING)
    chain = {"0": ("A", "B"), "1": ("B", "C")}
    assert {rating.group for rating in rate_models([vote("0", "a"), vote("1", "a")], chain)} == {0}


def test_four_equal_votes_do_not_separate_two_models() -> None:
    """It catches intervals of the bootstrap alone: all resamples of equal votes are alike."""
    models: dict[str, tuple[str | None, str | None]] = {str(n): ("A", "B") for n in range(40)}
    best, other = rate_models([vote(str(n), "a") for n in range(4)], models)
    assert best.model == "A" and best.low < other.high and best.low < MEAN_RATING < best.high
    best, other = rate_models([vote(str(n), "a" if n % 8 else "b") for n in range(40)], models)
    assert best.low > other.high


def test_rate_models_many_votes_on_few_pairs_widen_the_interval() -> None:
    """Ten votes on each of six pairs give the interval of six independent pairs."""
    models: dict[str, tuple[str | None, str | None]] = {str(n): ("A", "B") for n in range(60)}
    few = [vote(str(n), "ab"[n == 0], annotator=f"p{person}") for n in range(6) for person in range(10)]
    many = [vote(str(n), "ab"[n < 10]) for n in range(60)]
    wide, narrow = rate_models(few, models)[0], rate_models(many, models)[0]
    assert (wide.wins, wide.losses) == (narrow.wins, narrow.losses) == (50, 10)
    assert wide.high - wide.low > 1.8 * (narrow.high - narrow.low)


def test_rate_models_ignores_skips_repeats_and_unknown_models() -> None:
    models: dict[str, tuple[str | None, str | None]] = {"1": ("A", "B"), "2": ("A", None), "3": ("A", "A")}
    ignored = [vote("1", "skip"), vote("1", "both_bad"), vote("1", "a", is_repeat=True), vote("2", "a"), vote("3", "a")]
    with pytest.raises(ValueError, match="no vote compares two models"):
        rate_models(ignored, models)
    first, second = rate_models([*ignored, vote("1", "tie")], models)
    assert first.rating == pytest.approx(MEAN_RATING, abs=1e-3) and second.ties == first.ties == 1
    unbeaten = rate_models([vote("1", "b")], models)
    assert unbeaten[0].model == "B" and math.isfinite(unbeaten[0].high)


@pytest.fixture
def voted(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Three subfolders of two images. Two people voted on all pairs, and one vote is a skip."""
    for n, model in enumerate(("a", "b", "c")):
        (tmp_path / "set" / model).mkdir(parents=True)
        for name in ("1", "2"):
            noise_image(10 * n + int(name)).save(tmp_path / "set" / model / f"{name}.png")
    rows = open_pairs(str(tmp_path / "set"))
    store = VoteStore(tmp_path / "votes.sqlite", rows["id"], source=str(tmp_path / "set"))
    for annotator in ("Ada", "Bob"):
        for _ in range(6):
            shown = store.next_pair(annotator)
            assert shown is not None
            better = min(shown.pair.split("--")[1:]) == shown.pair.split("--")[1 + shown.swapped]
            skipped = annotator == "Bob" and shown.pair == "1--a--b"
            assert store.cast(annotator, shown.id, "skip" if skipped else "left" if better else "right")
    yield str(store.path), tmp_path


def test_open_votes_folder_of_three_models_pairs_every_two(voted: tuple[str, Path]) -> None:
    store, rows = open_votes(voted[0])
    assert sorted(rows["id"]) == sorted(f"{n}--{a}--{b}" for n in "12" for a, b in ("ab", "ac", "bc"))
    assert [rating.model for rating in model_ratings(store, rows)] == ["a", "b", "c"]
    best = model_ratings(store, rows)[0]
    assert best.losses == best.ties == 0


def test_export_label_studio_writes_tasks(voted: tuple[str, Path]) -> None:
    path, folder = voted
    export(path, str(folder / "tasks.json"), format="label-studio")
    tasks = {task["data"]["id"]: task for task in json.loads((folder / "tasks.json").read_text())}
    assert len(tasks) == 6
    task = tasks["1--a--b"]
    assert {a["completed_by"]["email"]: a["was_cancelled"] for a in task["annotations"]} == {"Ada": False, "Bob": True}
    choices = [a["result"][0]["value"]["choices"] for a in task["annotations"] if a["result"]]
    assert choices == [["a"]] and task["annotations"][0]["lead_time"] >= 0
    assert decode_uri(task["data"]["image_b"]).tobytes() == noise_image(11).tobytes()


def test_export_argilla_writes_records(voted: tuple[str, Path]) -> None:
    path, folder = voted
    export(path, str(folder / "records.json"), format="argilla")
    records = {record["id"]: record for record in json.loads((folder / "records.json").read_text())}
    first, second = records["1--a--b"], records["2--a--c"]
    assert [response["value"] for response in first["responses"]["preference"]] == ["a"], "a skip is no response"
    people = [response["user_id"] for response in second["responses"]["preference"]]
    assert len(set(people)) == 2 and all(uuid.UUID(person) for person in people)
    assert first["responses"]["preference"][0]["user_id"] in people, "a person has the same id in every record"
    assert second["metadata"] == {"model_a": "a", "model_b": "c"}
    with pytest.raises(ValueError, match="format 'argila' is unknown; did you mean 'argilla'"):
        export(path, str(folder / "x.json"), format="argila")


def decode_uri(uri: str) -> Image.Image:
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_generate_samples_two_models_resumes_and_refuses_other_settings(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue squares left of a green star\n")
    other = tmp_path / "other"
    other.symlink_to(tiny_model)
    settings: dict[str, Any] = {"max_prompts": None, "num_inference_steps": 2, "guidance_scale": 1.5}
    models = [tiny_model, str(other)]
    folder = generate_samples(models, str(tmp_path / "prompts.txt"), tmp_path / "samples", **settings)
    rows = open_pairs(str(folder))
    assert sorted(rows["prompt"]) == ["a red circle", "two blue squares left of a green star"]
    assert set(rows["model_a"]) | set(rows["model_b"]) == {"other", Path(tiny_model).name}
    images = {model: (folder / model / "0001.png").read_bytes() for model in {*rows["model_a"], *rows["model_b"]}}
    assert len(set(images.values())) == 1, "the same weights and seed generate the same image"
    (folder / "other" / "0002.png").unlink()
    unchanged = (folder / "other" / "0001.png").stat().st_mtime_ns
    generate_samples(models, str(tmp_path / "prompts.txt"), folder, **settings)
    assert (folder / "other" / "0002.png").exists() and (folder / "other" / "0001.png").stat().st_mtime_ns == unchanged
    with pytest.raises(
        ValueError, match=r"was generated with other settings \(steps: 2 -> 3\)\. Choose another samples_dir"
    ):
        generate_samples(models, str(tmp_path / "prompts.txt"), folder, **settings | {"num_inference_steps": 3})
    with pytest.raises(ValueError, match="expected two or more with different names"):
        generate_samples([tiny_model, tiny_model], str(tmp_path / "prompts.txt"), tmp_path / "x", **settings)


def test_path_with_a_plus_and_adapters_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    """Catches fresh pairs that fail after a training from the `tuned` of an earlier round."""
    model = str(tmp_path / "a+b")
    Path(model).mkdir()
    assert base_and_adapter(f"{model}+x/y+z") == (model, "x/y+z") and base_and_adapter(model) == (model, None)
    assert base_and_adapter("owner/name+lora") == ("owner/name", "lora")
    assert model_names(["m", "m+runs/lora"]) == ["m", "lora"]
    assert model_names(["m+votes/1/tuned", "m+votes/2/tuned"]) == ["1-tuned", "2-tuned"]
