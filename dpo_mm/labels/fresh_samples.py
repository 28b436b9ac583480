"""Fresh images of several models to label: every model generates from the same prompts and seeds.

    samples/shapes-sd/0001.png    samples/shapes-sd-faithful/0001.png    samples/0001.txt

`open_pairs` reads such a folder. Images that exist are not generated again, so an interrupted run resumes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpo_mm.content_key import library_versions
from dpo_mm.data.image_files import encode_png
from dpo_mm.data.prompts import read_prompts, seeds_of
from dpo_mm.interruption import stop_on_signal
from dpo_mm.policies.families import load_image_policy, model_content
from dpo_mm.progress import progress_bar
from dpo_mm.resumable import atomic_write, check_settings_unchanged

SETTINGS_FILE = "samples.json"
BATCH = 8


def generate_samples(
    models: Sequence[str], prompts: str, folder: str | Path, *, max_prompts: int | None, num_inference_steps: int,
    guidance_scale: float, seed: int = 0, precision: str = "fp32",
) -> Path:  # fmt: skip
    """Generate one image per prompt and model, in one subfolder per model. Return the folder.

    Args:
        models: two or more models, each as MODEL or MODEL+ADAPTER.
        prompts: a prompt file or a bundled list, as `read_prompts` takes it.
        folder: output folder.
        max_prompts: largest number of prompts. None: all.

    Raises:
        ValueError: if there are fewer than two models, two have the same name, or the folder was generated with other
            settings.
    """
    folder, names = Path(folder), [model_name(model) for model in models]
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise ValueError(
            f"models {', '.join(models)}: expected two or more with different names, as MODEL,MODEL+ADAPTER"
        )
    texts = read_prompts(prompts, limit=max_prompts)
    settings = {"steps": num_inference_steps, "guidance": guidance_scale, "seed": seed, "precision": precision}
    parts = ingredients(models, texts, settings)
    check_settings_unchanged(folder, "images to label", parts, done="generated", flag="samples_dir", file=SETTINGS_FILE)
    for name in names:
        (folder / name).mkdir(exist_ok=True)
    for number, prompt in enumerate(texts, 1):
        (folder / f"{number:04}.txt").write_text(prompt, encoding="utf-8")
    seeds = [seeds_of(prompt, 1, seed=seed)[0] for prompt in texts]
    saved = lambda: f"{len(list(folder.glob('*/*.png')))} images are in {folder}" if any(folder.glob("*/*.png")) else ""
    with stop_on_signal(saved), progress_bar("generating images", len(names) * len(texts)) as advance:
        for model, name in zip(models, names, strict=True):
            paths = [folder / name / f"{number:04}.png" for number in range(1, len(texts) + 1)]
            missing = [n for n, path in enumerate(paths) if not path.exists()]
            advance(len(texts) - len(missing))
            images = _generate(
                model,
                [texts[n] for n in missing],
                [seeds[n] for n in missing],
                num_inference_steps,
                guidance_scale,
                precision,
            )
            for n, image in zip(missing, images, strict=True):
                with atomic_write(paths[n]) as temporary:
                    temporary.write_bytes(encode_png(image))
                advance(1)
    return folder


def ingredients(models: Sequence[str], prompts: Sequence[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Return what decides the images, see `dpo_mm.content_key`."""
    files = {model: [model_content(part) for part in model.split("+") if part] for model in models}
    return {"settings": settings, "models": files, "prompts": list(prompts), "libraries": library_versions()}


def model_name(model: str) -> str:
    """Return the name of a model's subfolder: the name of its adapter, or its own if it has none."""
    return Path(model.partition("+")[2] or model).name


def _generate(
    model: str, prompts: list[str], seeds: list[int], steps: int, guidance: float, precision: str
) -> Iterator[Any]:
    if not prompts:
        return
    base, _, adapter = model.partition("+")
    policy = load_image_policy(base, precision=precision, adapter=adapter or None)
    for images in policy.sample(prompts, seeds, steps=steps, guidance=guidance, batch_size=BATCH):
        yield from images
