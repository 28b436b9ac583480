"""Comparison of responses: ratios and verdicts, notes, and the report with highlighted errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpo_mm.config import CompareResponsesConfig
from dpo_mm.data.lazy_images import LazyImages
from dpo_mm.data.questions import Question
from dpo_mm.data.schema import Response
from dpo_mm.evaluation import compare_responses as module
from dpo_mm.evaluation.compare_responses import (
    ScoredResponses,
    compare_responses,
    comparisons,
    examples,
    note_counts,
    note_tokens,
    score_responses,
)
from dpo_mm.evaluation.statistics import paired_ratios
from dpo_mm.evaluation.verdict import run_summary
from dpo_mm.policies.families import load_policy
from tests.contracts.tiny_vlms import save

RED = Image.new("RGB", (8, 8), "#ff0000")
TRUTH = "a red circle and a blue star."
QUESTIONS = [Question(str(n), (RED,), "Describe the picture.", TRUTH, f"{n % 2} things") for n in range(40)]
CONFIG = CompareResponsesConfig("m", "o", "q", judges=("chair_s", "chair_i", "recall", "num_words"), guards=("recall",))


def scored(texts: list[str], config: CompareResponsesConfig = CONFIG) -> ScoredResponses:
    return score_responses([Response(text, len(text.split()), False) for text in texts], QUESTIONS, config)


HALLUCINATED, RIGHT, SHORT = "a red circle, a blue star and a green cross.", TRUTH, "a red circle."


def test_rate_is_sum_over_sum_and_interval_contains_difference() -> None:
    base, tuned = scored([HALLUCINATED] * 30 + [RIGHT] * 10), scored([HALLUCINATED] * 10 + [RIGHT] * 30)
    results = {one.judge: one for one in comparisons(base, tuned, CONFIG)}
    assert results["chair_i"].base == pytest.approx(30 / 110) and results["chair_i"].tuned == pytest.approx(10 / 90)
    assert results["chair_i"].low < results["chair_i"].difference < results["chair_i"].high < 0
    assert results["chair_i"].verdict == "better" and results["chair_s"].headline and results["chair_s"].wins == 20
    assert results["recall"].verdict == "no evidence" and results["num_words"].verdict == "differs"


def test_shorter_responses_with_lower_recall_are_over_optimised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sides = {"base": scored([HALLUCINATED] * 40), "tuned": scored([SHORT] * 40)}
    monkeypatch.setattr(module, "read_questions", lambda *_, **__: QUESTIONS)
    monkeypatch.setattr(module, "_load", lambda *_: None)
    monkeypatch.setattr(module, "generate_responses", lambda *_, base, **__: sides["base" if base else "tuned"])
    config = dataclasses.replace(CONFIG, output_dir=str(tmp_path))
    assert compare_responses(config, title="t", command="c").verdict == "over-optimised"
    sides["tuned"] = scored([RIGHT] * 40)
    outcome = compare_responses(config, title="t", command="c")
    assert outcome.verdict == "better" and "40 fixed, 0 broken" in outcome.notes[0]
    page = outcome.report.read_text()
    assert "<mark>green cross</mark>" in page and "CHAIR_i" in page


def test_only_the_images_of_examples_are_decoded() -> None:
    decoded: list[int] = []
    images = LazyImages([lambda: decoded.append(1) or RED])
    questions = [dataclasses.replace(question, images=images) for question in QUESTIONS]
    chosen = examples(scored([HALLUCINATED] * 40), scored([RIGHT] * 40), questions, "chair_s", count=5)
    assert [example.image for example in chosen] == [RED] * 5 and len(decoded) == 5


def test_note_tokens_reports_mean_and_99th_percentile() -> None:
    base = ScoredResponses([Response("", 10, hit_limit=False)] * 98 + [Response("", 200, hit_limit=True)] * 2)
    tuned = ScoredResponses([Response("", 10, hit_limit=False)] * 100)
    expected = "Tokens per response: 13.8 (99th percentile 200) with the base model, 10.0 (99th percentile 10) with the tuned model."
    assert note_tokens(base, tuned) == expected


def test_note_counts_reports_exact_intervals() -> None:
    base, tuned = scored([HALLUCINATED] * 8 + [RIGHT] * 32), scored([RIGHT] * 40)
    note = note_counts(base, tuned, "chair_s")
    assert (
        note is not None
        and note.startswith("CHAIR_s: 8 of 40 responses of the base model")
        and "a relative change of -100 %" in note
    )
    assert "exact McNemar test p = 0.0078" in note
    assert note_counts(base, tuned, "chair_i") is None


def test_examples_list_changed_responses_first_by_category() -> None:
    base, tuned = scored([RIGHT] * 20 + [HALLUCINATED] * 20), scored([RIGHT] * 40)
    shown = examples(base, tuned, QUESTIONS, "chair_s", count=6)
    assert all(one.base == HALLUCINATED and one.base[slice(*one.base_marks[0])] == "green cross" for one in shown)
    assert all(one.note == "base: hallucinated: green cross" for one in shown)


@pytest.mark.parametrize("direction", ["higher", "lower", "neutral"])
def test_equal_ratios_are_no_evidence(direction: str) -> None:
    same = np.tile([1.0, 2.0], (30, 1))
    results = paired_ratios(same, same, metric="m", judge="j", direction=direction)  # type: ignore[arg-type]
    assert results.verdict == "no evidence" and results.difference == 0 and results.ties == 30


def test_fewer_than_six_changed_ratios_are_no_evidence() -> None:
    base, tuned = np.tile([0.0, 1.0], (400, 1)), np.tile([0.0, 1.0], (400, 1))
    tuned[:5, 0] = 1
    assert paired_ratios(base, tuned, metric="m", judge="j").verdict == "no evidence"
    tuned[:40, 0] = 1
    assert paired_ratios(base, tuned, metric="m", judge="j").verdict == "better"


def test_interval_of_ratios_covers_true_difference_in_95_percent() -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(150):
        of = rng.integers(1, 6, (2, 120))
        hits = rng.binomial(of, [[0.3], [0.2]])
        results = paired_ratios(
            np.column_stack([hits[0], of[0]]), np.column_stack([hits[1], of[1]]), metric="m", judge="j"
        )
        covered += results.low <= -0.1 <= results.high
    assert 134 <= covered <= 149


def about_images(of_each: list[str], images: int) -> list[Question]:
    """Questions with these ground truths about each of several images of files."""
    return [
        Question(f"{image}-{n}", LazyImages([lambda: RED], [f"hash-{image}"]), "Is there one?", truth, "all")
        for image in range(images)
        for n, truth in enumerate(of_each)
    ]


def test_questions_about_one_image_have_one_vote() -> None:
    """13 images with 6 questions: tuned is right on all of 8 images and wrong on all of 5, the base the other way round.

    It catches questions that count as independent: 48 of 78 wins of them would be significant at 0.05.
    """
    questions = about_images(["yes"] * 6, 13)
    config = dataclasses.replace(CONFIG, judges=("pope_accuracy",), guards=())
    said = [Response("yes" if n < 48 else "no", 1, hit_limit=False) for n in range(78)]
    turned = [Response("no" if n < 48 else "yes", 1, hit_limit=False) for n in range(78)]
    base, tuned = score_responses(turned, questions, config), score_responses(said, questions, config)
    (result,) = comparisons(base, tuned, config)
    assert (result.n, result.clusters, result.wins, result.losses) == (78, 13, 8, 5)
    assert result.p == pytest.approx(0.581, abs=1e-3) and result.verdict == "no evidence"
    error = np.std([1] * 8 + [-1] * 5, ddof=1) / 13**0.5
    ends = [3 / 13 + sign * 2.179 * error for sign in (-1, 1)]  # t of 12 degrees of freedom, from a table
    assert [result.low, result.high] == pytest.approx(ends, abs=1e-3)
    assert module.note_counts(base, tuned, "pope_accuracy") is None, "McNemar's test takes responses as independent"
    assert "8 images improved" in run_summary([dataclasses.replace(result, headline=True)], "-", unit="images")


def test_clusters_of_one_item_change_nothing() -> None:
    rng = np.random.default_rng(5)
    base, tuned = (np.column_stack([rng.poisson(2, 30), rng.integers(0, 9, 30)]) for _ in range(2))
    alone = paired_ratios(base, tuned, metric="m", judge="j")
    assert paired_ratios(base, tuned, metric="m", judge="j", clusters=np.arange(30)) == alone


def test_questions_about_one_image_only_are_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "read_questions", lambda *_, **__: about_images(["yes", "no", "no"], 1))
    config = dataclasses.replace(CONFIG, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="all are about the same image"):
        compare_responses(config, title="One image", command="c")


def test_invalid_ratios_raise() -> None:
    with pytest.raises(ValueError, match="expected \\(items, 2\\)"):
        paired_ratios([[1, 2]], [[1, 2]], metric="m", judge="j")
    with pytest.raises(ValueError, match="not finite"):
        paired_ratios([[1, 2], [np.nan, 1]], [[1, 2], [1, 1]], metric="m", judge="j")
    with pytest.raises(ValueError, match="not among the judges"):
        compare_responses(dataclasses.replace(CONFIG, guards=("cer",)), title="t", command="c")


def test_real_model_against_itself_has_no_difference(tmp_path: Path) -> None:
    RED.save(tmp_path / "0.png")
    RED.resize((9, 9)).save(tmp_path / "1.png")
    RED.resize((10, 10)).save(tmp_path / "2.png")
    rows = [{"image": f"{n}.png", "prompt": "What?", "ground_truth": "a red field"} for n in range(3)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = CompareResponsesConfig(
        model=save("llava", tmp_path / "model"),
        output_dir=str(tmp_path / "out"),
        questions=str(tmp_path / "q.jsonl"),
        judges=("cer", "num_tokens"),
        max_new_tokens=5,
    )
    outcome = compare_responses(config, title="Itself", command="c")
    assert outcome.verdict == "no evidence" and all(one.difference == 0 for one in outcome.comparisons)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["settings"]["decoding"].startswith("greedy")


def test_base_weights_give_the_responses_of_the_model_without_adapter(tmp_path: Path) -> None:
    model, other = save("llava", tmp_path / "model"), tmp_path / "other"
    policy = load_policy(model)
    changed = load_policy(model)
    for parameter in changed.model.parameters():
        parameter.data.mul_(-1)
    changed.model.save_pretrained(other)
    ask = {"images": [[RED]], "messages": ["What?"], "max_new_tokens": 6, "do_sample": False}
    before = policy.generate(**ask)
    policy.load_adapter(other)
    assert policy.generate(**ask) != before
    with policy.base_weights():
        assert policy.generate(**ask) == before


def test_base_with_an_adapter_is_compared_with_it(tmp_path: Path) -> None:
    """It catches responses of the base that are generated without its adapter."""
    model, other = save("llava", tmp_path / "model"), tmp_path / "other"
    policy = load_policy(model)
    for parameter in policy.model.parameters():
        parameter.data.mul_(-1)
    policy.model.save_pretrained(other)
    RED.save(tmp_path / "red.png")
    (tmp_path / "q.jsonl").write_text(
        json.dumps({"image": "red.png", "prompt": "What?", "ground_truth": "a red field"})
    )
    config = CompareResponsesConfig(
        model=model,
        output_dir=str(tmp_path / "out"),
        questions=str(tmp_path / "q.jsonl"),
        adapter=str(other),
        base_adapter=str(other),
        judges=("cer",),
        max_new_tokens=5,
    )
    policy = module._load(config, config.adapter)
    questions = module.read_questions(config.questions)
    (base,) = module._base_responses(policy, [(config, questions)])
    (plain,) = module._base_responses(policy, [(dataclasses.replace(config, base_adapter=None), questions)])
    tuned = module.generate_responses(policy, questions, config, base=False, title="t", output_dir=tmp_path / "out")
    assert base.responses == tuned.responses != plain.responses


def test_tuned_model_is_prompted_through_its_own_chat_template(tmp_path: Path) -> None:
    model, other = save("llava", tmp_path / "model"), str(tmp_path / "other")
    changed = load_policy(model)
    changed.processor.chat_template += "red field red"
    changed.model.save_pretrained(other)
    changed.processor.save_pretrained(other)
    policy, ask = load_policy(model), {"images": [[RED]], "messages": ["What?"], "max_new_tokens": 6}
    base, own = (load_policy(folder).generate(**ask, do_sample=False) for folder in (model, other))
    policy.load_adapter(other)
    assert base != own
    assert policy.generate(**ask, do_sample=False) == own
    with policy.base_weights():
        assert policy.generate(**ask, do_sample=False) == base
    assert policy.generate(**ask, do_sample=False) == own
