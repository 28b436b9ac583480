"""CPU seconds of encoding or mining by number of rows, on the tiny models of the contract tests.

    python -m tests.bench.growth encode 500 WORK_FOLDER        # prints CPU seconds

`tests.bench.real_size growth` runs it with two sizes and computes the exponent.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from dpo_mm.config import MineResponsesConfig
from dpo_mm.data.schema import drop_ties, make_image_rows
from dpo_mm.mining.mine_responses import mine_responses
from dpo_mm.policies.families import load_policy
from dpo_mm.training.encoding import encode
from tests.conftest import rows
from tests.contracts.families import stable_diffusion
from tests.contracts.tiny_vlms import noise_image, save


def encode_rows(count: int, folder: Path) -> float:
    """Encode pairs of images of 32 pixels with a tiny Stable Diffusion. The first pairs warm up."""
    policy = load_policy(str(stable_diffusion(folder / "model")))
    pairs = drop_ties(make_image_rows(rows(count)))
    encode(policy, pairs.select(range(8)), where="pairs", cache=folder / "warm")
    start = time.process_time()
    encode(policy, pairs, where="pairs", cache=folder / "cache")
    return time.process_time() - start


def mine_rows(count: int, folder: Path) -> float:
    """Mine responses of a tiny LLaVA to questions with an image each. The first questions warm up."""
    seconds = 0.0
    for name, number in (("warm", 8), ("mined", count)):
        for n in range(number):
            noise_image(n % 50).save(folder / f"{n % 50}.png")
        lines = [
            json.dumps({"prompt": f"What is {n}?", "image": f"{n % 50}.png", "ground_truth": f"a field {n}"})
            for n in range(number)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        config = MineResponsesConfig(
            model=save("llava", folder / "model"),
            questions=str(folder / f"{name}.jsonl"),
            output_dir=str(folder / name),
            judges="cer",
            responses_per_question=2,
            max_new_tokens=8,
        )
        start = time.process_time()
        mine_responses(config)
        seconds = time.process_time() - start
    return seconds


def main() -> None:
    kind, count, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    print({"encode": encode_rows, "mine": mine_rows}[kind](count, folder))


if __name__ == "__main__":
    main()
