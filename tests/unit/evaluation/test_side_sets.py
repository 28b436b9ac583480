"""Side sets: one correction over all metrics, the verdict, the report, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dpo_mm.config import CompareConfig, CompareResponsesConfig, SidePrompts, SideQuestions
from dpo_mm.config.config_parsing import config_from_mapping
from dpo_mm.data.questions import Question
from dpo_mm.data.schema import Response
from dpo_mm.evaluation import compare_responses as module
from dpo_mm.evaluation.compare_images import compare_images
from dpo_mm.evaluation.compare_responses import ScoredResponses, compare_responses, read_question_sets
from dpo_mm.evaluation.finished_comparison import ingredients, read_result
from dpo_mm.evaluation.image_sampling import ImageSampler
from dpo_mm.evaluation.saved_comparison import load_comparison
from dpo_mm.evaluation.tables import terminal_table
from tests.contracts.families import WORDS
from tests.contracts.test_diffusion import config as train_config
from tests.contracts.test_diffusion import randomise_adapter

TRUTH = "a red circle and a blue star."
QUESTIONS = [Question(str(n), (), "Describe it.", TRUTH, "all") for n in range(40)]
CONFIG = CompareResponsesConfig(
    "m",
    "o",
    "here",
    judges=("chair_s", "recall"),
    guards=("recall",),
    side_sets=(SideQuestions("there"), SideQuestions("pages", judges=("cer",))),
)
JUDGE = "tests.unit.evaluation.test_side_sets:brightness"


def brightness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return [float(np.asarray(image).mean()) / 255 for image in images]


def outcome(monkeypatch: pytest.MonkeyPatch, folder: Path, wrong: dict[str, tuple[int, int]]) -> Any:
    """Compare with invented responses. wrong: number of hallucinations of base and tuned by question set."""

    def respond(_: Any, questions: Any, config: CompareResponsesConfig, *, base: bool, **__: Any) -> ScoredResponses:
        count = wrong[config.questions][0 if base else 1]
        texts = ["a red circle, a blue star and a green cross."] * count + [TRUTH] * (40 - count)
        return module.score_responses([Response(text, 9, hit_limit=False) for text in texts], questions, config)

    monkeypatch.setattr(module, "read_questions", lambda *_, **__: QUESTIONS)
    monkeypatch.setattr(module, "_load", lambda *_: None)
    monkeypatch.setattr(module, "generate_responses", respond)
    return compare_responses(dataclasses.replace(CONFIG, output_dir=str(folder)), title="t", command="c")


def test_a_significant_fall_on_a_side_set_is_better_here_worse_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It catches a side set without effect on the verdict, or one that the report, JSON or table leaves out."""
    fallen = outcome(monkeypatch, tmp_path, {"here": (30, 0), "there": (0, 0), "pages": (0, 20)})
    assert fallen.verdict == "better here, worse elsewhere"
    rows = json.loads((tmp_path / "metrics.json").read_text())["comparisons"]
    named = [(row["judge"], row["side_set"], row["verdict"]) for row in rows]
    assert named == [
        ("chair_s", "", "better"),
        ("recall", "", "no evidence"),
        ("chair_s", "there", "no evidence"),
        ("recall", "there", "no evidence"),
        ("cer", "pages", "worse"),
    ]
    assert [row["headline"] for row in rows] == [True, False, False, False, False]
    assert "Worse on side sets: character error rate on pages from 0.000 to" in " ".join(fallen.notes)
    page = fallen.report.read_text()
    assert "Side set pages" in page and "better here, worse elsewhere" in page
    assert "Significantly worse: character error rate on pages" in page
    console = Console(file=io.StringIO(), width=160)
    console.print(terminal_table(fallen.comparisons))
    assert "Side set there" in console.file.getvalue()  # type: ignore[attr-defined]
    assert read_result(tmp_path).comparisons == fallen.comparisons
    fine = outcome(monkeypatch, tmp_path, {"here": (30, 0), "there": (9, 0), "pages": (5, 0)})
    assert fine.verdict == "better" and "No metric got significantly worse on the 2 side sets" in " ".join(fine.notes)


def test_holm_corrects_over_all_primary_and_side_comparisons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It catches a correction within each set: 7 of 7 losses have p 2 / 2^7, which is significant alone, not among five."""
    result = outcome(monkeypatch, tmp_path, {"here": (30, 0), "there": (0, 0), "pages": (0, 7)})
    primary, *_, side = result.comparisons
    assert primary.p_holm == pytest.approx(5 * 2 / 2**30)
    assert side.p == pytest.approx(2 / 2**7) and side.p_holm == pytest.approx(4 * 2 / 2**7)
    assert side.verdict == "no evidence" and result.verdict == "better"


@pytest.mark.slow
def test_side_sets_of_images_are_generated_once_and_resume(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_mm.policies.families import load_policy

    policy = load_policy(tiny_model)
    policy.prepare(train_config())
    randomise_adapter(policy)
    policy.save(tmp_path / "adapter")
    for name, words in (("here", WORDS[:2]), ("there", [WORDS[2], " ".join(WORDS[:2])])):
        (tmp_path / f"{name}.txt").write_text("\n".join(words))
    config = CompareConfig(
        model=tiny_model,
        output_dir=str(tmp_path / "out"),
        adapter=str(tmp_path / "adapter"),
        prompts=str(tmp_path / "here.txt"),
        side_sets=(SidePrompts(str(tmp_path / "there.txt")),),
        images_per_prompt=2,
        judges=(JUDGE,),
        num_inference_steps=2,
    )
    first = compare_images(config, title="t", command="c")
    sides = [(one.side_set, one.headline, one.n) for one in first.comparisons if one.judge == JUDGE]
    assert sides == [("", True, 4), (str(tmp_path / "there.txt"), False, 4)]
    assert len(list((tmp_path / "out" / "pictures" / "tuned-side1").glob("*.png"))) == 4
    assert {pair.prompt for pair in load_comparison(tmp_path / "out", judges=[JUDGE]).pairs} == set(WORDS[:2])
    monkeypatch.setattr(ImageSampler, "_generate_batch", lambda *_: pytest.fail("generated again"))
    assert compare_images(config, title="t", command="c").comparisons == first.comparisons
    before = ingredients(config)["prompts"]
    (tmp_path / "there.txt").write_text("\n".join(WORDS))
    assert ingredients(config)["prompts"] != before


@pytest.mark.parametrize("given", ["a.jsonl,pages", ["a.jsonl", {"questions": "pages"}]])
def test_side_sets_are_names_or_settings(given: Any) -> None:
    values = {"model": "m", "output_dir": "o", "questions": "q", "side_sets": given}
    parsed = config_from_mapping(CompareResponsesConfig, values, source="f")
    assert parsed.side_sets == (SideQuestions("a.jsonl"), SideQuestions("pages"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"question": "a"}], "f: side_sets: 'question' is not a setting; did you mean 'questions'"),
        ([{"judges": "cer"}], "f: side_sets: expected a name, or settings such as {questions: FILE}"),
        (["missing.jsonl"], "side_sets: questions 'missing.jsonl': no such file"),
        ([{"questions": "sums-train", "max_questions": 1}], "side_sets: sums-train has only one entry"),
        (["sums-held-out"], "side_sets: sums-held-out is compared twice"),
        ([{"questions": "sums-train", "judges": "num_words"}], "sums-train has only judges without a better direction"),
    ],
)
def test_wrong_side_sets_are_named(given: Any, message: str) -> None:
    values = {"model": "m", "output_dir": "o", "questions": "sums-held-out", "side_sets": given}
    with pytest.raises(ValueError) as error:
        read_question_sets(config_from_mapping(CompareResponsesConfig, values, source="f"))
    assert message in str(error.value) and "\n" not in str(error.value)
