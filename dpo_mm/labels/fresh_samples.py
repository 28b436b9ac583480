"""Fresh images of several models to label: every model generates from the same prompts and seeds.

    samples/shapes-sd/0001.png    samples/shapes-sd-faithful/0001.png    samples/0001.txt

`open_pairs` reads such a folder. Images that exist are not generated again, so an interrupted run resumes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpo_mm.checksums import is_intact, write_complete, write_with_checksum
from dpo_mm.content_key import file_hash, library_versions
from dpo_mm.data.image_files import encode_png
from dpo_mm.data.prompts import read_prompts, seeds_of
from dpo_mm.interruption import stop_on_signal
from dpo_mm.outputs import OutputKind, output_folder, settings_of
from dpo_mm.policies.families import load_image_policy, model_content
from dpo_mm.progress import progress_bar

SAMPLES = OutputKind("samples.json", "generated", flag="samples_dir", parts=("*",))
BATCH = 8


def generate_samples(
    models: Sequence[str], prompts: str, folder: str | Path, *, max_prompts: int | None, num_inference_steps: int,
    guidance_scale: float, seed: int = 0, precision: str = "fp32", overwrite: bool = False,
) -> Path:  # fmt: skip
    """Generate one image per prompt and model, in one subfolder per model. Return the folder.

    Args:
        models: two or more models, each as MODEL or MODEL+ADAPTER.
        prompts: a prompt file or a bundled list, as `read_prompts` takes it.
        folder: output folder.
        max_prompts: largest number of prompts. None: all.
        overwrite: remove images of other settings first, if they are unchanged.

    Raises:
        ValueError: if there are fewer than two models, two have the same name, or the folder has other files or was generated
            with other settings.
    """
    folder, names = Path(folder), [model_name(model) for model in models]
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise ValueError(
            f"models {', '.join(models)}: expected two or more with different names, as MODEL,MODEL+ADAPTER"
        )
    texts = read_prompts(prompts, limit=max_prompts)
    settings = {"steps": num_inference_steps, "guidance": guidance_scale, "seed": seed, "precision": precision}
    recorded = settings_of("images to label", ingredients(models, texts, settings))
    inputs = [prompts, *(part for model in models for part in model.split("+"))]
    with output_folder(folder, SAMPLES, recorded, inputs=inputs, overwrite=overwrite) as finished:
        if not finished:
            _generate_missing(models, texts, folder, settings)
    return folder


def _generate_missing(models: Sequence[str], texts: Sequence[str], folder: Path, settings: dict[str, Any]) -> None:
    """Write the prompts and the images that do not exist yet."""
    prompt_files = [folder / f"{number:04}.txt" for number in range(1, len(texts) + 1)]
    for path, prompt in zip(prompt_files, texts, strict=True):
        if not is_intact(path):
            with write_with_checksum(path) as temporary:
                temporary.write_text(prompt, encoding="utf-8")
    seeds = [seeds_of(prompt, 1, seed=settings["seed"])[0] for prompt in texts]
    saved = lambda: f"{len(list(folder.glob('*/*.png')))} images are in {folder}" if any(folder.glob("*/*.png")) else ""
    image_files = {
        model: [folder / model_name(model) / f"{path.stem}.png" for path in prompt_files] for model in models
    }
    with stop_on_signal(saved), progress_bar("generating images", len(models) * len(texts)) as advance:
        for model, paths in image_files.items():
            paths[0].parent.mkdir(exist_ok=True)
            missing = [n for n, path in enumerate(paths) if not is_intact(path)]
            advance(len(texts) - len(missing))
            images = _generate(model, [texts[n] for n in missing], [seeds[n] for n in missing], settings)
            for n, image in zip(missing, images, strict=True):
                with write_with_checksum(paths[n]) as temporary:
                    temporary.write_bytes(encode_png(image))
                advance(1)
    paths = [*prompt_files, *(path for paths in image_files.values() for path in paths)]
    write_complete(folder, {str(path.relative_to(folder)): file_hash(path) for path in paths})


def ingredients(models: Sequence[str], prompts: Sequence[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Return what decides the images, see `dpo_mm.content_key`."""
    files = {model: [model_content(part) for part in model.split("+") if part] for model in models}
    return {"settings": settings, "models": files, "prompts": list(prompts), "libraries": library_versions()}


def model_name(model: str) -> str:
    """Return the name of a model's subfolder: the name of its adapter, or its own if it has none."""
    return Path(model.partition("+")[2] or model).name


def _generate(model: str, prompts: list[str], seeds: list[int], settings: dict[str, Any]) -> Iterator[Any]:
    if not prompts:
        return
    base, _, adapter = model.partition("+")
    policy = load_image_policy(base, precision=settings["precision"], adapter=adapter or None)
    for images in policy.sample(
        prompts, seeds, steps=settings["steps"], guidance=settings["guidance"], batch_size=BATCH
    ):
        yield from images
