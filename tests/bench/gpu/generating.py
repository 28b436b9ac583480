"""Mining with the bundled models: useful tokens per second, and how many of the generated slots they are."""

from __future__ import annotations

import time
from typing import Any

from dpo_mm.config import MineResponsesConfig
from dpo_mm.data.questions import read_questions
from dpo_mm.judges.text import truncate_repetition
from dpo_mm.mining.mine_responses import LOOP_JUDGES
from dpo_mm.policies.families import load_text_policy
from dpo_mm.recipe import read_recipe
from tests.bench.gpu.cells import Cells
from tests.bench.gpu.figures import synchronise


def bundled(cells: Cells) -> None:
    """The mining of each task's quickstart: a greedy response per question and one sampled."""
    settings = cells.settings
    for task in settings["tasks"]:
        config = read_recipe(task, "quickstart", {}).mine
        assert isinstance(config, MineResponsesConfig)
        policy = load_text_policy(config.model, precision=config.precision)
        limit = settings["questions"] or config.max_questions
        questions = read_questions(config.questions, limit=limit)
        for name in ("greedy", "sampled"):
            cells.measure(
                f"{task}, {name}",
                lambda config=config, policy=policy, questions=questions, name=name: _generate(
                    cells, config, policy, questions, sampled=name == "sampled"
                ),
            )


def _generate(cells: Cells, config: MineResponsesConfig, policy: Any, questions: Any, *, sampled: bool) -> Any:
    """Useful tokens are those before a repetition loop. Slots are the rows of all passes, of which each gives a token."""
    truths = ["\n".join(question.ground_truths) for question in questions]
    images, prompts = [q.images for q in questions], [q.prompt for q in questions]
    size = cells.settings["batch_size"] or config.batch_size
    limits = {"max_new_tokens": cells.settings["max_new_tokens"] or config.max_new_tokens, "batch_size": size}
    stops = {"loop_references": truths} if config.judge in LOOP_JUDGES else {}
    if cells.device == "cuda":  # the first batch chooses kernels
        policy.generate(images[:size], prompts[:size], **limits, do_sample=sampled)
    synchronise(cells.device)
    start = time.perf_counter()
    passes: list[int] = []
    hook = policy.base_model.register_forward_pre_hook(
        lambda module, arguments, inputs: passes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    responses = policy.generate(images, prompts, **limits, do_sample=sampled, **stops)
    synchronise(cells.device)
    seconds = time.perf_counter() - start
    hook.remove()
    encode = lambda text: len(policy.encoder.tokenizer(text, add_special_tokens=False)["input_ids"])
    useful = sum(
        encode(truncate_repetition(response.text, question.ground_truth)) if response.hit_limit else response.tokens
        for response, question in zip(responses, questions, strict=True)
    )
    return {
        "responses": len(responses),
        "seconds": seconds,
        "useful_tokens": useful,
        "slots": sum(passes),
        "useful_share": useful / sum(passes),
        "useful_tokens_per_s": useful / seconds,
        "forward_passes": len(passes),
    }
