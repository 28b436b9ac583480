"""Where DPO on own loops beats SFT on the same right transcriptions, and where it doesn't.

    python -m tests.bench.sft_or_dpo docs/benchmarks/sft-or-dpo.json [--seeds 0,1,2] [--work FOLDER]

A reader is made whose last transcriptions were all clean: the shipped one, fine-tuned whole on pages of three sizes.
The larger ones are shrunk to what it sees, so that it can't make out where a dotted leader ends. Such large pages of
the training side are mined for its own loops, and each arm trains on those pairs (one on the clean pages instead) and
reads the same held-out large pages. The learning rate of each of DPO and SFT is the one with the lowest character
error rate (loops count in it) on other held-out pages, at the first seed. At
the end DPO and SFT read as many pages again, which nothing was chosen by. A run that was cut goes on in --work.
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
from dpo_mm.recipe import read_recipe, sft_baseline_config
from dpo_mm.training.run import train
from dpo_mm.worlds import documents

ALL, LARGE = (80, 112, 144), (112, 144)
"""Pixels on a side of the pages; the reader sees 80."""
CLEAN, STEPS = 3_900, 500
"""Pages that the reader learns from, and its steps of 16."""
TEST, VALIDATION, MINED, LIMIT = 400, 100, 300, 380
"""Held-out pages, of two kinds, pages asked in mining, and tokens of an answer at most."""
TEST_SEED, VALIDATION_SEED, CONFIRM_SEED, MINED_SEED, CLEAN_SEED = 0, 5, 40, 1, 300
RATES = (1e-3, 3e-3, 6e-3)
JUDGES = ("degeneration", "trailing_repetition", "repetition", "cer", "valid_json", "num_tokens")
BATCH = 8
"""Pairs a step."""
ARMS = ("dpo", "sft")
"""Of each seed."""
BESIDE = ("dpo, cut after three rounds", "more sft on clean pages")
"""Of the first seed alone."""


def pages(widths: tuple[int, ...], count: int, seed: int, *, held_out: bool) -> Iterator[documents.DocumentPage]:
    """Pages of the widths in turns, `count` in all."""
    each = [
        documents.pages(count // len(widths), seed + width, held_out=held_out, width=width, height=width)
        for width in widths
    ]
    return itertools.chain.from_iterable(zip(*each, strict=True))


def questions(work: Path, count: int, seed: int, *, held_out: bool) -> str:
    """A file of large pages with their truth."""
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
            for number, page in enumerate(pages(LARGE, count, seed, held_out=held_out))
        ]
        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def clean_pages(work: Path) -> str:
    """Pages with right transcriptions, as pairs whose rejected side nothing looks at."""
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
            for number, page in enumerate(pages(ALL, CLEAN, CLEAN_SEED, held_out=False))
        ]
        write_rows(rows, path, make=make_response_rows, features=response_preference())
    return str(path)


def reader(work: Path) -> str:
    """The reader whose data were clean: the shipped one, fine-tuned whole on pages of all sizes."""
    folder = work / "reader"
    if not (folder / "config.json").exists():
        train(
            TrainConfig(
                "page-reader",
                clean_pages(work),
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


def mined(work: Path, seed: int) -> str:
    """Pairs from the reader's own loops on large pages, greedy."""
    asked = questions(work, MINED, MINED_SEED + seed, held_out=False)
    folder = work / f"mined-{seed}"
    config = MineResponsesConfig(
        reader(work), asked, str(folder), "degeneration", max_new_tokens=LIMIT, batch_size=100, seed=seed
    )
    return str(mine_responses(config))


def pairs_of(arm: str, work: Path, seed: int) -> str:
    """The pairs of an arm: those mined, the clean pages, or those mined with every loop cut after three rounds."""
    if arm == "more sft on clean pages":
        return clean_pages(work)
    path = Path(mined(work, seed))
    if "three rounds" not in arm:
        return str(path)
    rows = pq.read_table(path)
    listed = rows.to_pylist()
    for part in (row["rejected"][0]["content"][0] for row in listed if row["rejected_truncated"]):
        part["text"] = truncate_repetition(part["text"])
    pq.write_table(pa.Table.from_pylist(listed, schema=rows.schema), path.with_stem("short"))
    return str(path.with_stem("short"))


def trained(arm: str, work: Path, seed: int, rate: float) -> tuple[str, float | None]:
    """Folder of an arm's adapter, and how far its chosen log-prob is from the reference's at the end, in nats."""
    folder = work / f"{arm}, rate {rate:g}, seed {seed}".replace(", ", "-").replace(" ", "-")
    if not (folder / "nats.json").exists():
        given = {"model": reader(work), "learning_rate": str(rate), "seed": str(seed), "train.eval_fraction": "0"}
        config = read_recipe("ocr", "pages", given).train
        config = dataclasses.replace(
            config,
            pairs=pairs_of(arm, work, seed),
            output_dir=str(folder),
            batch_size=BATCH,
        )
        if "sft" in arm:
            config = dataclasses.replace(sft_baseline_config(config), output_dir=str(folder))
        done = train(config)
        rewards = [entry["rewards/chosen"] for entry in done.history if "rewards/chosen" in entry]
        (folder / "nats.json").write_text(json.dumps(rewards[-1] / done.beta if rewards else None))
    return str(folder), json.loads((folder / "nats.json").read_text())


def asking(work: Path, seed: int = TEST_SEED, *, count: int = TEST, temperature: float = 0.0) -> CompareResponsesConfig:
    """How held-out large pages are asked; seed: of the pages."""
    return CompareResponsesConfig(
        reader(work),
        str(work),
        questions(work, count, seed, held_out=True),
        judges=JUDGES,
        max_new_tokens=LIMIT,
        temperature=temperature,
        batch_size=100,
    )


def asked(config: CompareResponsesConfig, adapter: str | None, work: Path) -> ScoredResponses:
    policy = load_policy(config.model)
    if adapter:
        policy.load_adapter(adapter)
    config = dataclasses.replace(config, adapter=adapter)
    return generate_responses(
        policy, read_questions(config.questions), config, base=adapter is None, title="OCR model", output_dir=work
    )


def rates(found: ScoredResponses) -> dict[str, float]:
    return {name: float(part[:, 0].sum() / max(part[:, 1].sum(), 1)) for name, part in found.ratios.items()}


def best_rates(work: Path, seed: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The learning rates of DPO and SFT with the lowest character error rate on the validation pages, and all tried."""
    tried: list[dict[str, Any]] = []
    for arm, rate in itertools.product(("dpo", "sft"), RATES):
        folder, nats = trained(arm, work, seed, rate)
        found = rates(asked(asking(work, VALIDATION_SEED, count=VALIDATION), folder, work))
        tried.append({"arm": arm, "learning_rate": rate, "chosen_nats": nats, **found})
        print(json.dumps(tried[-1]), flush=True)
    best = {
        arm: min((row for row in tried if row["arm"] == arm), key=lambda row: row["cer"])["learning_rate"]
        for arm in ("dpo", "sft")
    }
    return best, tried


def study(work: Path, seeds: list[int]) -> Iterator[dict[str, Any]]:
    """What is known after each arm: its rates on the held-out pages, beside the base's and, of DPO, against SFT's."""
    config = asking(work)
    base = asked(config, None, work)
    drawn = asked(asking(work, temperature=1.0), None, work)
    rows: list[dict[str, Any]] = [{"arm": "base", **rates(base)}, {"arm": "base, temperature 1", **rates(drawn)}]
    best, tried = best_rates(work, seeds[0])
    pairs = {str(seed): pq.read_metadata(mined(work, seed)).num_rows for seed in seeds}
    answers: dict[tuple[int, str], ScoredResponses] = {}
    for seed, arm in [*itertools.product(seeds, ARMS), *((seeds[0], arm) for arm in BESIDE)]:
        rate = best["sft" if "sft" in arm else "dpo"]
        folder, nats = trained(arm, work, seed, rate)
        found = answers[seed, arm] = asked(config, folder, work)
        row = {"arm": arm, "seed": seed, "learning_rate": rate, "chosen_nats": nats, **rates(found)}
        rows.append({**row, "against_base": _against(base, found, config)})
        rival = arm.replace("sft", "dpo")
        if arm.startswith("sft") and (seed, rival) in answers:
            rows[-1]["dpo_against_it"] = _against(found, answers[seed, rival], config)
        elif "three rounds" in arm:
            rows[-1]["dpo_against_it"] = _against(found, answers[seed, "dpo"], config)
        print(json.dumps(rows[-1]), flush=True)
        whole = {"pages": TEST, "mined_pairs": pairs, "best_rates": best, "rates_tried": tried, "rows": rows}
        yield whole
    yield {**whole, "other_pages": confirmed(work, seeds, best)}


def confirmed(work: Path, seeds: list[int], best: dict[str, float]) -> list[dict[str, Any]]:
    """Base, DPO and SFT on as many pages again, which nothing was chosen by."""
    config = asking(work, CONFIRM_SEED)
    rows: list[dict[str, Any]] = [{"arm": "base", **rates(asked(config, None, work))}]
    for seed in seeds:
        dpo, sft = (asked(config, trained(arm, work, seed, best[arm])[0], work) for arm in ARMS)
        rows.append({"arm": "dpo", "seed": seed, **rates(dpo)})
        rows.append({"arm": "sft", "seed": seed, **rates(sft), "dpo_against_it": _against(sft, dpo, config)})
        print(json.dumps(rows[-2:]), flush=True)
    return rows


def _against(one: ScoredResponses, other: ScoredResponses, config: CompareResponsesConfig) -> dict[str, Any]:
    found = comparisons(one, other, config)
    return {c.judge: {"difference": c.difference, "low": c.low, "high": c.high, "verdict": c.verdict} for c in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--work", type=Path, help="folder to keep what is made in; else it is thrown away")
    given = parser.parse_args()
    with suppress_library_output(), tempfile.TemporaryDirectory() as passing:
        work = given.work or Path(passing)
        work.mkdir(parents=True, exist_ok=True)
        command = f"python -m tests.bench.sft_or_dpo {given.out} --seeds {given.seeds}"
        for found in study(work, [int(part) for part in given.seeds.split(",")]):
            given.out.write_text(json.dumps({"command": command, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
