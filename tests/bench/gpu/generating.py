"""Mining with the bundled models: useful tokens per second, and how many of the generated slots they are."""

from __future__ import annotations

import time
from typing import Any

import torch

from dpo_mm.config import MineResponsesConfig
from dpo_mm.data.questions import read_questions
from dpo_mm.judges.text import truncate_repetition
from dpo_mm.mining.mine_responses import LOOP_JUDGES
from dpo_mm.policies.families import load_text_policy
from dpo_mm.policies.vlm.decoding import Decoding
from dpo_mm.recipe import read_recipe
from tests.bench.gpu.cells import Cells
from tests.bench.gpu.figures import synchronise


def bundled(cells: Cells) -> None:
    """The mining of each task's quickstart, without judging: all responses to a question together."""
    settings = cells.settings
    for task in settings["tasks"]:
        config = read_recipe(task, "quickstart", {}).mine
        assert isinstance(config, MineResponsesConfig)
        cells.measure(task, lambda config=config: _generate(cells, config))


def _generate(cells: Cells, config: MineResponsesConfig) -> dict[str, Any]:
    """Useful tokens are those before a repetition loop. Slots are all tokens that were generated.

    A pass over prompts gives each response its first token, and each further pass one token per row.
    """
    policy: Any = load_text_policy(config.model, precision=config.precision)
    questions = read_questions(config.questions, limit=cells.settings["questions"] or config.max_questions)
    images, prompts = [q.images for q in questions], [q.prompt for q in questions]
    sampled = range(1, config.responses_per_question)
    decodings = [Decoding(0.0, config.seed), *(Decoding(config.temperature, config.seed + n) for n in sampled)]
    size = cells.settings["batch_size"] or config.batch_size
    limits = {"max_new_tokens": cells.settings["max_new_tokens"] or config.max_new_tokens, "batch_size": size}
    truths = ["\n".join(question.ground_truths) for question in questions]
    stops = {"loop_references": truths} if config.judge in LOOP_JUDGES else {}
    if cells.device == "cuda":  # the first batch chooses kernels
        policy.generate_each(images[:size], prompts[:size], decodings, **limits)
    synchronise(cells.device)
    start = time.perf_counter()
    passes: list[torch.Size] = []
    hook = policy.base_model.register_forward_pre_hook(
        lambda module, arguments, inputs: passes.append(inputs["input_ids"].shape), with_kwargs=True
    )
    each = policy.generate_each(images, prompts, decodings, **limits, **stops)
    synchronise(cells.device)
    seconds = time.perf_counter() - start
    hook.remove()
    encode = lambda text: len(policy.encoder.tokenizer(text, add_special_tokens=False)["input_ids"])
    useful = sum(
        encode(truncate_repetition(response.text, question.ground_truth)) if response.hit_limit else response.tokens
        for responses in each
        for response, question in zip(responses, questions, strict=True)
    )
    responses = len(questions) * len(decodings)
    slots = responses + sum(rows for rows, tokens in passes if tokens == 1)
    return {
        "responses": responses,
        "seconds": seconds,
        "useful_tokens": useful,
        "slots": slots,
        "useful_share": useful / slots,
        "useful_tokens_per_s": useful / seconds,
        "forward_passes": len(passes),
    }
