"""Fresh samples of several models to label: the same prompts and seeds drawn by each, into a folder of folders.

    samples/shapes-sd/0001.png    samples/shapes-sd-faithful/0001.png    samples/0001.txt

`open_pairs` reads such a folder. A picture that is there is not drawn again, so a run that was cut goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_mm.data.image_files import encode_png
from dpo_mm.data.prompts import read_prompts, seeds_of
from dpo_mm.policies.families import load_image_policy
from dpo_mm.progress import progress_bar
from dpo_mm.resumable import atomic_write, check_settings_unchanged

PLAN = "samples.json"
BATCH = 8


def draw_samples(
    models: Sequence[str], prompts: str, folder: str | Path, *, limit: int | None, steps: int, guidance: float,
    seed: int = 0, precision: str = "fp32",
) -> Path:  # fmt: skip
    """One picture of each prompt by each model, MODEL or MODEL+ADAPTER; gives the folder.

    Raises ValueError where there are fewer than two models, two have one name, or the folder holds other samples.
    """
    folder, names = Path(folder), [name_of(model) for model in models]
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise ValueError(
            f"models {', '.join(models)}: expected two or more with different names, as MODEL,MODEL+ADAPTER"
        )
    wanted = read_prompts(prompts, limit=limit)
    plan = {"models": list(models), "prompts": wanted, "steps": steps, "guidance": guidance, "seed": seed}
    check_settings_unchanged(folder, plan, done="drawn", flag="samples_dir", file=PLAN)
    for name in names:
        (folder / name).mkdir(exist_ok=True)
    for number, prompt in enumerate(wanted, 1):
        (folder / f"{number:04}.txt").write_text(prompt)
    seeds = [seeds_of(prompt, 1, seed=seed)[0] for prompt in wanted]
    with progress_bar("drawing samples", len(names) * len(wanted)) as advance:
        for model, name in zip(models, names, strict=True):
            places = [folder / name / f"{number:04}.png" for number in range(1, len(wanted) + 1)]
            left = [n for n, place in enumerate(places) if not place.exists()]
            advance(len(wanted) - len(left))
            drawn = _draw(model, [wanted[n] for n in left], [seeds[n] for n in left], steps, guidance, precision)
            for n, image in zip(left, drawn, strict=True):
                with atomic_write(places[n]) as beside:
                    beside.write_bytes(encode_png(image))
                advance(1)
    return folder


def name_of(model: str) -> str:
    """What a model is called in the folder: its adapter's name, or its own."""
    return Path(model.partition("+")[2] or model).name


def _draw(model: str, prompts: list[str], seeds: list[int], steps: int, guidance: float, precision: str) -> Any:
    if not prompts:
        return
    base, _, adapter = model.partition("+")
    policy = load_image_policy(base, precision=precision, adapter=adapter or None)
    for part in policy.sample(prompts, seeds, steps=steps, guidance=guidance, batch_size=BATCH):
        yield from part
