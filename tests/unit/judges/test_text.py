"""Judges of responses, on texts with a known result."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_mm.data.schema import Response
from dpo_mm.judges import JUDGES, Ratio, better_of, explain, load_judge
from dpo_mm.judges import captions as chair
from dpo_mm.judges import text as judges


def response(text: str, *, truncated: bool = False) -> Response:
    return Response(text, len(text), truncated)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Index " + "." * 40, (6, 1, 40)),
        ("1 2 3 " + "na " * 20, (5, 3, 20)),
        ("x" + "ab" * 9 + "a", (1, 2, 9)),
        ("abcabcabcabc", (0, 3, 4)),
        ("0 0 0", None),
        ("the quick brown fox", None),
        ("aaa then something else", None),
        ("", None),
    ],
)
def test_find_repetition_returns_the_loop_at_the_end(text: str, expected: tuple[int, int, int] | None) -> None:
    assert judges.find_repetition(text) == expected


@given(st.text(alphabet="xyz", max_size=20), st.text(alphabet="abc", min_size=1, max_size=6), st.integers(12, 40))
def test_truncate_repetition_planted_loop_is_truncated(before: str, unit: str, repeats: int) -> None:
    text = before + unit * repeats
    loop = judges.find_repetition(text)
    assert loop is not None and loop.start <= len(before) and len(unit) % loop.period == 0
    assert judges.truncate_repetition(text) == text[: loop.start + 3 * loop.period]


@pytest.mark.parametrize(
    ("text", "ground_truth", "expected"),
    [
        ("Indox " + "." * 300, "Index .......... 41\nRoads .... 7", "Indox " + "." * 13),
        ("1" + " 0.0" * 90, "Total 0.0 0.0 0.0 0.0 2.1", "1" + " 0.0" * 7),
        ("never " * 60, "never never gone", "never " * 5),
        ("a" * 60, "b" + "a" * 99, "a" * 60),
        ("no loop at all", "no loop", "no loop at all"),
    ],
)
def test_truncate_repetition_exceeds_the_ground_truth_by_three_repeats(
    text: str, ground_truth: str, expected: str
) -> None:
    assert judges.truncate_repetition(text, ground_truth) == expected


def test_degeneration_requires_repeated_tail_at_the_limit_unlike_ground_truth() -> None:
    loop, table = "0.0 " * 40, "Total " + "0.0 " * 40
    responses = [
        response(loop, truncated=True),
        response(loop),
        response("a long and honest answer that never ends", truncated=True),
    ]
    assert judges.degeneration(responses, ["short"] * 3) == [Ratio(1, 1), Ratio(0, 1), Ratio(0, 1)]
    assert judges.degeneration([response(loop, truncated=True)], [table]) == [Ratio(0, 1)]


def test_trailing_repetition_counts_only_short_units() -> None:
    responses = [
        response("a" * 31),
        response("a" * 30),
        response("abcde" * 31),
        response("abcdef" * 31),
        response("a" * 99),
    ]
    found = judges.trailing_repetition(responses, ["", "", "", "", "b" + "a" * 99])
    assert [share.hits for share in found] == [1, 0, 1, 0, 0]


def test_repetition_equals_excess_over_the_ground_truth() -> None:
    unit = "0123456789"
    assert judges.rep(unit * 2) == pytest.approx(1 - 10 / 11)
    assert judges.rep("short") == 0
    more, same = judges.repetition([response(unit * 2), response(unit * 2)], [unit, unit * 2])
    assert more == (pytest.approx(1 / 11), 1) and same == (0, 1)


def test_error_rates_sum_over_responses() -> None:
    assert judges.cer([response("kitten"), response("")], ["sitting", "ab"]) == [Ratio(3, 7), Ratio(2, 2)]
    assert judges.cer([response("aaaa")], ["a"]) == [Ratio(3, 1)]
    assert judges.wer([response("the cat sat")], ["the cat sat down"]) == [Ratio(1, 4)]
    assert judges.anls([response("Hello "), response("xyz")], ["hello", "abc"]) == [Ratio(1, 1), Ratio(0, 1)]


def test_valid_json_skips_ground_truths_that_are_not_json() -> None:
    truth = json.dumps({"header": "a", "body": "b"})
    responses = [
        response('{"header": "x", "body": ""}'),
        response('{"header": "x"}'),
        response('{"header'),
        response("[1]"),
        response("text"),
    ]
    found = judges.valid_json(responses, [truth] * 4 + ["text"])
    assert found == [Ratio(1, 1), Ratio(0, 1), Ratio(0, 1), Ratio(0, 1), Ratio(0, 0)]


def test_chair_and_recall_count_each_object_once() -> None:
    truth = "a red circle and a blue star."
    responses = [
        response("a red circle, a red circle and a green cross."),
        response(""),
        response("a red circle and a blue star."),
    ]
    assert chair.chair_i(responses, [truth] * 3) == [Ratio(1, 2), Ratio(0, 0), Ratio(0, 2)]
    assert chair.chair_s(responses, [truth] * 3) == [Ratio(1, 1), Ratio(0, 1), Ratio(0, 1)]
    assert chair.recall(responses, [truth] * 3) == [Ratio(1, 2), Ratio(0, 2), Ratio(2, 2)]


def test_count_objects_accepts_another_vocabulary() -> None:
    synonyms = {"puppy": "dog", "dog": "dog", "kitten": "cat"}
    mentions = lambda text: [synonyms[word] for word in text.split() if word in synonyms]
    found = chair.count_objects([response("a puppy beside a kitten")], ["one dog"], mentions=mentions)
    assert found == [chair.ObjectCounts(mentioned=2, hallucinated=1, present=1, recalled=1)]


def test_explain_names_faults_and_positions() -> None:
    text = "a red circle and a green cross."
    found = explain("chair_i", response(text), "a red circle.")
    assert found.reason == "hallucinated: green cross"
    assert [text[a:b] for a, b in found.marks] == ["green cross"]
    loop = explain("degeneration", response("ok " + "na " * 9, truncated=True), "ok")
    assert loop.reason == "' na' x 9 at the end, truncated at the token limit" and loop.marks == ((2, 30),)
    assert explain("cer", response("x"), "y").reason == ""


def test_every_response_judge_returns_one_ratio_per_response() -> None:
    responses, ground_truths = [response("a red circle."), response("")], ["a blue star.", '{"a": 1}']
    for name, judge in JUDGES.items():
        if judge.function.startswith(("dpo_mm.judges.text", "dpo_mm.judges.captions")):
            found = load_judge(name)(responses, ground_truths)
            assert len(found) == 2 and all(share.hits >= 0 and share.total >= 0 for share in found), name
    assert better_of("cer") == "lower" and better_of("recall") == "higher" and better_of("num_words") == "neutral"


def test_explain_repetition_ignores_loops_of_the_ground_truth() -> None:
    row = "rain, rain, rain, rain"
    assert judges.explain_repetition(Response(row, 20, hit_limit=False), row).reason == ""
    assert "rain" in judges.explain_repetition(Response(row + ", rain" * 30, 200, hit_limit=True), row).reason


def test_hallucination_f1_error_counts_hallucinated_and_missing_objects() -> None:
    truth = "a red circle and a blue star."
    responses = [
        Response(words, 5, hit_limit=False) for words in (truth, "a red circle.", "a red circle and a green cross.")
    ]
    assert [share.hits / share.total for share in chair.hallucination_f1_error(responses, [truth] * 3)] == [
        0,
        1 / 3,
        2 / 4,
    ]
