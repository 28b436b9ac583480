"""Judge by the rule of OCRBench: a response is right if it contains an answer.

Case is ignored, and newlines count as spaces. Formulas (HME100k) are compared with their case and without spaces. The
published score is the number of hits among 1,000 questions.

Source: Liu et al. 2023 (2305.07895), github.com/Yuliang-Liu/MultimodalOCR (MIT), OCRBench/example.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from dpo_mm.data.benchmarks.ocrbench_questions import WITHOUT_SPACES
from dpo_mm.data.schema import Response
from dpo_mm.judges import Ratio

PREFIX = f'{{"{WITHOUT_SPACES}"'


def ocrbench(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """Rate of responses that contain the answer."""
    return [
        Ratio(float(contains(response.text, truth)), 1)
        for response, truth in zip(responses, ground_truths, strict=True)
    ]


def contains(text: str, truth: str) -> bool:
    """Check if a text contains an answer, by the rule for the answer's dataset."""
    if truth.startswith(PREFIX):
        answer = json.loads(truth)[WITHOUT_SPACES]
        return _formula(answer) in _formula(text)
    return _words(truth) in _words(text)


def _words(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")
