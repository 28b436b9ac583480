"""Measure the time that precomputed references save per step, and their cost before the first step.

Command: python -m tests.bench.reference_time OUTPUT.json

It runs on the shapes recipe. It measures the CPU time of a training step (loss and backward) with the online reference,
and with reference errors precomputed for K draws per row. Each figure is the fastest of 7 steps, with the two interleaved.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dpo_mm.cli.main import suppress_library_output
from dpo_mm.recipe import read_recipe

ROUNDS = 7


def main(out: Path) -> None:
    from dpo_mm.training.builders import build_policy
    from dpo_mm.training.encoding import encode_splits
    from dpo_mm.training.pair_stream import training_stream
    from dpo_mm.training.reference import precompute_reference_log_probs
    from dpo_mm.training.trainer import PreferenceTrainer

    with suppress_library_output(), tempfile.TemporaryDirectory() as folder:
        config = read_recipe("faithfulness", "shapes", {"output_dir": folder}).train
        policy = build_policy(config)
        rows = encode_splits(policy, config).rows
        policy.free_encoders()
        policy.prepare(config)
        precomputed_config = dataclasses.replace(config, reference="precomputed", fixed_draws_per_row=1)
        start = time.process_time()
        precomputed_rows = precompute_reference_log_probs(
            policy, training_stream(precomputed_config, rows, 1), precomputed_config
        )
        spent = time.process_time() - start
        trainers = {
            "asked in the step": PreferenceTrainer(policy, config, rows),
            "kept": PreferenceTrainer(policy, precomputed_config, precomputed_rows),
        }
        times: dict[str, list[float]] = {name: [] for name in trainers}
        for number in range(ROUNDS):
            for name, trainer in trainers.items():
                times[name].append(step(trainer, number))
    best = {name: 1000 * min(seconds) for name, seconds in times.items()}
    table = [{"reference": "asked in the step", "step_ms": best["asked in the step"], "before_s": 0.0}]
    table += [{"reference": f"kept, K = {k}", "step_ms": best["kept"], "before_s": k * spent} for k in (1, 4, 16)]
    note = "before_s is measured for K = 1 and K times that for the others"
    command = f"python -m tests.bench.reference_time {out}"
    out.write_text(json.dumps({"command": command, "note": note, "rows": table}, indent=1) + "\n")
    print(out.read_text())


def step(trainer: Any, number: int) -> float:
    """CPU seconds of loss and backward for one batch."""
    size = trainer.config.batch_size
    batch = trainer.policy.collate([trainer.train_dataset[n] for n in range(number * size, (number + 1) * size)])
    start = time.process_time()
    trainer.compute_loss(trainer.policy.model, batch).backward()
    return time.process_time() - start


if __name__ == "__main__":
    main(Path(sys.argv[1]))
