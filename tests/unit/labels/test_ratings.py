"""Ratings from votes, votes for other tools, fresh samples to vote on."""

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
from dpo_mm.labels.fresh_samples import draw_samples
from dpo_mm.labels.pairs import open_pairs
from dpo_mm.labels.ratings import MEAN, POINTS, PRIOR, fit, ratings
from dpo_mm.labels.store import Vote, VoteStore
from tests.conftest import picture


def vote(pair: str, said: str, who: str = "Ada", again: bool = False) -> Vote:
    return Vote(who, pair, again, False, said, 0.0, 1.5)


def test_two_models_by_hand() -> None:
    """w wins of n with half a win and half a loss against the average: the root of a sum, found by bisection."""
    wins, losses = 6.0, 2.0

    def slope(r: float) -> float:
        gap = 1 / (1 + math.exp(-2 * r))
        return wins * (1 - gap) - losses * gap - PRIOR * math.tanh(r / 2)

    low, high = 0.0, 5.0
    for _ in range(60):
        low, high = ((low + high) / 2, high) if slope((low + high) / 2) > 0 else (low, (low + high) / 2)
    assert fit(np.array([[0, wins], [losses, 0]])) == pytest.approx([low, -low], abs=1e-4)


def test_known_strengths_are_found_again() -> None:
    strength, rng = np.array([1.0, 0.0, -1.0]), np.random.default_rng(0)
    models: dict[str, tuple[str | None, str | None]] = {}
    votes = []
    for n in range(900):
        i, j = list(combinations(range(3), 2))[n % 3]
        won = rng.random() < 1 / (1 + math.exp(strength[j] - strength[i]))
        models[str(n)] = ("ABC"[i], "ABC"[j])
        votes.append(vote(str(n), "ba"[won]))
    found = ratings(votes, models)
    assert [one.model for one in found] == ["A", "B", "C"]
    for one, true in zip(found, strength, strict=True):
        assert one.low < MEAN + POINTS * true < one.high
        assert 35 < one.high - one.low < 90, "by the information of 600 votes, about 50"
    assert sum(one.wins for one in found) == sum(one.losses for one in found) == 900


def test_people_who_agree_on_few_pairs_are_not_many_votes() -> None:
    """Ten people on each of six pairs: the interval is that of six pairs."""
    models: dict[str, tuple[str | None, str | None]] = {str(n): ("A", "B") for n in range(60)}
    few = [vote(str(n), "ab"[n == 0], who=f"p{who}") for n in range(6) for who in range(10)]
    many = [vote(str(n), "ab"[n < 10]) for n in range(60)]
    wide, narrow = ratings(few, models)[0], ratings(many, models)[0]
    assert (wide.wins, wide.losses) == (narrow.wins, narrow.losses) == (50, 10)
    assert wide.high - wide.low > 1.8 * (narrow.high - narrow.low)


def test_what_says_nothing_is_left_out() -> None:
    models: dict[str, tuple[str | None, str | None]] = {"1": ("A", "B"), "2": ("A", None), "3": ("A", "A")}
    silent = [vote("1", "skip"), vote("1", "both_bad"), vote("1", "a", again=True), vote("2", "a"), vote("3", "a")]
    with pytest.raises(ValueError, match="no vote compares two models"):
        ratings(silent, models)
    first, second = ratings([*silent, vote("1", "tie")], models)
    assert first.rating == pytest.approx(MEAN, abs=1e-3) and second.ties == first.ties == 1
    unbeaten = ratings([vote("1", "b")], models)
    assert unbeaten[0].model == "B" and math.isfinite(unbeaten[0].high)


@pytest.fixture
def voted(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Three folders of two pictures, all pairs of them voted on twice, one answer a skip."""
    for place, side in enumerate(("a", "b", "c")):
        (tmp_path / "set" / side).mkdir(parents=True)
        for name in ("1", "2"):
            picture(10 * place + int(name)).save(tmp_path / "set" / side / f"{name}.png")
    rows = open_pairs(str(tmp_path / "set"))
    store = VoteStore(tmp_path / "votes.sqlite", rows["id"], source=str(tmp_path / "set"))
    for who in ("Ada", "Bob"):
        for _ in range(6):
            shown = store.show(who)
            assert shown is not None
            better = min(shown.pair.split("--")[1:]) == shown.pair.split("--")[1 + shown.swapped]
            skipped = who == "Bob" and shown.pair == "1--a--b"
            assert store.cast(who, shown.id, "skip" if skipped else "left" if better else "right")
    yield str(store.path), tmp_path


def test_every_two_of_several_folders_are_pairs(voted: tuple[str, Path]) -> None:
    store, rows = open_votes(voted[0])
    assert sorted(rows["id"]) == sorted(f"{n}--{a}--{b}" for n in "12" for a, b in ("ab", "ac", "bc"))
    assert [one.model for one in model_ratings(store, rows)] == ["a", "b", "c"]
    best = model_ratings(store, rows)[0]
    assert best.losses == best.ties == 0


def test_label_studio_tasks(voted: tuple[str, Path]) -> None:
    path, folder = voted
    export(path, str(folder / "tasks.json"), form="label-studio")
    tasks = {task["data"]["id"]: task for task in json.loads((folder / "tasks.json").read_text())}
    assert len(tasks) == 6
    one = tasks["1--a--b"]
    assert {a["completed_by"]["email"]: a["was_cancelled"] for a in one["annotations"]} == {"Ada": False, "Bob": True}
    said = [a["result"][0]["value"]["choices"] for a in one["annotations"] if a["result"]]
    assert said == [["a"]] and one["annotations"][0]["lead_time"] >= 0
    assert decoded(one["data"]["image_b"]).tobytes() == picture(11).tobytes()


def test_argilla_records(voted: tuple[str, Path]) -> None:
    path, folder = voted
    export(path, str(folder / "records.json"), form="argilla")
    records = {record["id"]: record for record in json.loads((folder / "records.json").read_text())}
    one, two = records["1--a--b"], records["2--a--c"]
    assert [answer["value"] for answer in one["responses"]["preference"]] == ["a"], "a skip is no response"
    people = [answer["user_id"] for answer in two["responses"]["preference"]]
    assert len(set(people)) == 2 and all(uuid.UUID(person) for person in people)
    assert one["responses"]["preference"][0]["user_id"] in people, "a person is the same in every record"
    assert two["metadata"] == {"model_a": "a", "model_b": "c"}
    with pytest.raises(ValueError, match="form 'argila' is unknown; did you mean 'argilla'"):
        export(path, str(folder / "x.json"), form="argila")


def decoded(uri: str) -> Image.Image:
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_fresh_samples_of_two_models(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue squares left of a green star\n")
    other = tmp_path / "other"
    other.symlink_to(tiny_model)
    settings: dict[str, Any] = {"limit": None, "steps": 2, "guidance": 1.5}
    models = [tiny_model, str(other)]
    folder = draw_samples(models, str(tmp_path / "prompts.txt"), tmp_path / "samples", **settings)
    rows = open_pairs(str(folder))
    assert sorted(rows["prompt"]) == ["a red circle", "two blue squares left of a green star"]
    assert set(rows["model_a"]) | set(rows["model_b"]) == {"other", Path(tiny_model).name}
    pictures = {side: (folder / side / "0001.png").read_bytes() for side in {*rows["model_a"], *rows["model_b"]}}
    assert len(set(pictures.values())) == 1, "the same weights from the same seed draw the same picture"
    (folder / "other" / "0002.png").unlink()
    kept = (folder / "other" / "0001.png").stat().st_mtime_ns
    draw_samples(models, str(tmp_path / "prompts.txt"), folder, **settings)
    assert (folder / "other" / "0002.png").exists() and (folder / "other" / "0001.png").stat().st_mtime_ns == kept
    with pytest.raises(
        ValueError, match=r"was drawn with other settings \(steps: 2 -> 3\)\. Choose another samples_dir"
    ):
        draw_samples(models, str(tmp_path / "prompts.txt"), folder, **settings | {"steps": 3})
    with pytest.raises(ValueError, match="expected two or more with different names"):
        draw_samples([tiny_model, tiny_model], str(tmp_path / "prompts.txt"), tmp_path / "x", **settings)
