"""One answer at a time: streamed to the same text, scored to the same log-probs as in training."""

from __future__ import annotations

import itertools

import pytest
import torch

from dpo_mm.data.image_files import encode_png
from dpo_mm.data.questions import Question, read_questions
from dpo_mm.data.schema import make_response_rows
from dpo_mm.policies.families import load_policy
from dpo_mm.policies.vlm.generation import stream, token_log_probs
from dpo_mm.policies.vlm.vlm_policy import VisionLanguage


@pytest.fixture(scope="module")
def policy() -> VisionLanguage:
    found = load_policy("shapes-captioner")
    assert isinstance(found, VisionLanguage)
    return found


@pytest.fixture(scope="module")
def question() -> Question:
    return read_questions("scenes-held-out", limit=3)[2]


def test_a_streamed_answer_grows_to_the_one_that_is_generated(policy: VisionLanguage, question: Question) -> None:
    (whole,) = policy.generate([question.images], [question.prompt], max_new_tokens=48, do_sample=False)
    seen = list(stream(policy, question.images, question.prompt, max_new_tokens=48))
    assert seen[-1] == whole.text and len(seen) > 2
    assert all(after.startswith(before) for before, after in itertools.pairwise(seen))


def test_token_log_probs_are_those_of_training(policy: VisionLanguage, question: Question) -> None:
    answer = "a red circle and a blue star"
    tokens, found = token_log_probs(policy, question.images, question.prompt, answer)
    assert "".join(tokens) == answer and found.shape == (len(tokens),) and bool((found < 0).all())
    row = {
        "id": "one",
        "images": [{"bytes": encode_png(image), "path": None} for image in question.images],
        "prompt": question.prompt,
        "chosen": question.truth,
        "rejected": answer,
        "rejected_truncated": True,
    }
    rows = make_response_rows([row])
    batch = policy.collate(policy.encode(rows))
    with torch.no_grad():
        scores = policy.log_probs(policy.model, batch)
    torch.testing.assert_close(found.sum(), scores.rejected[0], atol=1e-4, rtol=1e-5)


def test_what_fails_while_streaming_is_raised(policy: VisionLanguage, question: Question) -> None:
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(stream(policy, question.images, question.prompt, max_new_tokens=-1))


def test_an_empty_answer_has_no_tokens(policy: VisionLanguage, question: Question) -> None:
    tokens, found = token_log_probs(policy, question.images, question.prompt, "")
    assert tokens == [] and found.shape == (0,)
