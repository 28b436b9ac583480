"""Walk the published method on the bundled OCR model: SFT, then DPO on its own failures on the same pages, against more SFT.

    python -m tests.bench.published_walk docs/benchmarks/published-walk.json [--seeds 0,1,2] [--tunings lora,full] [--work FOLDER]

1. SFT on the correct transcriptions of 600 training pages.
2. The fine-tuned model reads the same pages twice, greedily and at temperature 1, and each degenerate response is paired with the
   correct transcription.
3. DPO from the fine-tuned weights on those pairs, with and without the SFT term, and SFT again for as many steps.

Degeneration is the article's (token limit reached, the last 15 characters at least four times). `trailing_repetition` and
`repetition` are ours. Quality is the article's mean of Levenshtein ratio and BLEU-4 on the text inside the JSON. All models read
the same 400 held-out pages greedily. Seconds per page are those of this process and only comparable within a run. An interrupted run resumes from --work.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from dpo_mm.cli.main import suppress_library_output
from dpo_mm.config import CompareResponsesConfig, MineResponsesConfig, TrainConfig
from dpo_mm.data.image_files import encode_png
from dpo_mm.data.parquet import write_rows
from dpo_mm.data.questions import read_questions
from dpo_mm.data.schema import make_response_rows, response_preference
from dpo_mm.evaluation.compare_responses import comparisons
from dpo_mm.evaluation.response_sampling import ScoredResponses, generate_responses, score_responses
from dpo_mm.mining.mine_responses import mine_responses
from dpo_mm.policies.families import load_text_policy
from dpo_mm.training.run import train

MODEL, PAGES, TEST, STEPS, BATCH = "page-reader", 600, 400, 60, 16
MAX_NEW_TOKENS = 200
RATES = {"lora": 1e-3, "full": 2e-4}
JUDGES = ("degeneration", "trailing_repetition", "repetition", "levenshtein_bleu", "cer", "valid_json", "num_tokens")
STAGES = ("sft", "dpo", "dpo without the SFT term", "more sft")


def correct_pages(work: Path) -> str:
    """Write the training pages with their correct transcriptions, chosen only, and return the path."""
    path = work / "correct.parquet"
    if not path.exists():
        rows: list[dict[str, Any]] = [
            {
                "id": question.id,
                "images": [{"bytes": encode_png(image), "path": None} for image in question.images],
                "prompt": question.prompt,
                "chosen": question.ground_truth,
            }
            for question in read_questions("pages-train", limit=PAGES)
        ]
        write_rows(rows, path, make=make_response_rows, features=response_preference())
    return str(path)


def mine(work: Path, tuning: str, seed: int) -> str:
    """Pair the failures of the fine-tuned model on its own training pages with the correct transcriptions."""
    start = stage_folder(work, "sft", tuning, seed)
    config = MineResponsesConfig(
        MODEL, "pages-train", str(work / f"mined-{tuning}-{seed}"), "degeneration", adapter=str(start), max_questions=PAGES,
        responses_per_question=2, max_new_tokens=MAX_NEW_TOKENS, batch_size=100, seed=seed,
    )  # fmt: skip
    return str(mine_responses(config))


def stage_folder(work: Path, stage: str, tuning: str, seed: int) -> Path:
    """Folder of a stage's result."""
    return work / f"{stage.replace(' ', '-')}-{tuning}-{seed}"


def train_stage(work: Path, stage: str, tuning: str, seed: int) -> None:
    """Train one stage: sft from the base, the others from its result."""
    first, start = stage == "sft", stage_folder(work, "sft", tuning, seed)
    pairs = mine(work, tuning, seed) if stage.startswith("dpo") else correct_pages(work)
    config = TrainConfig(
        MODEL, pairs, str(stage_folder(work, stage, tuning, seed)), tuning=tuning, objective="sft", steps=STEPS, batch_size=BATCH,
        learning_rate=RATES[tuning], schedule="cosine", warmup_steps=5, eval_fraction=0.0, seed=seed if first else seed + 100,
    )  # fmt: skip
    if tuning == "lora":
        config = dataclasses.replace(config, lora_rank=16, lora_alpha=32, adapter=None if first else str(start))
    elif not first:
        config = dataclasses.replace(config, model=str(start))
    if stage.startswith("dpo"):
        config = dataclasses.replace(
            config, objective="sigmoid", beta=0.1, sft_weight=0.0 if stage == "dpo without the SFT term" else 1.0
        )
    train(config)


def read_pages(folder: Path | None) -> tuple[ScoredResponses, float]:
    """Responses of a model to the held-out pages with their scores, and seconds per page."""
    config = CompareResponsesConfig(
        MODEL, "unused", "pages-held-out", max_questions=TEST, judges=JUDGES, max_new_tokens=MAX_NEW_TOKENS, batch_size=100
    )  # fmt: skip
    questions = read_questions(config.questions, limit=TEST)
    policy = load_text_policy(MODEL, adapter=folder)
    start = time.perf_counter()
    responses = generate_responses(policy, questions, config, base=False, title="held-out pages").responses
    return score_responses(responses, questions, config), (time.perf_counter() - start) / TEST


def summary(scored: ScoredResponses, seconds: float) -> dict[str, float]:
    """Rates of a model by judge, and seconds per page."""
    rates = {name: float(ratios[:, 0].sum() / ratios[:, 1].sum()) for name, ratios in scored.ratios.items()}
    return {**rates, "seconds_per_page": seconds}


def differences(first: ScoredResponses, second: ScoredResponses) -> dict[str, list[float]]:
    """Difference of two models by judge, second minus first, with its 95 % interval."""
    config = CompareResponsesConfig(MODEL, "unused", "pages-held-out", judges=JUDGES)
    return {c.judge: [c.difference, c.low, c.high] for c in comparisons(first, second, config)}


def walk(work: Path, tuning: str, seed: int) -> dict[str, Any]:
    """Train all stages with one seed and compare them on the held-out pages."""
    scored: dict[str, ScoredResponses] = {}
    result: dict[str, Any] = {"tuning": tuning, "seed": seed}
    scored["base"], seconds = read_pages(None)
    result["base"] = summary(scored["base"], seconds)
    for stage in STAGES:
        train_stage(work, stage, tuning, seed)
        scored[stage], seconds = read_pages(stage_folder(work, stage, tuning, seed))
        result[stage] = summary(scored[stage], seconds)
    result["pairs"] = len(read_pairs(work, tuning, seed))
    for stage in STAGES[1:]:
        result[f"{stage} against sft"] = differences(scored["sft"], scored[stage])
    for stage in STAGES[1:3]:
        result[f"{stage} against more sft"] = differences(scored["more sft"], scored[stage])
    return result


def read_pairs(work: Path, tuning: str, seed: int) -> Any:
    """Mined pairs of a run."""
    from dpo_mm.data.schema import load_responses

    return load_responses(mine(work, tuning, seed))


def main() -> None:
    """Run the walk for each tuning and seed, and write the JSON file after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--tunings", default="lora,full")
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    command = f"python -m tests.bench.published_walk {arguments.output} --seeds {arguments.seeds} --tunings {arguments.tunings}"
    runs = []
    for seed in (int(text) for text in arguments.seeds.split(",")):
        for tuning in arguments.tunings.split(","):
            saved = work / f"walk-{tuning}-{seed}.json"
            if not saved.exists():
                with suppress_library_output():
                    saved.write_text(json.dumps(walk(work, tuning, seed)))
            runs.append(json.loads(saved.read_text()))
            settings = {
                "model": MODEL,
                "pages": PAGES,
                "held_out": TEST,
                "steps": STEPS,
                "batch_size": BATCH,
                "rates": RATES,
            }
            arguments.output.write_text(json.dumps({"command": command, "settings": settings, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
