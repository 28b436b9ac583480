"""Compare `beta: auto` with the betas of the bundled recipes, which were chosen by hand.

Command: python -m tests.bench.betas OUTPUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dpo_mm.cli.main import suppress_library_output
from dpo_mm.recipe import read_recipe
from dpo_mm.training.auto_beta import SHARE, measure_beta


def main(out: Path) -> None:
    from dpo_mm.training.builders import build_policy
    from dpo_mm.training.encoding import encode_splits
    from dpo_mm.training.pair_stream import training_stream

    table = []
    with suppress_library_output():
        for task, preset in (("faithfulness", "shapes"), ("aesthetic", "shapes")):
            config = read_recipe(task, preset, {}).train
            policy = build_policy(config)
            rows = encode_splits(policy, config).rows
            policy.prepare(config)
            auto_beta = measure_beta(policy, training_stream(config, rows, 1), config)
            table.append({"recipe": f"{task}, {preset}", "by_hand": config.beta, "auto": auto_beta})
    command = f"python -m tests.bench.betas {out}"
    out.write_text(json.dumps({"command": command, "share": SHARE["image"], "rows": table}, indent=1) + "\n")
    print(out.read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
