"""Make data/shapes: lists of prompts, and two preference datasets mined from the bundled base model.

    python data/make_shapes_pairs.py         # about six minutes on 2 CPU cores

Both datasets contain the base model's own images for training prompts. A judge pairs the best image of a prompt with the
worst, so rejected is the model's own failure. `aesthetic` contains only pairs whose better image follows the prompt at least as
well as the other one.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from pathlib import Path

import pyarrow.parquet as pq

from dpo_mm.cli.main import suppress_library_output
from dpo_mm.config import MineConfig
from dpo_mm.mining.mine_images import mine_images
from dpo_mm.worlds import shapes

HERE = Path(__file__).parent
SAMPLER = {"num_inference_steps": 15, "guidance_scale": 1.5, "batch_size": 48}
DATASETS = {
    "faithfulness": {"judges": "faithfulness", "max_prompts": 260, "images_per_prompt": 16, "pairs_per_prompt": 3},
    "aesthetic": {
        "judges": "aesthetic",
        "guards": "faithfulness",
        "max_prompts": 360,
        "images_per_prompt": 8,
        "min_score_gap": 0.1,
    },
}
CARD = """---
license: apache-2.0
---
# shapes preference sets

Pictures that `shapes-sd` drew of its training prompts (16 a prompt for faithfulness, 8 for beauty; 15 steps, guidance 1.5, seeds in the rows), judged by
`dpo_mm/judges/`, best against worst. Made by `python data/make_shapes_pairs.py`; rows are `ImagePreference`
(`dpo_mm/data/schema.py`), pictures PNG.

- `prompts-train.txt`, `prompts-held-out.txt`: disjoint in their combinations (`dpo_mm.worlds.shapes.split`).
- `faithfulness.parquet`: chosen shows exactly what the prompt asks for, rejected does not.
- `aesthetic.parquet`: chosen is prettier by at least 0.1, and follows the prompt at least as well.
- `edits-train.parquet`, `edits-held-out.parquet`: instructions with an image to edit, by `python data/make_shapes_editor.py`. The lists
  have no combination of kind, shape and colour in common (`dpo_mm.worlds.shape_edits.held_out_combinations`).

| file | rows | bytes | sha256 |
|---|---|---|---|
{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "shapes-pairs")
    options = parser.parse_args()
    folder = HERE / "shapes"
    folder.mkdir(exist_ok=True)
    for name, prompts in zip(("train", "held-out"), shapes.split(), strict=True):
        (folder / f"prompts-{name}.txt").write_text("\n".join(prompts) + "\n")
    table = []
    for name, settings in DATASETS.items():
        with suppress_library_output():
            work = str(options.work / name)
            mined = mine_images(MineConfig("shapes-sd", "shapes-train", work, **SAMPLER, **settings))  # type: ignore[arg-type]
        target = folder / f"{name}.parquet"
        shutil.copyfile(mined, target)
        digest = hashlib.sha256(target.read_bytes()).hexdigest()
        table.append(
            f"| {target.name} | {pq.read_metadata(target).num_rows} | {target.stat().st_size:,} | `{digest}` |"
        )
    (folder / "README.md").write_text(CARD.format(table="\n".join(table)))


if __name__ == "__main__":
    main()
