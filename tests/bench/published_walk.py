"""Walk the published method on the bundled OCR model: SFT, then DPO on its own failures on the same pages, against more SFT.

    python -m tests.bench.published_walk docs/benchmarks/published-walk [ARM ...] [--tunings lora,full] [--seeds 0,1,2] [--work FOLDER]

1. SFT on the correct transcriptions of 1,600 training pages, each once.
2. The fine-tuned model reads the same pages twice, greedily and at temperature 1, and each degenerate response is paired with the
   correct transcription.
3. From the fine-tuned weights, 60 more steps: DPO on those pairs with 16 or 8 per step, or SFT with as many rows per step, on the same
   pages or on the correct transcriptions of the pairs alone.

All arms have one learning rate per tuning: the recipe's with LoRA, and a fifth of it for all weights. A first run had 600 pages. Its
fine-tuned model failed on so few of them that DPO had 13 pairs, so this one has more pages. That was decided before any model read the
held-out pages of this study. They have a seed of their own and none of the pages of `pages-held-out`, on which the recipe and the
first run were evaluated. Nothing was chosen on them.

Degeneration is the article's (token limit reached, the last 15 characters at least four times). `trailing_repetition` and
`repetition` are ours. Quality is the article's mean of Levenshtein ratio and BLEU-4 on the text inside the JSON. All models read the
same 400 pages greedily. Each arm, tuning and seed is one JSON file in a folder of its tuning, with hits and totals by page.
Arms whose file exists are not run again, and an interrupted one resumes from --work.

With --time, the models of the first seed in --work read 100 of the pages in turn, three rounds, and the CPU milliseconds per page are
written to times.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from dpo_mm.cli.terminal import run_as_command, suppress_library_output
from dpo_mm.config import CompareResponsesConfig, MineResponsesConfig, TrainConfig
from dpo_mm.data.image_files import encode_png
from dpo_mm.data.parquet import write_rows
from dpo_mm.data.questions import Question, read_questions
from dpo_mm.data.schema import make_response_rows, response_preference
from dpo_mm.evaluation.response_sampling import ScoredResponses, generate_responses
from dpo_mm.files.resumable import atomic_write
from dpo_mm.mining.mine_responses import mine_responses
from dpo_mm.policies.families import load_text_policy
from dpo_mm.training.run import train
from dpo_mm.worlds import documents

MODEL, TRAIN_PAGES, PAGES, TEST, HELD_OUT_SEED = "page-reader", "pages-train", 1600, 400, 28
"""The model, its training pages and their number, the number of held-out pages, and their seed."""
SFT_STEPS, STEPS, BATCH = 100, 60, 16
"""Steps of the first stage and of the second, and rows per step of the first."""
MAX_NEW_TOKENS = 200
TIMED_PAGES, TIMED_ROUNDS = 100, 3
"""Pages that each model reads in one batch with --time, and how often."""
TUNINGS = ("lora", "full")
RATES = {"lora": 1e-3, "full": 2e-4}
JUDGES = ("degeneration", "trailing_repetition", "repetition", "levenshtein_bleu", "cer", "valid_json", "num_tokens")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A second stage. It starts from the result of SFT.

    Args:
        batch_size: pairs or rows per step.
        objective: sigmoid or sft.
        sft_weight: weight of the SFT term of DPO.
        mined: whether it trains on the pages of the mined pairs, or on all training pages.
    """

    batch_size: int
    objective: str = "sigmoid"
    sft_weight: float = 1.0
    mined: bool = True


STAGES = {
    "dpo, 16 per step": Stage(16),
    "more sft, 16 per step": Stage(16, "sft", 0.0, mined=False),
    "dpo, 8 per step": Stage(8),
    "more sft, 8 per step": Stage(8, "sft", 0.0, mined=False),
    "sft on the failures, 16 per step": Stage(16, "sft", 0.0),
    "sft on the failures, 8 per step": Stage(8, "sft", 0.0),
    "dpo without the sft term, 16 per step": Stage(16, sft_weight=0.0),
}
ARMS = ("base", "sft", *STAGES)


@dataclasses.dataclass(frozen=True)
class Run:
    """An arm with one tuning and training seed.

    Args:
        arm: one of ARMS.
        tuning: lora or full.
        seed: seed of the first stage and of mining. The second stage has this plus 100.
    """

    arm: str
    tuning: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its files without suffix."""
        return f"{self.arm.replace(', ', '-').replace(' ', '-')}-seed{self.seed}"


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
            for question in read_questions(TRAIN_PAGES, limit=PAGES)
        ]
        write_rows(rows, path, make=make_response_rows, features=response_preference())
    return str(path)


@functools.cache
def held_out_pages(count: int = TEST) -> list[Question]:
    """Make pages of the held-out split on which nothing was chosen, none of them in the dataset pages-held-out."""
    known = {question.ground_truth for question in read_questions("pages-held-out")}
    pages = documents.pages(2 * count, HELD_OUT_SEED, held_out=True)
    unseen = (page for page in pages if documents.transcription(page) not in known)
    return [
        Question(
            f"page-{HELD_OUT_SEED}-{number}",
            [documents.render(page)],
            documents.PROMPTS[page.form],
            documents.transcription(page),
            page.kind,
        )
        for number, page in enumerate(itertools.islice(unseen, count))
    ]


def weights(run: Run, work: Path) -> tuple[str, str | None]:
    """Model and adapter of an arm after its training."""
    folder = str(work / run.tuning / run.name)
    if run.arm == "base":
        return MODEL, None
    return (MODEL, folder) if run.tuning == "lora" else (folder, None)


def mine_failures(run: Run, work: Path) -> str:
    """Pair the failures of the fine-tuned model on its own training pages with the correct transcriptions."""
    model, adapter = weights(dataclasses.replace(run, arm="sft"), work)
    config = MineResponsesConfig(
        model,
        TRAIN_PAGES,
        str(work / run.tuning / f"mined-seed{run.seed}"),
        "degeneration",
        adapter=adapter,
        max_questions=PAGES,
        responses_per_question=2,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=100,
        seed=run.seed,
    )
    return str(mine_responses(config))


def training_config(run: Run, work: Path) -> TrainConfig:
    """Settings of an arm's training. A second stage's pairs are mined here if they are not there yet."""
    config = TrainConfig(
        MODEL,
        correct_pages(work),
        str(work / run.tuning / run.name),
        tuning=run.tuning,
        objective="sft",
        steps=SFT_STEPS,
        batch_size=BATCH,
        learning_rate=RATES[run.tuning],
        schedule="cosine",
        warmup_steps=5,
        eval_fraction=0.0,
        seed=run.seed,
    )
    if run.tuning == "lora":
        config = dataclasses.replace(config, lora_rank=16, lora_alpha=32)
    if run.arm == "sft":
        return config
    stage = STAGES[run.arm]
    model, adapter = weights(dataclasses.replace(run, arm="sft"), work)
    config = dataclasses.replace(
        config,
        model=model,
        adapter=adapter,
        objective=stage.objective,
        sft_weight=stage.sft_weight,
        steps=STEPS,
        batch_size=stage.batch_size,
        seed=run.seed + 100,
    )
    if stage.objective == "sigmoid":
        config = dataclasses.replace(config, beta=0.1)
    return dataclasses.replace(config, pairs=mine_failures(run, work)) if stage.mined else config


def read_pages(run: Run, work: Path) -> ScoredResponses:
    """Responses of a model to the held-out pages, with their scores."""
    model, adapter = weights(run, work)
    config = CompareResponsesConfig(
        model, str(work), "", adapter=adapter, judges=JUDGES, max_new_tokens=MAX_NEW_TOKENS, batch_size=100
    )
    policy = load_text_policy(model, adapter=adapter)
    return generate_responses(policy, held_out_pages(), config, base=adapter is None, title=run.name)


def train_and_read(run: Run, work: Path) -> dict[str, Any]:
    """Train and evaluate one arm.

    Returns:
        Its settings, hits and totals of each judge by page, and CPU seconds (those of training only if it was not resumed). A DPO arm also
        has the last difference of the chosen log-prob to the reference's, in nats.
    """
    config = training_config(run, work) if run.arm != "base" else None
    is_new = config is not None and not Path(config.output_dir).exists()
    start, result = time.process_time(), train(config) if config else None
    trained = time.process_time()
    scored = read_pages(run, work)
    chosen = [entry["rewards/chosen"] for entry in result.history if "rewards/chosen" in entry] if result else []
    return {
        **dataclasses.asdict(run),
        "command": "python -m tests.bench.published_walk docs/benchmarks/published-walk",
        **({"steps": config.steps, "rows": pq.read_metadata(config.pairs).num_rows} if config else {}),
        **({"batch_size": config.batch_size, "learning_rate": config.learning_rate} if config else {}),
        **({"chosen_nats": round(chosen[-1] / result.beta, 2)} if chosen and result else {}),
        "train_cpu_seconds": round(trained - start, 1) if is_new else None,
        "read_cpu_seconds": round(time.process_time() - trained, 1),
        **{judge: numbers(ratios) for judge, ratios in scored.ratios.items()},
    }


def time_reading(runs: Sequence[Run], work: Path) -> dict[str, dict[str, list[float]]]:
    """CPU milliseconds per page of greedy reading with each model, in rounds over all models. Loading and scoring are not counted."""
    pages = held_out_pages(TIMED_PAGES)
    times: dict[str, dict[str, list[float]]] = {}
    for _, run in itertools.product(range(TIMED_ROUNDS), runs):
        model, adapter = weights(run, work)
        policy = load_text_policy(model, adapter=adapter)
        start = time.process_time()
        policy.generate(
            [page.images for page in pages],
            [page.prompt for page in pages],
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            batch_size=TIMED_PAGES,
        )
        milliseconds = 1000 * (time.process_time() - start) / TIMED_PAGES
        times.setdefault(run.tuning, {}).setdefault(run.arm, []).append(round(milliseconds, 2))
    return times


def numbers(ratios: np.ndarray) -> dict[str, list[float]]:
    """Hits and totals by page, with whole numbers as integers. Totals of 1 are left out."""
    hits, totals = (
        [int(value) if value == int(value) else round(value, 4) for value in column.tolist()] for column in ratios.T
    )
    return {"hits": hits} if set(totals) == {1} else {"hits": hits, "totals": totals}


def main() -> None:
    """Run arms that have no file yet, and write the file of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("arms", nargs="*", metavar="ARM", help="; ".join(ARMS))
    parser.add_argument("--tunings", default=",".join(TUNINGS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--work", type=Path, default=Path("runs/published-walk"))
    parser.add_argument("--time", action="store_true", help="time reading with the models in --work instead")
    options = parser.parse_intermixed_args()
    if unknown := set(options.arms) - set(ARMS):
        parser.error(f"{min(unknown)!r} is no arm. Expected one of: {'; '.join(ARMS)}")
    seeds = [int(part) for part in options.seeds.split(",")]
    tunings = options.tunings.split(",")
    if options.time:
        arms = [Run(arm, tuning, seeds[0]) for tuning in tunings for arm in options.arms or ARMS]
        trained = [run for run in arms if run.arm == "base" or (options.work / run.tuning / run.name).exists()]
        with suppress_library_output():
            times = time_reading(trained, options.work)
        settings = {"threads": torch.get_num_threads(), "pages": TIMED_PAGES, "rounds": TIMED_ROUNDS}
        command = "python -m tests.bench.published_walk docs/benchmarks/published-walk --time"
        with atomic_write(options.out / "times.json") as temporary:
            temporary.write_text(json.dumps({"command": command, **settings, "milliseconds": times}, indent=1) + "\n")
        return
    for tuning, seed, arm in itertools.product(tunings, seeds, options.arms or ARMS):
        run = Run(arm, tuning, seed)
        path = options.out / tuning / f"{run.name}.json"
        if path.exists() or (arm == "base" and (tuning, seed) != (tunings[0], seeds[0])):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        (options.work / tuning).mkdir(parents=True, exist_ok=True)
        with suppress_library_output():
            result = train_and_read(run, options.work)
        with atomic_write(path) as temporary:
            lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in result.items())
            temporary.write_text(f"{{{lines}}}\n")
        print(f"{tuning}, {arm}, seed {seed}: {sum(result['degeneration']['hits'])} of {TEST} degenerate", flush=True)


if __name__ == "__main__":
    with run_as_command():
        main()
