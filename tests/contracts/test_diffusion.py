"""Contracts of every image family. A family takes part by its row in BUILDERS."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from dpo_mm.config import TrainConfig
from dpo_mm.data.clips import clip_image
from dpo_mm.data.image_files import encode_png, to_rgb
from dpo_mm.data.lazy_images import source_column
from dpo_mm.data.schema import load_pairs
from dpo_mm.models.model_loading import DENOISERS
from dpo_mm.objectives import deltas, sigmoid
from dpo_mm.policies.adapters import KOHYA_FILE, LORA_FILE, check_lora_format, pipeline_modules
from dpo_mm.policies.diffusion import random_draws
from dpo_mm.policies.diffusion.buckets import buckets_of
from dpo_mm.policies.diffusion.collate import stack_padded
from dpo_mm.policies.diffusion.denoising_errors import pair_errors
from dpo_mm.policies.diffusion.latents import posterior
from dpo_mm.policies.diffusion.prompt_limits import truncated_prompts
from dpo_mm.policies.diffusion.prompt_sources import source_name
from dpo_mm.policies.families import load_policy
from dpo_mm.training.encoding import encode
from dpo_mm.training.reference import adapter_off, frozen_copy
from tests.conftest import noise_image, rows
from tests.contracts.families import BUILDERS, WORDS, Family
from tests.contracts.trained_weights import restored_weights
from tests.operation_counts import OperationCounts

FAMILIES = sorted(BUILDERS)
WAITS = {"chroma": 1, "hidream": 35, "qwen-image": 1, "qwen-image-2.1": 60, "qwen-image-edit": 1, "z-image": 4}
"""How often the host waits for the GPU in a forward pass: for a constant, lengths of prompts, and sizes of groups of experts."""


def test_builders_have_at_least_three_families() -> None:
    assert len(FAMILIES) >= 3


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(model="-", pairs="-", output_dir="-", **changes)


def encoded_rows(policy: Any, count: int = 4) -> list[dict[str, Any]]:
    chosen = policy.encode_images([picture(policy, n) for n in range(count)])
    rejected = policy.encode_images([picture(policy, 100 + n) for n in range(count)])
    prompts = encoded_prompts(policy, [WORDS[n % len(WORDS)] for n in range(count)])
    source_rows = [source_columns(policy, n) for n in range(count)]
    return [
        {
            **source_rows[n],
            "id": f"row-{n}",
            "visit": 0,
            "chosen_mean": chosen[0][n],
            "chosen_std": chosen[1][n],
            "rejected_mean": rejected[0][n],
            "rejected_std": rejected[1][n],
            "prompt": {name: value[n] for name, value in prompts.items()},
        }
        for n in range(count)
    ]


def picture(policy: Any, number: int) -> Image.Image:
    """An image of the policy's resolution, or a clip."""
    return clip_image([noise_image(number + 1000 * frame, policy.resolution) for frame in range(policy.frames)])


def load_family(name: str, folder: str, **options: Any) -> Any:
    """Load a tiny pipeline with the size and the number of frames of its row."""
    policy: Any = load_policy(folder, resolution=BUILDERS[name].size, **options)
    policy.frames = BUILDERS[name].frames
    return policy


def encoded_prompts(policy: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Prompts, encoded with their images to edit if the text encoder sees them."""
    if not policy.prompts_show_sources:
        return policy.encode_prompts(prompts)
    each = [policy.encode_edit(prompt, sources(policy, n)) for n, prompt in enumerate(prompts)]
    return {name: stack_padded([one[name][0] for one in each]) for name in each[0]}


def source_columns(policy: Any, number: int) -> dict[str, torch.Tensor]:
    """The extra columns of an image-editing model: the encoded images to edit."""
    encoded = [policy.encode_sources([image])[0] for image in sources(policy, number)]
    return {f"{source_name(n)}_mean": mean for n, mean in enumerate(encoded)}


def sources(policy: Any, number: int) -> list[Image.Image]:
    """The images to edit of a prompt, none if the model does not edit."""
    if not policy.is_image_editing:
        return []
    return [source_image(number + 50 * n) for n in range(1 + policy.takes_several_sources)]


def source_image(number: int) -> Image.Image:
    return noise_image(200 + number)


def randomise_adapter(policy: Any) -> None:
    """Add noise to the adapter. A fresh adapter changes nothing, because its second factors are zero."""
    torch.manual_seed(3)
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)


@contextlib.contextmanager
def random_adapter(policy: Any) -> Iterator[None]:
    """Context manager in which the adapter has noise. Afterwards it is what it was before."""
    with restored_weights(policy):
        randomise_adapter(policy)
        yield


def copy_with_denoiser(value: Any, pipe: Any) -> Any:
    """Copy a pipeline, or the policy of it. Its encoders and its autoencoder are shared, because no test changes them."""
    shared = {name: part for name, part in pipeline_modules(pipe).items() if name not in DENOISERS}
    return copy.deepcopy(value, {id(part): part for part in shared.values()})


@pytest.fixture(scope="module")
def load(folders: Callable[[str], str]) -> Callable[[str], Any]:
    """Return a copy of a family's policy, which is read from its files once."""
    read = functools.cache(lambda name: load_family(name, folders(name)))
    return lambda name: copy_with_denoiser(read(name), read(name).pipe)


@pytest.fixture(scope="module")
def prepare(load: Callable[[str], Any]) -> Callable[..., Any]:
    def prepare_policy(name: str, **changes: Any) -> Any:
        policy = load(name)
        policy.prepare(config(**changes))
        return policy

    return prepare_policy


class Shared(NamedTuple):
    """A policy with a fresh adapter and four encoded rows. Tests that change the adapter change it back."""

    policy: Any
    rows: list[dict[str, Any]]


@pytest.fixture(scope="module")
def shared(load: Callable[[str], Any]) -> Callable[[str], Shared]:
    @functools.cache
    def of_family(name: str) -> Shared:
        policy = load(name)
        policy.prepare(config(lora_rank=4, lora_alpha=8, lora_format="kohya" if policy.kohya_prefix else "diffusers"))
        return Shared(policy, encoded_rows(policy))

    return of_family


class SavedAdapter(NamedTuple):
    """An adapter's folder, the policy's images without it, and its images with it."""

    folder: Path
    base: list[np.ndarray]
    tuned: list[np.ndarray]


@pytest.fixture(scope="module")
def saved(shared: Callable[[str], Shared], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SavedAdapter]:
    @functools.cache
    def of_family(name: str) -> SavedAdapter:
        policy, folder = shared(name).policy, tmp_path_factory.mktemp("adapter")
        base = [np.asarray(i) for part in generate_images(policy, 0.0) for i in part]
        with random_adapter(policy):
            policy.save(folder)
            return SavedAdapter(folder, base, [np.asarray(i) for part in generate_images(policy, 1.0) for i in part])

    return of_family


def swap(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with the columns of chosen and rejected exchanged."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    swapped = {}
    for name, value in batch.items():
        side, _, rest = name.partition("_")
        swapped["_".join(filter(None, (other.get(side, side), rest)))] = value
    return swapped


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapter_gives_the_reference_log_probs(
    family: str, shared: Callable[[str], Shared], record_property: Any
) -> None:
    policy, rows = shared(family)
    record_property("of", type(policy.pipe).__name__)
    batch = policy.collate(rows)
    reference, ours = adapter_off(policy)(policy.model, batch), policy.log_probs(policy.model, batch)
    assert torch.equal(ours.chosen, reference.chosen) and torch.equal(ours.rejected, reference.rejected)
    assert sigmoid(ours, reference, beta=5000).tolist() == pytest.approx([math.log(2)] * 4, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_is_unchanged_when_the_adapter_changes(family: str, shared: Callable[[str], Shared]) -> None:
    policy, rows = shared(family)
    batch = policy.collate(rows)
    before = policy.log_probs(policy.model, batch)
    with random_adapter(policy):
        after, reference = policy.log_probs(policy.model, batch), adapter_off(policy)(policy.model, batch)
    assert torch.equal(reference.chosen, before.chosen)
    assert not torch.allclose(after.chosen, before.chosen)


def test_frozen_copy_is_unchanged_by_full_fine_tuning(prepare: Callable[..., Any]) -> None:
    policy = prepare("stable-diffusion", tuning="full")
    reference, batch = frozen_copy(policy), policy.collate(encoded_rows(policy))
    before = reference(policy.model, batch)
    randomise_adapter(policy)
    assert torch.equal(reference(policy.model, batch).chosen, before.chosen)
    assert not torch.allclose(policy.log_probs(policy.model, batch).chosen, before.chosen)


@pytest.mark.parametrize("family", FAMILIES)
def test_swapping_chosen_and_rejected_swaps_their_log_probs(family: str, shared: Callable[[str], Shared]) -> None:
    policy, rows = shared(family)
    batch = policy.collate(rows)
    both_orders = (batch, swap(batch))
    with random_adapter(policy):
        log_probs, swapped_log_probs = (policy.log_probs(policy.model, order) for order in both_orders)
        reference, swapped_reference = (adapter_off(policy)(policy.model, order) for order in both_orders)
    assert torch.equal(log_probs.chosen, swapped_log_probs.rejected) and torch.equal(
        log_probs.rejected, swapped_log_probs.chosen
    )
    delta = deltas(log_probs, reference)
    assert torch.equal(delta, -deltas(swapped_log_probs, swapped_reference))
    assert (delta != 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprint_is_that_of_the_files_and_unchanged_by_encoding(
    family: str, folders: Callable[[str], str], shared: Callable[[str], Shared]
) -> None:
    """It catches a fingerprint with state that a call leaves in a tokenizer: the second run would encode again."""
    policy = load_family(family, folders(family))
    before = policy.fingerprint()
    encoded_prompts(policy, ["a red square"])
    assert policy.fingerprint() == before == shared(family).policy.fingerprint()


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_do_not_depend_on_the_batch(family: str, shared: Callable[[str], Shared]) -> None:
    policy, rows = shared(family)
    batched = policy.log_probs(policy.model, policy.collate(rows))
    reversed_rows = policy.log_probs(policy.model, policy.collate(rows[::-1]))
    single = policy.log_probs(policy.model, policy.collate(rows[2:3]))
    torch.testing.assert_close(batched.chosen, reversed_rows.chosen.flip(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(batched.rejected[2:3], single.rejected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_cached_on_disk_give_the_log_probs_of_rows_in_memory(
    family: str, tmp_path: Path, write_pairs: Callable[..., str], shared: Callable[[str], Shared]
) -> None:
    policy, encoded = shared(family)
    cells = [[{"bytes": encode_png(image), "path": None} for image in sources(policy, n)] for n in range(4)]
    column = lambda n: source_column(cells[n], several=policy.takes_several_sources and policy.is_image_editing)
    sides = [[picture(policy, 2 * n), picture(policy, 2 * n + 1)] for n in range(4)]
    made = [{**row, "image_source": column(n)} for n, row in enumerate(rows(4))]
    for row, images in zip(made, sides, strict=True):
        row |= {
            f"image_{side}": {"bytes": encode_png(image), "path": None}
            for side, image in zip("ab", images, strict=True)
        }
    pairs = load_pairs(write_pairs(made))
    cached = encode(policy, pairs, where="pairs", cache=tmp_path)
    in_memory = [dict(row) for row in encoded]
    for n, row in enumerate(in_memory):
        for side, image in zip(("chosen", "rejected"), sides[n][:: -1 if n % 2 else 1], strict=True):
            (row[f"{side}_mean"],), (row[f"{side}_std"],) = policy.encode_images([image])
    from_cache = policy.log_probs(policy.model, policy.collate([{**cached[n], "visit": 0} for n in range(4)]))
    expected = policy.log_probs(policy.model, policy.collate(in_memory))
    torch.testing.assert_close(from_cache.chosen, expected.chosen, atol=1e-5, rtol=0)
    torch.testing.assert_close(from_cache.rejected, expected.rejected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_run_summary_gives_beta_for_summed_errors(family: str, shared: Callable[[str], Shared]) -> None:
    """The error is a mean over the elements of the latents, so the summary counts these elements."""
    policy, rows = shared(family)
    elements = policy.collate(rows[:1])["chosen"][0].numel()
    summary = policy.describe(policy.config)
    assert f"{elements:,} latent elements" in summary["reduction"]
    assert f"{5000 / elements:.3g} on summed errors" in summary["effective beta"]
    assert summary["target"].startswith({"flow": "velocity"}.get(BUILDERS[family].target, BUILDERS[family].target))


def paper_formula(
    family: Family, level: float, x0: np.ndarray, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Noisy latents, target and timestep at a noise level, in float64, by the papers' formulas."""
    if family.target == "flow":
        assert family.sigma is not None
        sigma = family.sigma(level)
        return (1 - sigma) * x0 + sigma * noise, noise - x0, 1000 * sigma
    first, last, kind = family.betas
    power = 0.5 if kind == "scaled_linear" else 1
    betas = np.linspace(first**power, last**power, 1000) ** (1 / power)
    step = int(level * 1000)
    signal_scale, noise_scale = math.sqrt(np.cumprod(1 - betas)[step]), math.sqrt(1 - np.cumprod(1 - betas)[step])
    target = signal_scale * noise - noise_scale * x0 if family.target == "v" else noise
    return signal_scale * x0 + noise_scale * noise, target, step


@pytest.mark.parametrize("visit", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_prob_equals_the_papers_formula(family: str, visit: int, shared: Callable[[str], Shared]) -> None:
    """The log-prob is -1/2 mean (prediction - target)^2 in float64, at the noise level that the row samples."""
    policy, rows = shared(family)
    batch = policy.collate([{**rows[0], "visit": visit}])
    level, shape = random_draws.sample_noise_level(0, "row-0", visit), tuple(batch["chosen"].shape[1:])
    x0, noise = (
        batch["chosen"].double().numpy(),
        random_draws.sample_noise(0, "row-0", visit, shape).astype(float)[None],
    )
    noisy, target, timestep = paper_formula(BUILDERS[family], level, x0, noise)
    assert batch["timestep"].item() == pytest.approx(timestep, rel=1e-5)
    prompt = conditioning_of(policy, batch, "chosen")
    with torch.no_grad():
        prediction = policy.denoise(policy.model, torch.from_numpy(noisy).float(), batch["timestep"], prompt)
    expected = -0.5 * ((prediction.double().numpy() - target) ** 2).mean()
    assert policy.log_probs(policy.model, batch).chosen.item() == pytest.approx(expected, rel=1e-5)


def conditioning_of(policy: Any, batch: dict[str, Any], side: str) -> dict[str, torch.Tensor]:
    """The denoiser's conditioning for the chosen or the rejected images."""
    columns = {name: batch[f"{side}_{name}"] for name in policy.conditioning_columns if f"{side}_{name}" in batch}
    return {**batch["prompt"], **columns}


class StepResult(NamedTuple):
    """What a scheduler returns, read by position or by name."""

    prev_sample: torch.Tensor


def first_step(policy: Any, family: Family, arguments: dict[str, Any], result: torch.Tensor | None = None) -> Any:
    """Run the upstream pipeline and record what it passes to its scheduler at the first step.

    Args:
        arguments: keyword arguments of the pipeline.
        result: latents that the scheduler returns in place of its own.

    Returns:
        (prediction, timestep, latents, image).
    """
    calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    scheduler = policy.pipe.scheduler
    step = scheduler.step

    def record_step(prediction: torch.Tensor, timestep: Any, latents: torch.Tensor, **more: Any) -> Any:
        scaled = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        calls.append((prediction.clone(), timestep, scaled.clone()))
        return StepResult(result) if result is not None else step(prediction, timestep, latents, **more)

    scheduler.step = record_step
    for name, value in family.attributes.items():
        setattr(policy.pipe, name, value)
    try:
        size = {"height": family.size, "width": family.size}
        if policy.is_image_editing:
            arguments["image"] = [image for n in range(len(arguments["prompt"])) for image in sources(policy, n)]
        generator = torch.Generator().manual_seed(0)
        if policy.frames > 1:
            size["num_frames"] = policy.frames
        output = policy.pipe(**size, **family.unguided, generator=generator, output_type="pt", **arguments)
        images = output.images if policy.frames == 1 else output.frames
    finally:
        del scheduler.step
    return *calls[0], images


@pytest.mark.parametrize("family", FAMILIES)
def test_denoise_equals_the_upstream_pipelines_first_step(family: str, shared: Callable[[str], Shared]) -> None:
    """On the latents of the upstream scheduler's first step, `denoise` predicts what that scheduler gets."""
    policy, row = shared(family).policy, BUILDERS[family]
    prompts = WORDS[: 1 if policy.one_prompt_per_call else 2]
    expected, timestep, latents, _ = first_step(policy, row, {"prompt": list(prompts), "num_inference_steps": 3})
    latents, expected = (row.unpack(policy.pipe, value, row.size) for value in (latents, expected))
    conditioning, count = encoded_prompts(policy, prompts), len(prompts)
    columns = [source_columns(policy, n) for n in range(count)]
    for name in columns[0]:
        means = torch.stack([each[name] for each in columns])
        conditioning[name.removesuffix("_mean")] = policy.latent_scale.normalise(means)
    with torch.no_grad():
        ours = policy.denoise(policy.model, latents, torch.as_tensor(timestep).repeat(count), conditioning)
    assert ours.shape == latents.shape == expected.shape and expected.std() > 1e-3
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_decode_to_the_image_in_the_upstream_pipeline(family: str, shared: Callable[[str], Shared]) -> None:
    """The upstream pipeline decodes a batch's latents to the image that the autoencoder decodes from its own latents."""
    (policy, rows), row = shared(family), BUILDERS[family]
    mean, std = policy.encode_images([picture(policy, 0)])
    latents = policy.collate([{**rows[0], "chosen_mean": mean[0], "chosen_std": torch.zeros_like(std[0])}])["chosen"]
    packed = row.pack(policy.pipe, latents, row.size)
    arguments = {"prompt": WORDS[:1], "num_inference_steps": 1}
    *_, images = first_step(policy, row, arguments, result=packed)
    pixels = policy.pixels(picture(policy, 0))[None]
    with torch.no_grad():
        native, _ = posterior(policy.pipe.vae, pixels[:, :, None] if policy.vae_is_video else pixels)
        decoded = policy.pipe.vae.decode(native).sample
    expected = ((decoded[:, :, 0] if policy.vae_is_video else decoded) / 2 + 0.5).clamp(0, 1)
    expected = expected if policy.frames == 1 else expected.transpose(1, 2)
    assert expected.std() > 1e-3
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(policy.latent_scale.denormalise(latents), mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_adapter_generates_the_same_pixels_in_the_upstream_library(
    family: str,
    folders: Callable[[str], str],
    shared: Callable[[str], Shared],
    saved: Callable[[str], SavedAdapter],
    record_property: Any,
) -> None:
    policy, row = shared(family).policy, BUILDERS[family]
    folder, base, ours = saved(family)
    pipe = upstream_pipeline(folders(family), row)
    lines = policy.usage_snippet("-", str(folder))[1:]
    assert (
        (lines == [f'pipe.load_lora_weights("{folder}")']) == (row.reason is None) == hasattr(pipe, "load_lora_weights")
    )
    if row.reason:
        record_property("reason", row.reason)
    exec("\n".join(lines), {"pipe": pipe, "PeftModel": PeftModel})
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(ours, upstream_images(policy, pipe), strict=True))
    assert not np.array_equal(np.stack(ours), np.stack(base))


@pytest.mark.parametrize("family", FAMILIES)
def test_kohya_file_contains_the_same_adapter(
    family: str,
    folders: Callable[[str], str],
    shared: Callable[[str], Shared],
    saved: Callable[[str], SavedAdapter],
) -> None:
    """Its tensor names are those of diffusers' converter, with the original model's blocks for SDXL. If diffusers reads it, it generates the same pixels."""
    policy, row = shared(family).policy, BUILDERS[family]
    if policy.kohya_prefix is None:
        with pytest.raises(ValueError, match=r"lora_format 'kohya': .* has no names in kohya's format"):
            check_lora_format(config(lora_format="kohya"), None, family=type(policy).__name__)
        return
    folder, _, expected = saved(family)
    tensors = load_file(folder / KOHYA_FILE)
    plain = {f"unet.{k.split('.', 1)[1]}": v for k, v in load_file(folder / LORA_FILE).items()}
    theirs = convert_state_dict_to_kohya(plain)
    for old, new in row.kohya_blocks.items():
        theirs = {name.replace(old, new): value for name, value in theirs.items()}
    ours = {name.replace(policy.kohya_prefix, "lora_unet", 1): value for name, value in tensors.items()}
    assert set(ours) == set(theirs) and len(ours) >= 12
    for name, value in ours.items():
        assert value.item() == 8 if name.endswith(".alpha") else torch.equal(value, theirs[name])
    if row.kohya:
        pipe = upstream_pipeline(folders(family), row)
        pipe.load_lora_weights(str(folder), weight_name=KOHYA_FILE)
        assert all(
            np.array_equal(a, np.asarray(b)) for a, b in zip(expected, upstream_images(policy, pipe), strict=True)
        )


def upstream_pipeline(folder: str, row: Family) -> Any:
    """Load a tiny pipeline with diffusers."""
    pipe = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(row.left_out))
    pipe.set_progress_bar_config(disable=True)
    for name, value in row.attributes.items():
        setattr(pipe, name, value)
    return pipe


def upstream_images(policy: Any, pipe: Any, *, count: int = 2, steps: int = 3) -> list[Image.Image]:
    """Generate with the upstream pipeline what `generate_images` generates with the policy."""
    edited = [sources(policy, n) for n in range(count)] if policy.is_image_editing else []
    generators = [torch.Generator().manual_seed(5 + n) for n in range(count)]
    calls = [slice(n, n + 1) for n in range(count)] if policy.one_prompt_per_call else [slice(0, count)]
    outputs = [
        pipe(
            **policy.sampling_kwargs(WORDS[part], 2.0, edited[part]),
            num_inference_steps=steps,
            generator=generators[part],
        )
        for part in calls
    ]
    if policy.frames > 1:
        return [clip_image(frames) for output in outputs for frames in output.frames]
    return [to_rgb(image) for output in outputs for image in output.images]


def generate_images(policy: Any, scale: float, *, count: int = 2, steps: int = 3) -> list[list[Image.Image]]:
    drawing = {"steps": steps, "guidance": 2.0, "batch_size": 2, "scale": scale}
    edited = [sources(policy, n) for n in range(count)] if policy.is_image_editing else None
    return list(policy.sample(WORDS[:count], range(5, 5 + count), sources=edited, **drawing))


def test_scale_zero_generates_the_base_models_images(
    tmp_path: Path, prepare: Callable[..., Any], load: Callable[[str], Any]
) -> None:
    policy = prepare("stable-diffusion")
    randomise_adapter(policy)
    policy.save(tmp_path)
    fresh = load("stable-diffusion")
    base = np.stack([np.asarray(i) for part in generate_images(fresh, 1.0) for i in part])
    fresh.load_adapter(tmp_path)
    off = np.stack([np.asarray(i) for part in generate_images(fresh, 0.0) for i in part])
    half, full = (np.stack([np.asarray(i) for part in generate_images(fresh, s) for i in part]) for s in (0.5, 1.0))
    assert np.array_equal(off, base)
    assert not np.array_equal(half, base) and not np.array_equal(half, full)


def test_fully_tuned_denoiser_is_saved_and_loaded(
    tmp_path: Path, prepare: Callable[..., Any], load: Callable[[str], Any]
) -> None:
    policy = prepare("stable-diffusion", tuning="full")
    base = np.stack([np.asarray(i) for part in generate_images(policy, 1.0) for i in part])
    randomise_adapter(policy)
    policy.save(tmp_path)
    tuned = np.stack([np.asarray(i) for part in generate_images(policy, 1.0) for i in part])
    pipe = load("stable-diffusion").pipe
    exec(policy.usage_snippet("-", str(tmp_path))[1], {"pipe": pipe})
    assert torch.equal(pipe.unet.conv_in.weight, policy.model.conv_in.weight)
    fresh = load("stable-diffusion")
    fresh.load_adapter(tmp_path)
    assert np.array_equal(np.stack([np.asarray(i) for part in generate_images(fresh, 1.0) for i in part]), tuned)
    assert np.array_equal(np.stack([np.asarray(i) for part in generate_images(fresh, 0.0) for i in part]), base)
    with pytest.raises(ValueError, match="supports only the scales 0 and 1"):
        generate_images(fresh, 0.5)


def rows_at_size(policy: Any, target_size: tuple[int, int]) -> list[dict[str, Any]]:
    prompt = {name: value[0] for name, value in encoded_prompts(policy, WORDS[:1]).items()}
    row: dict[str, Any] = {"id": "row", "visit": 0, "prompt": prompt}
    with policy.at_size(target_size):
        row |= source_columns(policy, 0)
        for number, side in enumerate(("chosen", "rejected")):
            image = clip_image([noise_image(number, 96).resize((90, 61))] * policy.frames)
            mean, std = policy.encode_images([image])
            row |= {f"{side}_mean": mean[0], f"{side}_std": std[0]}
            row |= {f"{side}_{name}": value[0] for name, value in policy.size_conditioning([image]).items()}
    return [row]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_at_a_wide_size(family: str, shared: Callable[[str], Shared]) -> None:
    """Chosen and rejected are cropped to it, the denoiser is conditioned on it, and the error covers all of it."""
    policy = shared(family).policy
    unit = policy.patch * policy.pipe.vae_scale_factor
    target_size = next(bucket for bucket in buckets_of(BUILDERS[family].size, unit) if bucket[0] > bucket[1])
    batch = policy.collate(rows_at_size(policy, target_size))
    height, width = batch["chosen"].shape[-2:]
    assert width / height == pytest.approx(target_size[0] / target_size[1])
    assert batch["rejected"].shape == batch["noise"].shape == batch["chosen"].shape
    reference, log_probs = adapter_off(policy)(policy.model, batch), policy.log_probs(policy.model, batch)
    assert torch.equal(reference.chosen, log_probs.chosen) and torch.isfinite(log_probs.chosen).all()
    assert pair_errors(policy, policy.model, batch).residual.numel() == 2 * batch["chosen"].numel()


@pytest.mark.parametrize(
    "family", sorted(set(BUILDERS) - {"qwen-image-2.1", "qwen-image-edit"})
)  # they truncate nothing
def test_a_prompt_whose_end_changes_no_encoding_is_reported_as_truncated(
    family: str, shared: Callable[[str], Shared]
) -> None:
    policy = shared(family).policy
    long = f"{WORDS[1]} " * 200
    ends = [policy.encode_prompts([long + end]) for end in WORDS[::2]]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert truncated_prompts(policy, [WORDS[0], long, long]).startswith("1 of 2 have more than ")
    assert truncated_prompts(policy, WORDS[:1]) == ""


def test_the_longest_prompt_that_clip_reads_is_not_reported(shared: Callable[[str], Shared]) -> None:
    """CLIP's two end tokens count: the tiny models have 16 positions, so 14 tokens of text fit and 15 do not."""
    policy = shared("stable-diffusion").policy
    assert truncated_prompts(policy, ["a " * 14]) == ""
    assert (
        truncated_prompts(policy, ["a " * 15])
        == "1 of 1 have more than 16 tokens (up to 17), of which CLIPTokenizer passes on the first 16"
    )


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_ten_steps_on_one_pair_raise_its_delta(
    family: str, checkpointing: bool, prepare: Callable[..., Any], shared: Callable[[str], Shared]
) -> None:
    """Three of the ten steps if activations are computed again."""
    policy, rows = shared(family)
    policy = prepare(family, gradient_checkpointing=True) if checkpointing else policy
    batch = policy.collate(rows[:1])
    optimizer = torch.optim.Adam([p for p in policy.model.parameters() if p.requires_grad], lr=1e-3)
    history = []
    with restored_weights(policy):
        policy.model.train()
        before = adapter_off(policy)(policy.model, batch)
        for _ in range(3 if checkpointing else 10):
            now = policy.log_probs(policy.model, batch)
            loss = sigmoid(now, before, beta=5000).mean()
            history.append(deltas(now, before).item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        policy.model.eval()
    assert history[0] == 0 and history[-1] > 0
    assert history[-1] > history[1]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_gives_gradients_and_close_log_probs(
    family: str, folders: Callable[[str], str], shared: Callable[[str], Shared]
) -> None:
    """As in the trainer: the pipeline in bf16 without autocast, the adapter and the loss in float32."""
    half = load_family(family, folders(family), precision="bf16")
    half.prepare(config(precision="bf16"))
    full, rows = shared(family)
    chosen_log_probs = []
    for policy, encoded in ((full, rows[:2]), (half, encoded_rows(half, 2))):
        policy.model.zero_grad()
        batch = policy.collate(encoded)
        with OperationCounts() as counts:
            log_probs = policy.log_probs(policy.model, batch)
        assert counts.num_synchronisations == WAITS.get(family, 0), counts.report()
        if policy.cuts_prompts:
            assert batch["prompt"]["embeds"].shape[1] == batch["prompt"]["mask"].sum(1).max()
        (log_probs.chosen - log_probs.rejected).sum().backward()
        gradients = [p.grad for p in policy.model.parameters() if p.requires_grad]
        assert {g.dtype for g in gradients if g is not None} == {torch.float32}
        assert log_probs.chosen.dtype == torch.float32 and all(g.isfinite().all() for g in gradients if g is not None)
        assert any(g is not None and g.abs().max() > 0 for g in gradients)
        chosen_log_probs.append(log_probs.chosen.detach())
    torch.testing.assert_close(chosen_log_probs[1], chosen_log_probs[0], atol=0, rtol=0.03)


def test_images_in_a_batch_do_not_affect_each_other(load: Callable[[str], Any]) -> None:
    policy = load("stable-diffusion")
    both = next(policy.sample(WORDS[:2], [5, 6], steps=3, guidance=2.0, batch_size=2))
    single = next(policy.sample(WORDS[1:2], [6], steps=3, guidance=2.0, batch_size=1))
    assert np.abs(np.asarray(both[1], dtype=int) - np.asarray(single[0], dtype=int)).max() <= 1


def test_missing_component_is_named_in_the_error(tmp_path: Path) -> None:
    import shutil

    folder = BUILDERS["stable-diffusion"].build(tmp_path / "m")
    shutil.rmtree(folder / "vae")
    with pytest.raises(ValueError, match=r"has no vae. Expected the folder vae/"):
        load_policy(str(folder))


def test_unknown_family_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "MysteryPipeline"}')
    with pytest.raises(ValueError, match=r"MysteryPipeline.*Known: StableDiffusionPipeline"):
        load_policy(str(tmp_path))
    with pytest.raises(ValueError, match="does not exist"):
        load_policy(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"neither model_index\.json"):
        load_policy(str(tmp_path / "empty"))
