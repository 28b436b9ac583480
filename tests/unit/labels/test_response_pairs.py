"""Pairs of responses: votes on them become rows that training takes, whichever side an earlier label preferred."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dpo_mm.data.schema import Response, load_responses, make_response_rows
from dpo_mm.labels import fresh_responses
from dpo_mm.labels.export import export, model_ratings, open_votes, preset_for
from dpo_mm.labels.fresh_responses import generate_response_pairs
from dpo_mm.labels.pairs import open_pairs, pair_digest
from dpo_mm.labels.response_pairs import response_texts
from dpo_mm.labels.store import VoteStore
from dpo_mm.pages.label_page import pair_html
from tests.conftest import noise_image

TEXTS = [("two red stars", "three red stars"), ("a blue circle", "a blue square"), ("yes", "no"), ("left", "right")]


def response_rows(folder: Path, texts: Sequence[tuple[str, str]] = TEXTS) -> str:
    rows = make_response_rows(
        [
            {
                "id": f"r{n}",
                "images": [noise_image(n)],
                "prompt": f"Question {n}?",
                "chosen": chosen,
                "rejected": rejected,
                "chosen_truncated": False,
                "rejected_truncated": True,
                "score_gap": 0.5,
                "reason": "an earlier judge",
                "chosen_model": "base",
                "rejected_model": "tuned",
                "license": "CC0",
            }
            for n, (chosen, rejected) in enumerate(texts)
        ]
    )
    folder.mkdir(exist_ok=True)
    rows.to_parquet(folder / "responses.parquet")
    return str(folder / "responses.parquet")


def vote(store: VoteStore, annotator: str, choices: dict[str, str]) -> None:
    """Vote a, b, tie or both_bad on each pair."""
    while shown := store.next_pair(annotator):
        choice = choices[shown.pair]
        sides = {"a": ("left", "right"), "b": ("right", "left")}
        assert store.cast(annotator, shown.id, sides[choice][shown.swapped] if choice in sides else choice)


def test_votes_on_responses_become_rows_to_train_on(tmp_path: Path) -> None:
    """It catches an earlier label that survives, sides that are not exchanged together, and ties that become wins."""
    pairs = response_rows(tmp_path)
    rows = open_pairs(pairs)
    store = VoteStore(tmp_path / "votes.sqlite", rows["id"][:], source=pairs)
    for name in ("Ada", "Alan"):
        vote(store, name, {"r0": "b", "r1": "a", "r2": "tie", "r3": "both_bad"})
    vote(store, "Grace", {"r0": "b", "r1": "tie", "r2": "tie", "r3": "b"})
    for row in rows:
        store.record_digest(row["id"], pair_digest(row))
    summary = export(str(store.path), str(tmp_path / "labels.parquet"))
    assert summary["pairs"] == "2 of 4" and "tie 4" in summary["choices"]
    first, second = load_responses(str(tmp_path / "labels.parquet"))
    text = lambda row, side: row[side][0]["content"][0]["text"]
    assert (text(first, "chosen"), text(first, "rejected")) == ("three red stars", "two red stars")
    assert (first["chosen_truncated"], first["rejected_truncated"]) == (True, False)
    assert (first["chosen_model"], first["rejected_model"]) == ("tuned", "base")
    assert (text(second, "chosen"), second["chosen_model"]) == ("a blue circle", "base")
    assert (first["probability"], second["probability"]) == pytest.approx((1, 5 / 6))
    assert all(
        row["score_gap"] is None and row["reason"] is None and row["axis"] == "people" for row in (first, second)
    )
    assert first["source"] == "labelled by 3 people" and first["license"] == "CC0"
    assert first["images"][0].tobytes() == noise_image(0).tobytes()
    best = model_ratings(*open_votes(str(store.path)))[0]
    assert (best.model, best.wins) == ("tuned", 4), "all votes on r0, and Grace's on r3"
    assert preset_for(rows).is_file()
    export(str(store.path), str(tmp_path / "labels.json"), format="label-studio")
    task = json.loads((tmp_path / "labels.json").read_text())[0]["data"]
    assert task["response_b"] == "three red stars" and task["image_1"].startswith("data:image/png;base64,")


def test_shown_responses_hide_their_side_and_mark_differences(tmp_path: Path) -> None:
    """It catches sides that do not follow `swapped`, marks on equal words, and text that is markup."""
    rows = open_pairs(
        response_rows(tmp_path, [("one <b>star</b>\nand\nmore", "two <b>star</b>\nand\nmore"), ("x", "y")])
    )
    plain, swapped = (pair_html(rows[0], 1, "Ada", swapped=swapped) for swapped in (False, True))
    assert plain.index("<mark>one</mark>") < plain.index("<mark>two</mark>")
    assert swapped.index("<mark>two</mark>") < swapped.index("<mark>one</mark>")
    for html in (plain, swapped):
        assert html.count("<mark>") == 2 and "&lt;b&gt;star" in html and "<b>" not in html
        assert html.count('class="text mono"') == 2 and "base" not in html.replace("base64", "")
        assert "chosen" not in html and "rejected" not in html and "earlier judge" not in html
    assert "mono" not in pair_html(rows[1], 2, "Ada", swapped=False)
    loop = pair_html({**rows[1], "chosen": "go " * 60}, 3, "Ada", swapped=False)
    assert "more repeats" in loop and loop.count("go ") < 20


def test_responses_that_cannot_be_labelled_are_named(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "?", "chosen": "yes"}, {"prompt": "?", "chosen": "no", "rejected": "yes"}]
    make_response_rows(rows).to_parquet(tmp_path / "one.parquet")
    with pytest.raises(ValueError, match=r"one\.parquet, row 0: has no rejected response"):
        open_pairs(str(tmp_path / "one.parquet"))
    make_response_rows(rows[1:]).to_parquet(tmp_path / "two.parquet")
    pairs = open_pairs(str(tmp_path / "two.parquet"))
    assert response_texts(pairs[0]).prompt == "?"
    broken = {**pairs[0], "chosen": [{"role": "user", "content": "hello"}]}
    assert "can’t be read. Skip it" in pair_html(broken, 1, "Ada", swapped=False)
    store = VoteStore(tmp_path / "votes.sqlite", pairs["id"][:], source=str(tmp_path / "two.parquet"))
    vote(store, "Ada", {"0": "tie"})
    with pytest.raises(ValueError, match="no pair of responses has a winner"):
        export(str(store.path), str(tmp_path / "labels.parquet"))


class Writer:
    """A text policy that writes the prompt's number of stars, or as many as its adapter says."""

    calls: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, adapter: str | None) -> None:
        self.adapter = adapter

    def generate(self, images: Any, messages: Any, **limits: Any) -> list[Response]:
        self.calls.append(limits)
        words = [f"{len(images[n])} image" for n in range(len(messages))]
        return [Response(f"{self.adapter or 'base'}, {word}"[-limits["max_new_tokens"] :], 3, False) for word in words]


def test_fresh_pairs_of_responses_are_those_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It catches sides that are exchanged, prompts that are used twice, seeds that differ, and equal responses."""
    rows = open_pairs(response_rows(tmp_path, [*TEXTS, *TEXTS]))
    twice = rows.select([0, 0, 1, 2])
    monkeypatch.setattr(fresh_responses, "load_text_policy", lambda model, *, adapter, precision: Writer(adapter))
    monkeypatch.setattr(fresh_responses, "BATCH", 2)
    limits = {"max_new_tokens": 99, "seed": 7, "precision": "fp32"}
    file = tmp_path / "samples" / "pairs.parquet"
    generate_response_pairs(twice, [("m", None), ("m", "run")], file, max_pairs=2, **limits)
    pairs = open_pairs(str(file.parent))
    assert pairs["id"][:] == ["r0", "r1"]
    texts = response_texts(pairs[0])
    assert (texts.prompt, texts.a, texts.b) == ("Question 0?", "base, 1 image", "run, 1 image")
    assert (pairs[0]["chosen_model"], pairs[0]["rejected_model"]) == ("base", "tuned")
    assert pairs[0]["images"][0]["bytes"] == rows[0]["images"][0]["bytes"]
    assert [call["seed"] for call in Writer.calls] == [7, 7] and all(call["do_sample"] for call in Writer.calls)
    with pytest.raises(ValueError, match="the same response to all of 3 prompts"):
        generate_response_pairs(twice, [("m", "x"), ("m", "x")], file, max_pairs=9, **limits)
