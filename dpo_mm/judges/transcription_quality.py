"""Quality of a transcription as one number: the mean of Levenshtein ratio and BLEU-4, on the text inside the JSON.

It is the score of the article behind this project. BLEU-4 is NLTK's `sentence_bleu` with smoothing method 1, over words.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from typing import Any

from rapidfuzz.distance import Indel

from dpo_mm.data.schema import Response
from dpo_mm.judges import Ratio


def levenshtein_bleu(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """Mean of Levenshtein ratio and BLEU-4 of each response, in [0, 1].

    The Levenshtein ratio is that of the package of this name: 1 - (insertions + deletions) / (both lengths). Two empty texts
    score 1, and an empty one against another text 0. A response that is no JSON counts with all its text.
    """
    return [
        Ratio((_ratio(r, t) + _bleu(r, t)) / 2, 1)
        for r, t in (
            (json_text(response.text), json_text(truth))
            for response, truth in zip(responses, ground_truths, strict=True)
        )
    ]


def json_text(text: str) -> str:
    """Return the texts in a JSON object or list in their order, one per line. Any other text is returned unchanged."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    texts = _texts(value) if isinstance(value, dict | list) else [text]
    return unicodedata.normalize("NFC", "\n".join(part for part in texts if part))


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for part in value for text in _texts(part)]
    return [] if value is None else [str(value)]


def _ratio(text: str, truth: str) -> float:
    return float(Indel.normalized_similarity(text, truth))


def _bleu(text: str, truth: str) -> float:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    words, expected = text.split(), truth.split()
    if not words or not expected:
        return float(words == expected)
    return float(sentence_bleu([expected], words, smoothing_function=SmoothingFunction().method1))
