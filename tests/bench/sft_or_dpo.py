"""Compare DPO on an OCR model's own repetition loops with SFT on the same correct transcriptions.

    python -m tests.bench.sft_or_dpo docs/benchmarks/sft-or-dpo.json [--seeds 0,1,2] [--work FOLDER]

The base is the bundled OCR model after full fine-tuning on clean transcriptions of pages of three sizes. Larger pages are
scaled down to its input size, so it cannot see where a dotted leader ends, and repetition loops remain. Large pages of the
training split are mined for these loops. Each arm trains on those pairs (one arm on the clean pages instead) and is
evaluated on the same held-out large pages. DPO and SFT each use the learning rate with the lowest character error rate
(which counts loops) on other held-out pages, at the first seed. At the end DPO and SFT are evaluated on as many new pages,
which no choice was based on. An interrupted run resumes from --work.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_mm.cli.main import suppress_library_output
from dpo_mm.config import CompareResponsesConfig, MineResponsesConfig, TrainConfig
from dpo_mm.data.image_files import encode_png
from dpo_mm.data.parquet import write_rows
from dpo_mm.data.questions import read_questions
from dpo_mm.data.schema import make_response_rows, response_preference
from dpo_mm.evaluation.compare_responses import comparisons
from dpo_mm.evaluation.response_sampling import ScoredResponses, generate_responses
from dpo_mm.judges.text import truncate_repetition
from dpo_mm.mining.mine_responses import mine_responses
from dpo_mm.policies.families import load_policy
from dpo_mm.recipe import read_recipe
from dpo_mm.training.objective_settings import sft_baseline_config
from dpo_mm.training.run import train
from dpo_mm.worlds import documents

ALL_SIZES, LARGE_SIZES = (80, 112, 144), (112, 144)
"""Width and height of the pages in pixels. The model's input has 80."""
CLEAN, STEPS = 3_900, 500
"""Clean pages for the base model, and its training steps with 16 pages each."""
TEST, VALIDATION, MINED, MAX_NEW_TOKENS = 400, 100, 300, 380
"""Number of held-out pages for testing and for validation, of pages for mining, and the limit of tokens per response."""
TEST_SEED, VALIDATION_SEED, CONFIRM_SEED, MINED_SEED, CLEAN_SEED = 0, 5, 40, 1, 300
RATES = (1e-3, 3e-3, 6e-3)
JUDGES = ("degeneration", "trailing_repetition", "repetition", "cer", "valid_json", "num_tokens")
BATCH = 8
"""Pairs per step."""
ARMS = ("dpo", "sft")
"""Arms that are trained with each seed."""
FIRST_SEED_ARMS = ("dpo, cut after three rounds", "more sft on clean pages")
"""Arms that are trained only with the first seed."""


def pages(widths: tuple[int, ...], count: int, seed: int, *, held_out: bool) -> Iterator[documents.DocumentPage]:
    """Generate `count` square pages in total, with the widths interleaved."""
    pages_by_width = [
        documents.pages(count // len(widths), seed + width, held_out=held_out, width=width, height=width)
        for width in widths
    ]
    return itertools.chain.from_iterable(zip(*pages_by_width, strict=True))


def write_questions(work: Path, count: int, seed: int, *, held_out: bool) -> str:
    """Write a file of large pages with their ground truth, and return its path."""
    path = work / f"pages-{seed}-{'held-out' if held_out else 'train'}.parquet"
    if not path.exists():
        rows = [
            {
                "id": f"page-{number}",
                "images": [{"bytes": encode_png(documents.render(page)), "path": None}],
                "prompt": documents.PROMPTS[page.form],
                "ground_truth": documents.transcription(page),
                "category": page.kind,
            }
            for number, page in enumerate(pages(LARGE_SIZES, count, seed, held_out=held_out))
        ]
        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def write_clean_pages(work: Path) -> str:
    """Write pages with correct transcriptions as pairs, and return the path. The rejected response is not used."""
    path = work / "clean.parquet"
    if not path.exists():
        rows = [
            {
                "id": str(number),
                "images": [{"bytes": encode_png(documents.render(page)), "path": None}],
                "prompt": documents.PROMPTS[page.form],
                "chosen": documents.transcription(page),
                "rejected": "-",
            }
            for number, page in enumerate(pages(ALL_SIZES, CLEAN, CLEAN_SEED, held_out=False))
        ]
        write_rows(rows, path, make=make_response_rows, features=response_preference())
    return str(path)


def base_model(work: Path) -> str:
    """Train the base model, the bundled OCR model after full fine-tuning on clean pages of all sizes. Returns its folder."""
    folder = work / "reader"
    if not (folder / "config.json").exists():
        train(
            TrainConfig(
                "page-reader",
                write_clean_pages(work),
                str(folder),
                objective="sft",
                tuning="full",
                train_vision_tower=True,
                steps=STEPS,
                batch_size=16,
                learning_rate=4e-4,
                warmup_steps=20,
                schedule="cosine",
                eval_fraction=0.02,
                eval_every=100,
            )
        )
    return str(folder)


def mine_pairs(work: Path, seed: int) -> str:
    """Mine pairs from the base model's repetition loops on large pages, with greedy decoding. Returns their path."""
    questions = write_questions(work, MINED, MINED_SEED + seed, held_out=False)
    folder = work / f"mined-{seed}"
    config = MineResponsesConfig(
        base_model(work),
        questions,
        str(folder),
        "degeneration",
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=100,
        seed=seed,
    )
    return str(mine_responses(config))


def pairs_of(arm: str, work: Path, seed: int) -> str:
    """Path of an arm's pairs: mined, clean pages, or mined with every loop truncated after three repeats."""
    if arm == "more sft on clean pages":
        return write_clean_pages(work)
    path = Path(mine_pairs(work, seed))
    if "three rounds" not in arm:
        return str(path)
    rows = pq.read_table(path)
    row_dicts = rows.to_pylist()
    for part in (row["rejected"][0]["content"][0] for row in row_dicts if row["rejected_truncated"]):
        part["text"] = truncate_repetition(part["text"])
    pq.write_table(pa.Table.from_pylist(row_dicts, schema=rows.schema), path.with_stem("short"))
    return str(path.with_stem("short"))


def train_arm(arm: str, work: Path, seed: int, learning_rate: float) -> tuple[str, float | None]:
    """Train an arm.

    Returns the folder of its adapter, and the final difference of the chosen log-prob to the reference's, in nats.
    """
    folder = work / f"{arm}, rate {learning_rate:g}, seed {seed}".replace(", ", "-").replace(" ", "-")
    if not (folder / "nats.json").exists():
        settings = {
            "model": base_model(work),
            "learning_rate": str(learning_rate),
            "seed": str(seed),
            "train.eval_fraction": "0",
        }
        config = read_recipe("ocr", "pages", settings).train
        config = dataclasses.replace(
            config,
            pairs=pairs_of(arm, work, seed),
            output_dir=str(folder),
            batch_size=BATCH,
        )
        if "sft" in arm:
            config = dataclasses.replace(sft_baseline_config(config), output_dir=str(folder))
        result = train(config)
        rewards = [entry["rewards/chosen"] for entry in result.history if "rewards/chosen" in entry]
        (folder / "nats.json").write_text(json.dumps(rewards[-1] / result.beta if rewards else None))
    return str(folder), json.loads((folder / "nats.json").read_text())


def evaluation_config(
    work: Path, seed: int = TEST_SEED, *, count: int = TEST, temperature: float = 0.0
) -> CompareResponsesConfig:
    """The settings of the evaluation on held-out large pages. seed: seed of the pages."""
    return CompareResponsesConfig(
        base_model(work),
        str(work),
        write_questions(work, count, seed, held_out=True),
        judges=JUDGES,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=temperature,
        batch_size=100,
    )


def evaluate(config: CompareResponsesConfig, adapter: str | None, work: Path) -> ScoredResponses:
    """Generate and score responses to the config's questions."""
    policy = load_policy(config.model)
    if adapter:
        policy.load_adapter(adapter)
    config = dataclasses.replace(config, adapter=adapter)
    return generate_responses(
        policy, read_questions(config.questions), config, base=adapter is None, title="OCR model", output_dir=work
    )


def rates(responses: ScoredResponses) -> dict[str, float]:
    """Total hits divided by total counts, by judge."""
    return {
        name: float(hits_and_totals[:, 0].sum() / max(hits_and_totals[:, 1].sum(), 1))
        for name, hits_and_totals in responses.ratios.items()
    }


def best_rates(work: Path, seed: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Find the learning rates of DPO and SFT with the lowest character error rate on the validation pages.

    Returns the best rate of each, and the rows of all rates.
    """
    rows: list[dict[str, Any]] = []
    for arm, learning_rate in itertools.product(("dpo", "sft"), RATES):
        folder, nats = train_arm(arm, work, seed, learning_rate)
        scores = rates(evaluate(evaluation_config(work, VALIDATION_SEED, count=VALIDATION), folder, work))
        rows.append({"arm": arm, "learning_rate": learning_rate, "chosen_nats": nats, **scores})
        print(json.dumps(rows[-1]), flush=True)
    best = {
        arm: min((row for row in rows if row["arm"] == arm), key=lambda row: row["cer"])["learning_rate"]
        for arm in ("dpo", "sft")
    }
    return best, rows


def study(work: Path, seeds: list[int]) -> Iterator[dict[str, Any]]:
    """Train and evaluate all arms, and yield the report after each.

    Each arm's row has its rates on the held-out pages and its comparison with the base. Rows of SFT also have DPO's
    comparison with it.
    """
    config = evaluation_config(work)
    base = evaluate(config, None, work)
    sampled = evaluate(evaluation_config(work, temperature=1.0), None, work)
    rows: list[dict[str, Any]] = [{"arm": "base", **rates(base)}, {"arm": "base, temperature 1", **rates(sampled)}]
    best, rates_tried = best_rates(work, seeds[0])
    pairs = {str(seed): pq.read_metadata(mine_pairs(work, seed)).num_rows for seed in seeds}
    responses_by_arm: dict[tuple[int, str], ScoredResponses] = {}
    for seed, arm in [*itertools.product(seeds, ARMS), *((seeds[0], arm) for arm in FIRST_SEED_ARMS)]:
        learning_rate = best["sft" if "sft" in arm else "dpo"]
        folder, nats = train_arm(arm, work, seed, learning_rate)
        responses = responses_by_arm[seed, arm] = evaluate(config, folder, work)
        row = {"arm": arm, "seed": seed, "learning_rate": learning_rate, "chosen_nats": nats, **rates(responses)}
        rows.append({**row, "against_base": _against(base, responses, config)})
        dpo_arm = arm.replace("sft", "dpo")
        if arm.startswith("sft") and (seed, dpo_arm) in responses_by_arm:
            rows[-1]["dpo_against_it"] = _against(responses, responses_by_arm[seed, dpo_arm], config)
        elif "three rounds" in arm:
            rows[-1]["dpo_against_it"] = _against(responses, responses_by_arm[seed, "dpo"], config)
        print(json.dumps(rows[-1]), flush=True)
        report = {"pages": TEST, "mined_pairs": pairs, "best_rates": best, "rates_tried": rates_tried, "rows": rows}
        yield report
    yield {**report, "other_pages": evaluate_on_new_pages(work, seeds, best)}


def evaluate_on_new_pages(work: Path, seeds: list[int], best: dict[str, float]) -> list[dict[str, Any]]:
    """Evaluate base, DPO and SFT on as many new pages, which no choice was based on."""
    config = evaluation_config(work, CONFIRM_SEED)
    rows: list[dict[str, Any]] = [{"arm": "base", **rates(evaluate(config, None, work))}]
    for seed in seeds:
        dpo, sft = (evaluate(config, train_arm(arm, work, seed, best[arm])[0], work) for arm in ARMS)
        rows.append({"arm": "dpo", "seed": seed, **rates(dpo)})
        rows.append({"arm": "sft", "seed": seed, **rates(sft), "dpo_against_it": _against(sft, dpo, config)})
        print(json.dumps(rows[-2:]), flush=True)
    return rows


def _against(base: ScoredResponses, tuned: ScoredResponses, config: CompareResponsesConfig) -> dict[str, Any]:
    results = comparisons(base, tuned, config)
    return {c.judge: {"difference": c.difference, "low": c.low, "high": c.high, "verdict": c.verdict} for c in results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--work", type=Path, help="folder for models and pairs (default: a temporary one)")
    options = parser.parse_args()
    with suppress_library_output(), tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        command = f"python -m tests.bench.sft_or_dpo {options.out} --seeds {options.seeds}"
        for report in study(work, [int(part) for part in options.seeds.split(",")]):
            options.out.write_text(json.dumps({"command": command, **report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
