"""Fresh images of several models to label: every model generates from the same prompts and seeds.

    samples/shapes-sd/0001.png    samples/shapes-sd-faithful/0001.png    samples/0001.txt

A prompt's image to edit is `samples/0001.png`, and `samples/0001.2.png` and so on are further ones. `open_pairs` reads such a folder. Images that exist are not generated again, so
an interrupted run resumes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpo_mm.data.image_files import encode_png
from dpo_mm.data.prompts import PromptSpec, read_prompt_set, seeds_of
from dpo_mm.files.checksums import is_intact, write_complete, write_with_checksum
from dpo_mm.files.content_key import file_hash, library_versions
from dpo_mm.files.outputs import OutputKind, output_folder, settings_of
from dpo_mm.policies.diffusion.prompt_sources import check_prompt_sources, images_to_edit
from dpo_mm.policies.families import load_image_policy, model_content
from dpo_mm.printing.progress import progress_bar
from dpo_mm.process.interruption import stop_on_signal

SAMPLES = OutputKind("samples.json", "generated", flag="samples_dir", parts=("*",))
BATCH = 8


def generate_samples(
    models: Sequence[str], prompts: str, folder: str | Path, *, max_prompts: int | None, num_inference_steps: int,
    guidance_scale: float, seed: int = 0, precision: str = "fp32", overwrite: bool = False,
) -> Path:  # fmt: skip
    """Generate one image per prompt and model, in one subfolder per model. Return the folder.

    Args:
        models: two or more models, each as MODEL or MODEL+ADAPTER.
        prompts: a prompt file or a bundled list, as `read_prompt_set` takes it.
        folder: output folder.
        max_prompts: largest number of prompts. None: all.
        overwrite: remove images of other settings first, if they are unchanged.

    Raises:
        ValueError: if there are fewer than two models, two have the same name, a prompt lacks an image that a model edits or has
            one that it does not take, or the folder has other files or was generated with other settings.
    """
    folder, names = Path(folder), model_names(models)
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise ValueError(
            f"models {', '.join(models)}: expected two or more with different names, as MODEL,MODEL+ADAPTER"
        )
    specs = read_prompt_set(prompts, limit=max_prompts).prompts
    settings = {"steps": num_inference_steps, "guidance": guidance_scale, "seed": seed, "precision": precision}
    recorded = settings_of("images to label", ingredients(models, [spec.item for spec in specs], settings))
    inputs = [prompts, *(part for model in models for part in base_and_adapter(model))]
    with output_folder(folder, SAMPLES, recorded, inputs=inputs, overwrite=overwrite) as finished:
        if not finished:
            _generate_missing(models, specs, folder, settings, prompts)
    return folder


def _generate_missing(
    models: Sequence[str], specs: Sequence[PromptSpec], folder: Path, settings: dict[str, Any], name: str
) -> None:
    """Write the prompts, their images to edit and the images that do not exist yet."""
    prompt_files = [folder / f"{number:04}.txt" for number in range(1, len(specs) + 1)]
    source_files = []
    for path, spec in zip(prompt_files, specs, strict=True):
        _write(path, spec.text.encode())
        for number, image in enumerate(spec.sources, start=1):
            source_files.append(path.with_suffix(f".{number}.png" if number > 1 else ".png"))
            _write(source_files[-1], encode_png(image))
    saved = lambda: f"{len(list(folder.glob('*/*.png')))} images are in {folder}" if any(folder.glob("*/*.png")) else ""
    image_files = {
        model: [folder / own / f"{path.stem}.png" for path in prompt_files]
        for model, own in zip(models, model_names(models), strict=True)
    }
    with stop_on_signal(saved), progress_bar("generating images", len(models) * len(specs)) as advance:
        for model, paths in image_files.items():
            missing = [n for n, path in enumerate(paths) if not is_intact(path)]
            advance(len(specs) - len(missing))
            images = _generate(model, [specs[n] for n in missing], settings, name)
            for n, image in zip(missing, images, strict=True):
                paths[n].parent.mkdir(exist_ok=True)
                _write(paths[n], encode_png(image))
                advance(1)
    paths = [*prompt_files, *source_files, *(path for paths in image_files.values() for path in paths)]
    write_complete(folder, {str(path.relative_to(folder)): file_hash(path) for path in paths})


def _write(path: Path, content: bytes) -> None:
    """Write a file, unless it exists and is intact."""
    if not is_intact(path):
        with write_with_checksum(path) as temporary:
            temporary.write_bytes(content)


def ingredients(models: Sequence[str], prompts: Sequence[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Return what decides the images, see `dpo_mm.files.content_key`."""
    files = {model: [model_content(part) for part in base_and_adapter(model) if part] for model in models}
    return {"settings": settings, "models": files, "prompts": list(prompts), "libraries": library_versions()}


def base_and_adapter(model: str) -> tuple[str, str | None]:
    """Split MODEL+ADAPTER at the first plus that ends the path of a model, because a path may contain one."""
    if Path(model).exists():
        return model, None
    cuts = [cut for cut, letter in enumerate(model) if letter == "+"]
    cut = next((cut for cut in cuts if Path(model[:cut]).exists()), cuts[0] if cuts else len(model))
    return model[:cut], model[cut + 1 :] or None


def model_names(models: Sequence[str]) -> list[str]:
    """Return the names of the models' subfolders: those of their adapters, or their own if they have none.

    If two are the same, as in runs/a/adapter and runs/b/adapter, all have the name of the folder above too.
    """
    paths = [Path(adapter or base).absolute() for base, adapter in map(base_and_adapter, models)]
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else ["-".join(path.parts[1:][-2:]) for path in paths]


def _generate(model: str, specs: Sequence[PromptSpec], settings: dict[str, Any], name: str) -> Iterator[Any]:
    """Yield an image of a model for each prompt of the list of this name."""
    if not specs:
        return
    base, adapter = base_and_adapter(model)
    policy = load_image_policy(base, precision=settings["precision"], adapter=adapter)
    prompts, sources = [spec.text for spec in specs], [spec.sources for spec in specs]
    check_prompt_sources(policy, name, prompts, sources)
    for images in policy.sample(
        prompts,
        [seeds_of(spec.text, 1, seed=settings["seed"], sources=spec.sources.file_hashes)[0] for spec in specs],
        steps=settings["steps"],
        guidance=settings["guidance"],
        batch_size=BATCH,
        **images_to_edit(sources),
    ):
        yield from images
