"""Streamed responses and token log-probs of one conversation, compared with batched generation and training."""

from __future__ import annotations

import itertools

import pytest
import torch

from dpo_mm.data.image_files import encode_png
from dpo_mm.data.questions import Question, read_questions
from dpo_mm.data.schema import Response, make_response_rows
from dpo_mm.policies.families import load_policy
from dpo_mm.policies.vlm import generation
from dpo_mm.policies.vlm.decoding import Decoding
from dpo_mm.policies.vlm.generation import response_token_log_probs, stream_response
from dpo_mm.policies.vlm.vlm_policy import VisionLanguage


@pytest.fixture(scope="module")
def policy() -> VisionLanguage:
    captioner = load_policy("shapes-captioner")
    assert isinstance(captioner, VisionLanguage)
    return captioner


@pytest.fixture(scope="module")
def question() -> Question:
    return read_questions("scenes-held-out", limit=3)[2]


def test_pixel_values_are_computed_one_batch_at_a_time(
    policy: VisionLanguage, question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches pixel values of all conversations before the first batch, 18 MiB per large image."""
    order: list[str] = []
    encode, generate_batch = policy.encoder.prompt, generation._generate_batch
    monkeypatch.setattr(policy.encoder, "prompt", lambda *a, **k: order.append("encode") or encode(*a, **k))
    monkeypatch.setattr(generation, "_generate_batch", lambda *a: order.append("generate") or generate_batch(*a))
    responses = policy.generate(
        [question.images] * 3, [question.prompt] * 3, max_new_tokens=2, do_sample=False, batch_size=2
    )
    assert len(responses) == 3 and order == ["encode", "encode", "generate", "encode", "generate"]


def test_several_decodings_encode_images_once_and_equal_single_calls(policy: VisionLanguage) -> None:
    """Catches a vision tower that runs per decoding, and seeds that do not follow the batch or the decoding."""
    questions = read_questions("scenes-held-out", limit=3)
    asked = [question.images for question in questions], [question.prompt for question in questions]
    decodings, encoded = [Decoding(0.0, 0), Decoding(2.0, 0), Decoding(3.0, 5)], []

    def single(of: slice, temperature: float, seed: int) -> list[Response]:
        sampling = {"do_sample": temperature > 0, "temperature": temperature or 1.0, "seed": seed}
        return policy.generate(asked[0][of], asked[1][of], max_new_tokens=24, **sampling)

    expected = [single(slice(2), *each) + single(slice(2, 3), each.temperature, each.seed + 2) for each in decodings]
    tower = policy.base_model.base_model.vision_tower
    hook = tower.register_forward_hook(lambda module, images, output: encoded.append(len(output.last_hidden_state)))
    each = policy.generate_each(*asked, decodings, max_new_tokens=24, batch_size=2)
    hook.remove()
    assert each == expected and encoded == [2, 1]
    assert all(one != other for one, other in itertools.combinations(each, 2))


def test_stream_grows_to_the_generated_response(policy: VisionLanguage, question: Question) -> None:
    (whole,) = policy.generate([question.images], [question.prompt], max_new_tokens=48, do_sample=False)
    texts = list(stream_response(policy, question.images, question.prompt, max_new_tokens=48))
    assert texts[-1] == whole.text and len(texts) > 2
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))


def test_token_log_probs_match_those_of_training(policy: VisionLanguage, question: Question) -> None:
    response = "a red circle and a blue star"
    tokens, log_probs = response_token_log_probs(policy, question.images, question.prompt, response)
    assert "".join(tokens) == response and log_probs.shape == (len(tokens),) and bool((log_probs < 0).all())
    row = {
        "id": "one",
        "images": [{"bytes": encode_png(image), "path": None} for image in question.images],
        "prompt": question.prompt,
        "chosen": question.ground_truth,
        "rejected": response,
        "rejected_truncated": True,
    }
    rows = make_response_rows([row])
    batch = policy.collate(policy.encode(rows))
    with torch.no_grad():
        in_training = policy.log_probs(policy.model, batch)
    torch.testing.assert_close(log_probs.sum(), in_training.rejected[0], atol=1e-4, rtol=1e-5)


def test_stream_error_while_generating_is_raised(policy: VisionLanguage, question: Question) -> None:
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(stream_response(policy, question.images, question.prompt, max_new_tokens=-1))


def test_token_log_probs_empty_response_has_no_tokens(policy: VisionLanguage, question: Question) -> None:
    tokens, log_probs = response_token_log_probs(policy, question.images, question.prompt, "")
    assert tokens == [] and log_probs.shape == (0,)
