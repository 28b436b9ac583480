"""Padding of batches of response pairs in random order and grouped by length.

    python -m tests.bench.length_groups harmless-base/test.jsonl.gz --out docs/benchmarks/length-groups.json

The file has one JSON object per line with `chosen` and `rejected`, as Anthropic's HH-RLHF has. Its texts are counted in tokens of
CLIP. A row has the tokens of the prompt, which is what both texts begin with, and of both responses.
`padding` is the fraction of a batch's columns that hold no token: prompt, chosen and rejected are padded separately.
"""

from __future__ import annotations

import argparse
import gzip
import json
from itertools import takewhile
from pathlib import Path

import numpy as np

from dpo_mm.training.pair_stream import PairStream, order_by_length


def read_lengths(path: Path) -> np.ndarray:
    """Return the tokens of prompt, chosen and rejected of each row, (rows, 3)."""
    from open_clip.tokenizer import SimpleTokenizer

    encode, lengths = SimpleTokenizer().encode, []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            same = takewhile(lambda both: both[0] == both[1], zip(row["chosen"], row["rejected"], strict=False))
            prompt = "".join(letter for letter, _ in same)
            prompt = prompt[: prompt.rindex("Assistant:") + len("Assistant:")]
            parts = prompt, row["chosen"][len(prompt) :], row["rejected"][len(prompt) :]
            lengths.append([len(encode(part)) + 1 for part in parts])
    return np.array(lengths)


def padding(lengths: np.ndarray, order: list[int], batch_size: int) -> float:
    """Return the fraction of the columns of all batches that is padding."""
    batches = [lengths[order[start : start + batch_size]] for start in range(0, len(order), batch_size)]
    return float(1 - lengths.sum() / sum(len(batch) * batch.max(0).sum() for batch in batches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lengths = read_lengths(options.file)
    total = (lengths[:, 0] + lengths[:, 1:].max(1)).tolist()
    median, high = np.percentile(total, [50, 99])
    results: dict[str, object] = {"rows": len(total), "median": median, "p99": high, "max": max(total), "padding": []}
    for size in options.batch_sizes:
        stream = PairStream([{"id": str(n)} for n in range(len(total))], seed=0, length=len(total))
        shuffled = [int(stream[n]["id"]) for n in range(len(total))]
        grouped = order_by_length(total, size, (0, 0))
        found = {name: padding(lengths, order, size) for name, order in (("random", shuffled), ("grouped", grouped))}
        tokens = (1 - found["random"]) / (1 - found["grouped"])
        found = {name: round(value, 3) for name, value in found.items()}
        results["padding"] += [{"batch_size": size, **found, "tokens_of_random": round(tokens, 3)}]  # type: ignore[operator]
    print(json.dumps(results, indent=1))
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
