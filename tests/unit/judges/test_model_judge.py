"""Judges that are a model on a server: rubric scores, preferences in both orders, and replies without a score."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpo_mm.config import CompareResponsesConfig, MineResponsesConfig
from dpo_mm.data.questions import Question, read_questions
from dpo_mm.data.schema import Response
from dpo_mm.evaluation.paired_scores import note_agreement, paired_scores
from dpo_mm.evaluation.response_sampling import ScoredResponses, score_responses
from dpo_mm.judges import load_judge, load_response_judge, metric_of, take_judge_notes
from dpo_mm.judges.model_judge import FOLDER, parse_preference, parse_score, preference
from dpo_mm.judges.provenance import order_judges
from dpo_mm.judges.score_checks import response_ratios
from dpo_mm.mining.mine_responses import build_pair, mine_responses
from dpo_mm.models import model_server
from dpo_mm.recipe import compare
from tests.scripted_server import ScriptedServer, completion, scripted_server

RED = Image.new("RGB", (8, 8), "#ff0000")
QUESTIONS = [Question(f"q{n}", (RED,), f"Copy {n}.", f"line {n}", "all") for n in range(10)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DPO_MM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model_server, "BACKOFF_S", 0.001)
    return tmp_path / "cache" / FOLDER


def tag(body: dict[str, Any], name: str) -> str:
    """Text of a tag in a request to the judge."""
    content = body["messages"][0]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    match = re.search(f"<{name}>\n(.*?)\n</{name}>", text, re.DOTALL)
    assert match, text
    return match[1]


def exact(body: dict[str, Any], name: str) -> float:
    """Characters of a response that are those of its reference."""
    return sum(a == b for a, b in zip(tag(body, name), tag(body, "reference"), strict=False))


def grade(body: dict[str, Any]) -> str:
    """Grade as `cer`, but wrongly for the questions 0 and 5."""
    score = min(10, int(exact(body, "response")))
    return json.dumps({"score": 10 - score if tag(body, "prompt") in ("Copy 0.", "Copy 5.") else score})


def prefer(body: dict[str, Any]) -> str:
    """Prefer as `cer`, but always the first for the questions 0 and 5."""
    first = exact(body, "response_A") > exact(body, "response_B") or tag(body, "prompt") in ("Copy 0.", "Copy 5.")
    return json.dumps({"better": "A" if first else "B"})


@pytest.fixture
def grader() -> Iterator[ScriptedServer]:
    with scripted_server(grade, models=("grader",)) as server:
        yield server


def responses(word: str = "line") -> list[Response]:
    return [Response(f"{word} {n}", 2, hit_limit=False) for n in range(10)]


def ratios(name: str, given: list[Response], questions: list[Question] = QUESTIONS) -> np.ndarray:
    return response_ratios(name, given, [question.ground_truths for question in questions], questions)


def test_rubric_score_sends_rubric_prompt_reference_and_image_once(grader: ScriptedServer, own_cache: Path) -> None:
    """Stored by content. Mutations that it catches: another order, a rubric or a response that is not in the key."""
    name = f"rubric_score:grader@{grader.url}"
    questions = [
        dataclasses.replace(question, rubric="Be exact." if question.id == "q1" else "") for question in QUESTIONS
    ]
    scores = ratios(name, responses(), questions)
    assert scores.tolist() == [[4, 1], *[[6, 1]] * 4, [4, 1], *[[6, 1]] * 4]
    assert len(grader.requests) == 10 == len(list(own_cache.glob("*.json")))
    by_prompt = {tag(body, "prompt"): body for body in grader.requests}
    assert tag(by_prompt["Copy 1."], "rubric") == "Be exact." and "correct" in tag(by_prompt["Copy 2."], "rubric")
    assert tag(by_prompt["Copy 3."], "reference") == "line 3" and tag(by_prompt["Copy 3."], "response") == "line 3"
    assert by_prompt["Copy 1."]["temperature"] == 0
    assert by_prompt["Copy 1."]["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert take_judge_notes([name]) == [
        "rubric_score by grader: 10 replies, 0 of them stored before. They cost 100 tokens of prompts and 30 tokens of replies."
    ]
    assert ratios(name, responses(), questions).tolist() == scores.tolist() and len(grader.requests) == 10
    assert "10 replies, 10 of them stored before" in take_judge_notes([name])[0] and take_judge_notes([name]) == []
    questions[1] = QUESTIONS[1]
    ratios(name, responses(), questions)
    assert len(grader.requests) == 11, "another rubric is another reply"
    ratios(f"rubric_score_text:grader@{grader.url}", responses()[:1], QUESTIONS[:1])
    assert isinstance(grader.requests[-1]["messages"][0]["content"], str)


def test_agreement_with_an_exact_judge(grader: ScriptedServer) -> None:
    """Half of the tuned responses are worse. The grader is wrong on two questions, and on two it prefers the first of any two."""
    names = ("cer", f"rubric_score:grader@{grader.url}")
    config = CompareResponsesConfig("m", "o", "q", judges=names)
    worse = [Response(f"lime {n}" if n % 2 else f"line {n}", 2, hit_limit=False) for n in range(10)]
    better = [Response(f"line {n}" if n % 2 else f"lime {n}", 2, hit_limit=False) for n in range(10)]
    base, tuned = (score_responses(given, QUESTIONS, config) for given in (worse, better))
    assert note_agreement(*paired_scores(base, tuned, QUESTIONS, names), names) == [
        f"{names[1]} agrees with cer on 8 of 10 questions on which both prefer a response."
    ]
    grader.script = prefer
    names = ("cer", f"rubric_prefers:grader@{grader.url}")
    before, after = paired_scores(base, tuned, QUESTIONS, names)
    assert after.ratios[names[1]].tolist() == [
        [0.5, 1],
        [1, 1],
        [0, 1],
        [1, 1],
        [0, 1],
        [0.5, 1],
        [0, 1],
        [1, 1],
        [0, 1],
        [1, 1],
    ]
    assert (before.ratios[names[1]] + after.ratios[names[1]]).tolist() == [[1, 2]] * 10
    assert note_agreement(before, after, names) == [
        f"{names[1]} agrees with cer on 8 of 8 questions on which both prefer a response."
    ]
    requested = len(grader.requests)
    same = ScoredResponses(worse, base.ratios)
    assert paired_scores(same, same, QUESTIONS, names)[0].ratios[names[1]].tolist() == [[0.5, 1]] * 10
    assert len(grader.requests) == requested, "equal responses are a tie without a request"


def test_reply_without_a_score_is_left_out_on_both_sides_and_counted() -> None:
    """Mutations that it catches: a refusal scored 0, or left out on one side only."""

    def script(body: dict[str, Any]) -> Any:
        refused = {
            "Copy 1.": (200, completion(None, refusal="I will not.")),
            "Copy 2.": "I'm sorry, I can't grade this.",
        }
        text = tag(body, "response")
        if text.startswith("good") and tag(body, "prompt") in refused:
            return refused[tag(body, "prompt")]
        return "What a page!" if text == "bad 3" else '{"score": 8}' if text.startswith("good") else '{"score": 2}'

    with scripted_server(script, models=("grader",)) as server:
        name = f"rubric_score:grader@{server.url}"
        config = CompareResponsesConfig("m", "o", "q", judges=(name,))
        base, tuned = (score_responses(responses(word), QUESTIONS, config) for word in ("bad", "good"))
    assert tuned.ratios[name][:4].tolist() == [[8, 1], [0, 0], [0, 0], [8, 1]]
    pair = paired_scores(base, tuned, QUESTIONS, [name])
    for scored, score in zip(pair, (2, 8), strict=True):
        assert scored.ratios[name].tolist() == [[score, 1], [0, 0], [0, 0], [0, 0], *[[score, 1]] * 6]
    assert (
        "20 replies, 0 of them stored before. 2 refusals and 1 unparsable replies give no score."
        in take_judge_notes([name])[0]
    )


def test_comparison_reports_scores_preferences_tokens_and_agreement(tmp_path: Path) -> None:
    """One server responds, another one judges. Question 3 has no score."""

    def judge(body: dict[str, Any]) -> str:
        if tag(body, "prompt") == "Copy 3.":
            return "I cannot judge."
        return grade(body) if "score" in body["messages"][0]["content"][-1]["text"] else prefer(body)

    for n in range(10):
        RED.resize((8, 8 + n)).save(tmp_path / f"{n}.png")
    rows = [
        {"image": f"{n}.png", "prompt": f"Copy {n}.", "ground_truth": f"line {n}", "rubric": f"Line {n}."}
        for n in range(10)
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [question.rubric for question in read_questions(str(tmp_path / "q.jsonl"), rubric="all")][:2] == [
        "Line 0.",
        "Line 1.",
    ]
    assert read_questions("sums-held-out", limit=1, rubric="all")[0].rubric == "all"
    line = lambda body: "line" if body["model"] == "tuned" else "l"
    with scripted_server(line) as server, scripted_server(judge, models=("grader",)) as grader:
        names = ("cer", f"rubric_score:grader@{grader.url}", f"rubric_prefers:grader@{grader.url}")
        config = CompareResponsesConfig(
            "m", str(tmp_path / "out"), str(tmp_path / "q.jsonl"), judges=names,
            server=server.url, served="base", served_tuned="tuned",
        )  # fmt: skip
        result = compare(config)
    cer, score, preferred = result.comparisons
    assert cer.n == 10 and score.n == preferred.n == 9
    assert (preferred.base, preferred.tuned) == (1 / 9, 8 / 9), "question 0 and 5 are ties"
    assert score.metric == "rubric score, 0 to 10 (grader)" and (score.base, score.tuned) == (
        (7 + 18) / 9,
        (28 + 12) / 9,
    )
    notes = "\n".join(result.notes)
    assert "agrees with cer on 7 of 9" in notes and "agrees with cer on 7 of 7" in notes
    assert "20 replies, 0 of them stored before. 2 refusals and 0 unparsable" in notes


def test_mining_never_rejects_a_response_for_a_missing_score(grader: ScriptedServer) -> None:
    name = f"rubric_score_text:grader@{grader.url}"
    grader.script = lambda body: {"bad": "3", "no score": "?"}.get(tag(body, "response"), "9")
    given = MineResponsesConfig("m", "q", "o", name)
    several = [Response(text, 2, hit_limit=False) for text in ("no score", "bad", "good")]
    row = build_pair(QUESTIONS[0], several, ["greedy", "one", "two"], given)
    assert row is not None and (row["rejected"], row["score_gap"], row["axis"]) == ("bad", 6, name)
    assert build_pair(QUESTIONS[0], several[:1], ["greedy"], given) is None
    grader.script = lambda body: "no" if tag(body, "response") == "line 1" else "3"
    assert build_pair(QUESTIONS[1], several[1:2], ["greedy"], given) is None, "chosen has no score"


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"score": 7}', 7), ('```json\n{"score": 10}\n```', 10), ("**Score:** 6.5", 6.5), ("Score: 8/10", 8), ("4", 4), ("9/10.", 9),
        ('<think>The score: 2?</think>{"score": 3}', 3), ("The score is 0", 0), ("score: 80/100", None), ('{"score": 11}', None),
        ('{"score": -3}', None), ("score: 3 or score: 4", None), ("I give 7 of 9", None), ("", None), ("-1", None),
    ],
)  # fmt: skip
def test_parse_score(text: str, score: float | None) -> None:
    assert parse_score(text) == score


@pytest.mark.parametrize(
    ("text", "better"),
    [
        ('{"better": "A"}', "A"), ("**Better:** response B", "B"), ('{"better": "tie"}', "tie"), ("b", "B"), ("[[A]]", "A"),
        ("Tie.", "tie"), ("better: A, better: B", None), ("A and B", None), ("I can't say", None), ("Apples are better", None),
    ],
)  # fmt: skip
def test_parse_preference(text: str, better: str | None) -> None:
    assert parse_preference(text) == better


def test_preference_needs_both_orders() -> None:
    assert preference("A", "B") == (1, 1) and preference("B", "A") == (0, 1)
    assert (
        preference("A", "A") == preference("B", "B") == preference("tie", "A") == preference("tie", "tie") == (0.5, 1)
    )
    assert preference(None, "A") == preference("A", None) == (0, 0)


def test_judges_that_do_not_fit_are_refused() -> None:
    name = "rubric_score:grader@http://127.0.0.1:1/v1"
    assert metric_of(name) == "rubric score, 0 to 10 (grader)"
    with pytest.raises(ValueError, match=r"scores responses to questions\. Use it with compare or mine"):
        load_judge(name)
    for short in ("rubric_score", "rubric_score:grader", "rubric_prefers@http://127.0.0.1:1/v1"):
        with pytest.raises(
            ValueError, match=r"needs the name and the server of its model. Write rubric_\w+:MODEL@http"
        ):
            load_response_judge(short)
    given = MineResponsesConfig("m", "q", "o", "rubric_prefers:grader@http://127.0.0.1:1/v1")
    with pytest.raises(ValueError, match="compares two responses and does not score one"):
        mine_responses(given)


def test_model_that_built_the_pairs_is_not_the_primary_metric_at_another_address() -> None:
    built = ["rubric_score:grader@http://127.0.0.1:1/v1"]
    again = ["rubric_prefers:grader@http://127.0.0.1:2/v1", "cer"]
    assert order_judges(again, built) == ("cer", again[0])
    assert order_judges(["rubric_score:other@http://127.0.0.1:1/v1", "cer"], built)[0].startswith("rubric_score:other")


def test_rubric_that_no_judge_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rubric: none of the judges reads it"):
        compare(CompareResponsesConfig("m", str(tmp_path / "o"), "sums-held-out", judges=("cer",), rubric="Be exact."))
