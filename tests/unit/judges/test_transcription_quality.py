"""Tests of the article's quality score, with values worked out by hand."""

from __future__ import annotations

import math

import pytest

from dpo_mm.data.schema import Response
from dpo_mm.judges.transcription_quality import json_text, levenshtein_bleu


def score(text: str, truth: str) -> float:
    (ratio,) = levenshtein_bleu([Response(text, 1, hit_limit=False)], [truth])
    assert ratio.total == 1
    return ratio.hits


def test_score_of_one_wrong_word() -> None:
    """BLEU: 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 quadruples. Ratio: 1 letter is replaced (2 edits) of 9 + 9."""
    bleu = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert score("a b c d x", "a b c d e") == pytest.approx((bleu + 1 - 2 / 18) / 2)


def test_missing_ngrams_are_smoothed_and_short_responses_penalised() -> None:
    """Method 1 replaces a count of 0 by 0.1; the brevity penalty of 2 words for 3 is exp(1 - 3/2)."""
    bleu = math.exp(1 - 3 / 2) * (2 / 2 * 1 / 1 * 0.1 / 1 * 0.1 / 1) ** 0.25
    assert score("a b", "a b c") == pytest.approx((bleu + 1 - 2 / 8) / 2)


@pytest.mark.parametrize(("text", "truth", "expected"), [("", "", 1.0), ("", "a", 0.0), ("a", "", 0.0)])
def test_empty_texts(text: str, truth: str, expected: float) -> None:
    assert score(text, truth) == expected


def test_text_inside_the_json_counts_without_its_keys() -> None:
    truth = '{"header":"Part 1","body":"one two three\\nfour","footer":""}'
    assert json_text(truth) == "Part 1\none two three\nfour"
    assert json_text('[{"text": "a", "box": null}, 3]') == "a\n3" and json_text("7") == "7"
    assert score('{"a": "Part 1", "b": ["one two three", "four"]}', truth) == pytest.approx(1.0)
    assert score(truth[:-1], truth) < 1.0
