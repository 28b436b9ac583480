"""What keeping references saves a step, and costs before the first: python -m tests.bench.reference_time OUTPUT.json

On the shapes recipe: CPU time of a training step (loss and backward) with the reference asked in it, and with its errors
kept for K draws a row; least of 7 steps each, in turns.
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
        kept = dataclasses.replace(config, reference="precomputed", fixed_draws_per_row=1)
        began = time.process_time()
        once = precompute_reference_log_probs(policy, training_stream(kept, rows, 1), kept)
        spent = time.process_time() - began
        trainers = {
            "asked in the step": PreferenceTrainer(policy, config, rows),
            "kept": PreferenceTrainer(policy, kept, once),
        }
        times: dict[str, list[float]] = {name: [] for name in trainers}
        for number in range(ROUNDS):
            for name, trainer in trainers.items():
                times[name].append(step(trainer, number))
    best = {name: 1000 * min(found) for name, found in times.items()}
    table = [{"reference": "asked in the step", "step_ms": best["asked in the step"], "before_s": 0.0}]
    table += [{"reference": f"kept, K = {k}", "step_ms": best["kept"], "before_s": k * spent} for k in (1, 4, 16)]
    note = "before_s is measured for K = 1 and K times that for the others"
    command = f"python -m tests.bench.reference_time {out}"
    out.write_text(json.dumps({"command": command, "note": note, "rows": table}, indent=1) + "\n")
    print(out.read_text())


def step(trainer: Any, number: int) -> float:
    """CPU seconds of loss and backward of a batch."""
    size = trainer.config.batch_size
    batch = trainer.policy.collate([trainer.train_dataset[n] for n in range(number * size, (number + 1) * size)])
    began = time.process_time()
    trainer.compute_loss(trainer.policy.model, batch).backward()
    return time.process_time() - began


if __name__ == "__main__":
    main(Path(sys.argv[1]))
