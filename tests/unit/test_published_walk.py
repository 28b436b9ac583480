"""The study of the two published stages: its held-out pages, the settings of its arms, and that it resumes. Nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpo_mm.worlds import documents
from tests.bench import published_walk as walk


def test_held_out_pages_contain_no_page_of_the_bundled_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    known = next(documents.pages(1, 0, held_out=True))
    others = list(documents.pages(3, walk.HELD_OUT_SEED, held_out=True))
    asked = []

    def pages(count: int, seed: int, *, held_out: bool) -> list[documents.DocumentPage]:
        asked.append((seed, held_out))
        return [known, *others] if seed == walk.HELD_OUT_SEED else [known]

    monkeypatch.setattr(documents, "pages", pages)
    walk.held_out_pages.cache_clear()
    questions = walk.held_out_pages(2)
    walk.held_out_pages.cache_clear()
    assert [question.ground_truth for question in questions] == [documents.transcription(page) for page in others[:2]]
    assert asked == [(0, True), (28, True)]


@pytest.mark.parametrize("tuning", walk.TUNINGS)
def test_second_stages_differ_only_in_what_the_study_compares(
    tuning: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "correct_pages", lambda _: "all pages")
    monkeypatch.setattr(walk, "mine_failures", lambda *_: "failures")
    first = walk.training_config(walk.Run("sft", tuning, 2), tmp_path)
    configs = {arm: walk.training_config(walk.Run(arm, tuning, 2), tmp_path) for arm in walk.STAGES}
    assert (first.objective, first.model, first.adapter, first.pairs, first.seed) == (
        "sft",
        walk.MODEL,
        None,
        "all pages",
        2,
    )
    found = {arm: (c.objective, c.batch_size, c.sft_weight, c.pairs) for arm, c in configs.items()}
    assert found == {
        "dpo, 16 per step": ("sigmoid", 16, 1.0, "failures"),
        "more sft, 16 per step": ("sft", 16, 0.0, "all pages"),
        "dpo, 8 per step": ("sigmoid", 8, 1.0, "failures"),
        "more sft, 8 per step": ("sft", 8, 0.0, "all pages"),
        "sft on the failures, 16 per step": ("sft", 16, 0.0, "failures"),
        "sft on the failures, 8 per step": ("sft", 8, 0.0, "failures"),
        "dpo without the sft term, 16 per step": ("sigmoid", 16, 0.0, "failures"),
    }
    start = {(c.model, c.adapter) for c in configs.values()}
    assert start == {(walk.MODEL, first.output_dir) if tuning == "lora" else (first.output_dir, None)}
    assert {(c.steps, c.learning_rate, c.seed, c.tuning) for c in configs.values()} == {
        (60, walk.RATES[tuning], 102, tuning)
    }
    assert len({c.output_dir for c in configs.values()} | {first.output_dir}) == 8


def test_finished_arms_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def train_and_read(run: walk.Run, _: Path) -> dict[str, object]:
        asked.append(f"{run.tuning} {run.name}")
        return {"arm": run.arm, "degeneration": {"hits": [1, 0]}}

    monkeypatch.setattr(walk, "train_and_read", train_and_read)
    arguments = ["walk", str(tmp_path / "out"), "base", "sft", "--tunings", "full", "--work", str(tmp_path / "work")]
    for seeds in ("0", "0,1"):
        monkeypatch.setattr("sys.argv", [*arguments, "--seeds", seeds])
        walk.main()
    assert asked == ["full base-seed0", "full sft-seed0", "full sft-seed1"]
    assert json.loads((tmp_path / "out" / "full" / "sft-seed1.json").read_text())["arm"] == "sft"


def test_models_that_were_trained_read_in_turn_and_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str | None] = []

    def load(model: str, *, adapter: str | None) -> SimpleNamespace:
        return SimpleNamespace(generate=lambda images, prompts, **limits: read.append(adapter))

    monkeypatch.setattr(walk, "load_text_policy", load)
    monkeypatch.setattr(walk, "held_out_pages", lambda count: [])
    sft = tmp_path / "work" / "lora" / "sft-seed0"
    sft.mkdir(parents=True)
    (tmp_path / "out").mkdir()
    arguments = [str(tmp_path / "out"), "base", "sft", "more sft, 16 per step", "--time", "--tunings", "lora"]
    monkeypatch.setattr("sys.argv", ["walk", *arguments, "--work", str(tmp_path / "work")])
    walk.main()
    assert read == [None, str(sft)] * walk.TIMED_ROUNDS
    times = json.loads((tmp_path / "out" / "times.json").read_text())["milliseconds"]["lora"]
    assert {name: len(values) for name, values in times.items()} == {"base": 3, "sft": 3}
