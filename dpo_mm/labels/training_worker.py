"""Process that trains on votes: export, train, and fresh pairs of base and tuned. See `dpo_mm.labels.vote_training`.

python -m dpo_mm.labels.training_worker FOLDER_OF_THE_ROUND
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from dpo_mm.errors import TrainingInterrupted, one_line
from dpo_mm.labels.vote_training import (
    CHECKPOINTS,
    LABELS,
    LOCK,
    RUN,
    SAMPLES,
    STAGE,
    STAGES,
    TrainingPlan,
    read_plan,
    read_record,
    write_record,
)
from dpo_mm.process.interruption import stop_on_signal

if TYPE_CHECKING:
    from datasets import Dataset

    from dpo_mm.config import TrainConfig

LOCK_SECONDS = 30.0
"""Time to wait for the lock: a page holds it for an instant when it looks whether a process works."""


def work(folder: Path) -> None:
    """Do the stages of a round that are not done, unless another process does them. A failure is recorded."""
    lock = FileLock(folder.parent / LOCK)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        return
    try:
        with stop_on_signal():
            plan = read_plan(folder)
            done = read_record(folder / STAGE).get("stage", STAGES[0])
            for stage in STAGES[STAGES.index(done) :] if done in STAGES else ():
                write_record(folder / STAGE, {"stage": stage, "process": os.getpid()})
                {"export": _export, "train": _train, "sample": _sample}[stage](plan, folder)
            write_record(folder / STAGE, {"stage": "ready"})
    except TrainingInterrupted:
        return  # the stage remains, so the next process resumes it
    except Exception as error:
        traceback.print_exc()
        write_record(folder / STAGE, {"stage": "failed", "message": one_line(error)})
    finally:
        lock.release()


def _export(plan: TrainingPlan, folder: Path) -> None:
    from dpo_mm.labels.export import export

    if not (folder / LABELS).exists():  # votes of a later time would change a run that resumes
        export(plan.votes, str(folder / LABELS), pairs=plan.pairs)


def train_config(plan: TrainingPlan, folder: Path) -> TrainConfig:
    """Return the settings of a round's training run.

    Raises:
        ValueError: if a setting is not valid.
    """
    from dpo_mm.config import TrainConfig
    from dpo_mm.config.config_parsing import config_from_mapping

    own = {"pairs": str(folder / LABELS), "output_dir": str(folder / RUN)}
    config = config_from_mapping(TrainConfig, {**plan.settings, **own}, source="the settings of --train")
    if config.save_every:
        return config
    every = max(1, config.steps // CHECKPOINTS)
    return config_from_mapping(TrainConfig, {**plan.settings, **own, "save_every": every}, source="--train")


def _train(plan: TrainingPlan, folder: Path) -> None:
    from dpo_mm.judges.working_folder import import_from_working_folder
    from dpo_mm.printing.printed_text import print_rows
    from dpo_mm.training.run import train

    config = train_config(plan, folder)
    import_from_working_folder(config)
    train(config, show_plan=print_rows)


def _sample(plan: TrainingPlan, folder: Path) -> None:
    from dpo_mm.config.setting_limits import resolve_precision
    from dpo_mm.labels.fresh_responses import generate_response_pairs
    from dpo_mm.labels.fresh_samples import generate_samples
    from dpo_mm.labels.pairs import open_pairs

    config, rows, run = train_config(plan, folder), open_pairs(plan.pairs), str(folder / RUN)
    common: dict[str, Any] = {"seed": int(folder.name), "precision": resolve_precision(config.precision)}
    if "chosen" in rows.column_names:
        models, file = [(config.model, config.adapter), (config.model, run)], folder / SAMPLES / "pairs.parquet"
        common |= {"max_pairs": plan.max_prompts, "max_new_tokens": config.max_new_tokens}
        generate_response_pairs(rows, models, file, **common)
        return
    generate_samples(
        [f"{config.model}+{config.adapter}" if config.adapter else config.model, f"{config.model}+{run}"],
        plan.prompts or _prompts_of(rows, folder),
        folder / SAMPLES,
        max_prompts=plan.max_prompts,
        num_inference_steps=plan.num_inference_steps,
        guidance_scale=plan.guidance_scale,
        **common,
    )


def _prompts_of(rows: Dataset, folder: Path) -> str:
    """Write the prompts of the labelled pairs with their images to edit, each once, and return the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dpo_mm.data.lazy_images import source_cells
    from dpo_mm.labels.pairs import file_bytes

    sources = [source_cells({"image_source": value}) for value in rows["image_source"][:]]
    files = [tuple(file_bytes(cell) for cell in cells) for cells in sources]
    prompts = [" ".join(prompt.split()) for prompt in rows["prompt"][:]]
    each = list(dict.fromkeys(zip(prompts, files, strict=True)))
    table = pa.table({"prompt": [prompt for prompt, _ in each]})
    if any(images for _, images in each):
        cells = [[{"bytes": image, "path": None} for image in images] for _, images in each]
        table = table.append_column("images", pa.array(cells))
    file = folder / "prompts.parquet"
    pq.write_table(table, file)
    return str(file)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
