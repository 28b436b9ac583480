"""What every image family must hold; a family comes in by its row in BUILDERS."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from dpo_mm.config import TrainConfig
from dpo_mm.data.image_files import encode_png
from dpo_mm.data.schema import load_pairs
from dpo_mm.objectives import deltas, sigmoid
from dpo_mm.policies.adapters import KOHYA_FILE, LORA_FILE, check_format
from dpo_mm.policies.diffusion import random_draws
from dpo_mm.policies.diffusion.latents import posterior
from dpo_mm.policies.families import load_policy
from dpo_mm.training.encoding import encode
from dpo_mm.training.reference import adapter_off, frozen_copy
from tests.conftest import picture, rows
from tests.contracts.families import BUILDERS, WORDS, Family

FAMILIES = sorted(BUILDERS)


def test_every_builder_is_a_family() -> None:
    assert len(FAMILIES) >= 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    made: dict[str, str] = {}

    def folder(name: str) -> str:
        if name not in made:
            made[name] = str(BUILDERS[name].build(tmp_path_factory.mktemp(name)))
        return made[name]

    return folder


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(model="-", pairs="-", output_dir="-", **changes)


def encoded(policy: Any, count: int = 4) -> list[dict[str, Any]]:
    chosen = policy.encode_images([picture(n, policy.resolution) for n in range(count)])
    rejected = policy.encode_images([picture(100 + n, policy.resolution) for n in range(count)])
    prompts = policy.encode_prompts([WORDS[n % len(WORDS)] for n in range(count)])
    more = [source_of(policy, n) for n in range(count)]
    return [
        {
            **more[n],
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


def source_of(policy: Any, number: int) -> dict[str, torch.Tensor]:
    """What an editing model's row has beside: the picture to edit."""
    return {"source_mean": policy.encode_images([source(number)])[0][0]} if policy.is_image_editing else {}


def source(number: int) -> Image.Image:
    return picture(200 + number)


def disturbed(policy: Any) -> None:
    """A trained-looking adapter: its second factors are zero at first, so that it changes nothing."""
    torch.manual_seed(3)
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)


@pytest.fixture(scope="module")
def load(folders: Callable[[str], str]) -> Callable[[str], Any]:
    return lambda name: load_policy(folders(name), resolution=BUILDERS[name].size)


@pytest.fixture(scope="module")
def ready(load: Callable[[str], Any]) -> Callable[..., Any]:
    def prepared(name: str, **changes: Any) -> Any:
        policy = load(name)
        policy.prepare(config(**changes))
        return policy

    return prepared


def swap(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with all that belongs to one side on the other."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    turned = {}
    for name, value in batch.items():
        side, _, rest = name.partition("_")
        turned["_".join(filter(None, (other.get(side, side), rest)))] = value
    return turned


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_is_the_reference(family: str, ready: Callable[..., Any], record_property: Any) -> None:
    policy = ready(family)
    record_property("of", type(policy.pipe).__name__)
    batch = policy.collate(encoded(policy))
    reference, ours = adapter_off(policy)(policy.model, batch), policy.log_probs(policy.model, batch)
    assert torch.equal(ours.chosen, reference.chosen) and torch.equal(ours.rejected, reference.rejected)
    assert sigmoid(ours, reference, beta=5000).tolist() == pytest.approx([math.log(2)] * 4, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_stays_when_the_adapter_moves(family: str, ready: Callable[..., Any]) -> None:
    policy = ready(family)
    batch = policy.collate(encoded(policy))
    before = policy.log_probs(policy.model, batch)
    disturbed(policy)
    after, reference = policy.log_probs(policy.model, batch), adapter_off(policy)(policy.model, batch)
    assert torch.equal(reference.chosen, before.chosen)
    assert not torch.allclose(after.chosen, before.chosen)


def test_a_frozen_copy_stays_in_full_fine_tuning(ready: Callable[..., Any]) -> None:
    policy = ready("stable-diffusion", tuning="full")
    reference, batch = frozen_copy(policy), policy.collate(encoded(policy))
    before = reference(policy.model, batch)
    disturbed(policy)
    assert torch.equal(reference(policy.model, batch).chosen, before.chosen)
    assert not torch.allclose(policy.log_probs(policy.model, batch).chosen, before.chosen)


@pytest.mark.parametrize("family", FAMILIES)
def test_swapping_the_sides_swaps_the_answer(family: str, ready: Callable[..., Any]) -> None:
    policy = ready(family)
    disturbed(policy)
    batch = policy.collate(encoded(policy))
    swapped = swap(batch)
    reference = adapter_off(policy)
    one, other = policy.log_probs(policy.model, batch), policy.log_probs(policy.model, swapped)
    assert torch.equal(one.chosen, other.rejected) and torch.equal(one.rejected, other.chosen)
    delta = deltas(one, reference(policy.model, batch))
    assert torch.equal(delta, -deltas(other, reference(policy.model, swapped)))
    assert (delta != 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_does_not_depend_on_its_batch(family: str, ready: Callable[..., Any]) -> None:
    policy = ready(family)
    rows = encoded(policy)
    whole = policy.log_probs(policy.model, policy.collate(rows))
    turned = policy.log_probs(policy.model, policy.collate(rows[::-1]))
    alone = policy.log_probs(policy.model, policy.collate(rows[2:3]))
    torch.testing.assert_close(whole.chosen, turned.chosen.flip(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.rejected[2:3], alone.rejected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_kept_on_disk_answer_as_rows_in_memory(
    family: str, tmp_path: Path, write_pairs: Callable[..., str], ready: Callable[..., Any]
) -> None:
    policy = ready(family)
    edited = [{"bytes": encode_png(source(n)), "path": None} if policy.is_image_editing else None for n in range(4)]
    pairs = load_pairs(write_pairs([{**row, "image_source": edited[n]} for n, row in enumerate(rows(4))]))
    kept = encode(policy, pairs, where="pairs", cache=tmp_path)
    plain = encoded(policy)
    for n, row in enumerate(plain):
        sides = [picture(2 * n), picture(2 * n + 1)][:: -1 if n % 2 else 1]
        for side, image in zip(("chosen", "rejected"), sides, strict=True):
            (row[f"{side}_mean"],), (row[f"{side}_std"],) = policy.encode_images([image])
    found = policy.log_probs(policy.model, policy.collate([{**kept[n], "visit": 0} for n in range(4)]))
    truth = policy.log_probs(policy.model, policy.collate(plain))
    torch.testing.assert_close(found.chosen, truth.chosen, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.rejected, truth.rejected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_says_what_beta_is_on_summed_errors(family: str, ready: Callable[..., Any]) -> None:
    """Elements are those of the latents that errors are the mean of."""
    policy = ready(family)
    elements = policy.collate(encoded(policy, 1))["chosen"][0].numel()
    said = policy.describe(policy.config)
    assert f"{elements:,} latent elements" in said["reduction"]
    assert f"{5000 / elements:.3g} on summed errors" in said["effective beta"]
    assert said["target"].startswith({"flow": "velocity"}.get(BUILDERS[family].target, BUILDERS[family].target))


def by_hand(family: Family, level: float, x0: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Noisy latents, target and timestep at a level, in float64, straight from the papers."""
    if family.target == "flow":
        assert family.sigma is not None
        s = family.sigma(level)
        return (1 - s) * x0 + s * noise, noise - x0, 1000 * s
    first, last, kind = family.betas
    power = 0.5 if kind == "scaled_linear" else 1
    betas = np.linspace(first**power, last**power, 1000) ** (1 / power)
    step = int(level * 1000)
    signal, share = math.sqrt(np.cumprod(1 - betas)[step]), math.sqrt(1 - np.cumprod(1 - betas)[step])
    target = signal * noise - share * x0 if family.target == "v" else noise
    return signal * x0 + share * noise, target, step


@pytest.mark.parametrize("visit", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_log_prob_is_the_papers_arithmetic(family: str, visit: int, ready: Callable[..., Any]) -> None:
    """-1/2 mean (prediction - target)^2 in float64, from the level that the row's draw is."""
    policy = ready(family)
    batch = policy.collate([{**encoded(policy, 1)[0], "visit": visit}])
    level, shape = random_draws.sample_noise_level(0, "row-0", visit), tuple(batch["chosen"].shape[1:])
    x0, noise = (
        batch["chosen"].double().numpy(),
        random_draws.sample_noise(0, "row-0", visit, shape).astype(float)[None],
    )
    noisy, target, timestep = by_hand(BUILDERS[family], level, x0, noise)
    assert batch["timestep"].item() == pytest.approx(timestep, rel=1e-5)
    prompt = told(policy, batch, "chosen")
    with torch.no_grad():
        got = policy.denoise(policy.model, torch.from_numpy(noisy).float(), batch["timestep"], prompt)
    expected = -0.5 * ((got.double().numpy() - target) ** 2).mean()
    assert policy.log_probs(policy.model, batch).chosen.item() == pytest.approx(expected, rel=1e-5)


def told(policy: Any, batch: dict[str, Any], side: str) -> dict[str, torch.Tensor]:
    """What the denoiser is told of one side's pictures."""
    own = {name: batch[f"{side}_{name}"] for name in policy.conditioning_columns if f"{side}_{name}" in batch}
    return {**batch["prompt"], **own}


def stepped(policy: Any, family: Family, arguments: dict[str, Any], answer: torch.Tensor | None = None) -> Any:
    """What the stock pipeline gives its scheduler at its first step: (prediction, timestep, latents), and its picture.

    answer: what the scheduler answers instead of its own.
    """
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    scheduler = policy.pipe.scheduler
    step = scheduler.step

    def noted(prediction: torch.Tensor, timestep: Any, latents: torch.Tensor, **more: Any) -> Any:
        scaled = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        seen.append((prediction.clone(), timestep, scaled.clone()))
        return (answer,) if answer is not None else step(prediction, timestep, latents, **more)

    scheduler.step = noted
    try:
        size = {"height": family.size, "width": family.size}
        if policy.is_image_editing:
            arguments["image"] = [source(n) for n in range(len(arguments["prompt"]))]
        generator = torch.Generator().manual_seed(0)
        shown = policy.pipe(**size, **family.unguided, generator=generator, output_type="pt", **arguments).images
    finally:
        del scheduler.step
    return *seen[0], shown


@pytest.mark.parametrize("family", FAMILIES)
def test_denoise_is_the_stock_pipelines_first_step(family: str, load: Callable[[str], Any]) -> None:
    """On the latents that the stock scheduler steps on, `denoise` says what that scheduler is given to step with."""
    policy, row = load(family), BUILDERS[family]
    prompts = WORDS[:2]
    given, timestep, latents, _ = stepped(policy, row, {"prompt": list(prompts), "num_inference_steps": 3})
    latents, given = (row.unpack(policy.pipe, value, row.size) for value in (latents, given))
    told = policy.encode_prompts(prompts)
    if policy.is_image_editing:
        told["source"] = policy.latent_scale.normalised(policy.encode_images([source(0), source(1)])[0])
    with torch.no_grad():
        ours = policy.denoise(policy.model, latents, torch.as_tensor(timestep).repeat(2), told)
    assert ours.shape == latents.shape == given.shape and given.std() > 1e-3
    torch.testing.assert_close(ours, given, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_our_latents_decode_as_the_stock_pipeline_decodes(family: str, ready: Callable[..., Any]) -> None:
    """Latents as a batch holds them, decoded by the stock pipeline, give the picture of the autoencoder's own latents."""
    policy, row = ready(family), BUILDERS[family]
    mean, std = policy.encode_images([picture(0, row.size)])
    rows = [{**encoded(policy, 1)[0], "chosen_mean": mean[0], "chosen_std": torch.zeros_like(std[0])}]
    latents = policy.collate(rows)["chosen"]
    packed = row.pack(policy.pipe, latents, row.size)
    arguments = {"prompt": WORDS[:1], "num_inference_steps": 1}
    *_, shown = stepped(policy, row, arguments, answer=packed)
    pixels = policy.pixels(picture(0, row.size))[None]
    with torch.no_grad():
        own, _ = posterior(policy.pipe.vae, pixels[:, :, None] if policy.vae_is_video else pixels)
        plain = policy.pipe.vae.decode(own).sample
    expected = ((plain[:, :, 0] if policy.vae_is_video else plain) / 2 + 0.5).clamp(0, 1)
    assert expected.std() > 1e-3
    torch.testing.assert_close(shown, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(policy.latent_scale.unnormalised(latents), mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_draws_the_same_pixels_in_the_stock_library(
    family: str, tmp_path: Path, folders: Callable[[str], str], ready: Callable[..., Any], record_property: Any
) -> None:
    policy, row = ready(family, lora_rank=4, lora_alpha=8), BUILDERS[family]
    base = [np.asarray(i) for part in draw(policy, 0.0) for i in part]
    disturbed(policy)
    policy.save(tmp_path)
    inside = [np.asarray(i) for part in draw(policy, 1.0) for i in part]
    pipe = DiffusionPipeline.from_pretrained(folders(family), **dict.fromkeys(BUILDERS[family].left_out))
    pipe.set_progress_bar_config(disable=True)
    lines = policy.usage_snippet("-", str(tmp_path))[1:]
    assert (
        (lines == [f'pipe.load_lora_weights("{tmp_path}")'])
        == (row.reason is None)
        == hasattr(pipe, "load_lora_weights")
    )
    if row.reason:
        record_property("reason", row.reason)
    exec("\n".join(lines), {"pipe": pipe, "PeftModel": PeftModel})
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(inside, stock(policy, pipe), strict=True))
    assert not np.array_equal(np.stack(inside), np.stack(base))


@pytest.mark.parametrize("family", FAMILIES)
def test_kohyas_file_holds_the_same_adapter(
    family: str, tmp_path: Path, folders: Callable[[str], str], ready: Callable[..., Any]
) -> None:
    """Its names are those of diffusers' own converter, and where diffusers reads it, it draws the same pixels."""
    policy, row = ready(family, lora_rank=4, lora_alpha=8, lora_format="kohya"), BUILDERS[family]
    if policy.kohya_prefix is None:
        with pytest.raises(ValueError, match=r"lora_format 'kohya': .* has no names in kohya's format"):
            check_format(policy.config, None, family=type(policy).__name__)
        return
    disturbed(policy)
    policy.save(tmp_path)
    kept = load_file(tmp_path / KOHYA_FILE)
    plain = {f"unet.{k.split('.', 1)[1]}": v for k, v in load_file(tmp_path / LORA_FILE).items()}
    theirs = convert_state_dict_to_kohya(plain)
    ours = {name.replace(policy.kohya_prefix, "lora_unet", 1): value for name, value in kept.items()}
    assert set(ours) == set(theirs) and len(ours) >= 12
    for name, value in ours.items():
        assert value.item() == 8 if name.endswith(".alpha") else torch.equal(value, theirs[name])
    if row.kohya:
        pipe = DiffusionPipeline.from_pretrained(folders(family), **dict.fromkeys(row.left_out))
        pipe.set_progress_bar_config(disable=True)
        pipe.load_lora_weights(str(tmp_path), weight_name=KOHYA_FILE)
        inside = [np.asarray(i) for part in draw(policy, 1.0) for i in part]
        assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(inside, stock(policy, pipe), strict=True))


def stock(policy: Any, pipe: Any) -> list[Image.Image]:
    """What a stock pipeline draws where `draw` draws with the policy."""
    pictures = [source(0), source(1)] if policy.is_image_editing else []
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    return pipe(**policy.sampling_kwargs(WORDS[:2], 2.0, pictures), num_inference_steps=3, generator=generators).images


def draw(policy: Any, scale: float) -> list[list[Image.Image]]:
    pictures = [source(0), source(1)] if policy.is_image_editing else None
    return list(policy.sample(WORDS[:2], [5, 6], steps=3, guidance=2.0, batch_size=2, scale=scale, sources=pictures))


def test_scale_zero_draws_with_the_base(tmp_path: Path, ready: Callable[..., Any], load: Callable[[str], Any]) -> None:
    policy = ready("stable-diffusion")
    disturbed(policy)
    policy.save(tmp_path)
    fresh = load("stable-diffusion")
    base = np.stack([np.asarray(i) for part in draw(fresh, 1.0) for i in part])
    fresh.load_adapter(tmp_path)
    off = np.stack([np.asarray(i) for part in draw(fresh, 0.0) for i in part])
    half, full = (np.stack([np.asarray(i) for part in draw(fresh, s) for i in part]) for s in (0.5, 1.0))
    assert np.array_equal(off, base)
    assert not np.array_equal(half, base) and not np.array_equal(half, full)


def test_a_fully_tuned_denoiser_is_saved_and_attached(
    tmp_path: Path, ready: Callable[..., Any], load: Callable[[str], Any]
) -> None:
    policy = ready("stable-diffusion", tuning="full")
    base = np.stack([np.asarray(i) for part in draw(policy, 1.0) for i in part])
    disturbed(policy)
    policy.save(tmp_path)
    tuned = np.stack([np.asarray(i) for part in draw(policy, 1.0) for i in part])
    pipe = load("stable-diffusion").pipe
    exec(policy.usage_snippet("-", str(tmp_path))[1], {"pipe": pipe})
    assert torch.equal(pipe.unet.conv_in.weight, policy.model.conv_in.weight)
    fresh = load("stable-diffusion")
    fresh.load_adapter(tmp_path)
    assert np.array_equal(np.stack([np.asarray(i) for part in draw(fresh, 1.0) for i in part]), tuned)
    assert np.array_equal(np.stack([np.asarray(i) for part in draw(fresh, 0.0) for i in part]), base)
    with pytest.raises(ValueError, match="supports only the scales 0 and 1"):
        draw(fresh, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_ten_steps_on_one_pair_raise_its_margin(family: str, checkpointing: bool, ready: Callable[..., Any]) -> None:
    policy = ready(family, gradient_checkpointing=checkpointing)
    policy.model.train()
    batch, reference = policy.collate(encoded(policy, 1)), adapter_off(policy)
    optimizer = torch.optim.Adam([p for p in policy.model.parameters() if p.requires_grad], lr=1e-3)
    history = []
    for _ in range(10):
        before = reference(policy.model, batch)
        now = policy.log_probs(policy.model, batch)
        loss = sigmoid(now, before, beta=5000).mean()
        history.append(deltas(now, before).item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert history[0] == 0 and history[-1] > 0
    assert history[-1] > history[1]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_trains_and_says_nearly_the_same(family: str, folders: Callable[[str], str]) -> None:
    """As the trainer asks it: the pipeline in bf16, the adapter in float32, the loss in float32 under autocast."""
    said = []
    for precision in ("fp32", "bf16"):
        policy = load_policy(folders(family), resolution=BUILDERS[family].size, precision=precision)
        policy.prepare(config(precision=precision))
        batch = policy.collate(encoded(policy, 2))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            found = policy.log_probs(policy.model, batch)
        (found.chosen - found.rejected).sum().backward()
        gradients = [p.grad for p in policy.model.parameters() if p.requires_grad]
        assert found.chosen.dtype == torch.float32 and all(g.isfinite().all() for g in gradients if g is not None)
        assert any(g is not None and g.abs().max() > 0 for g in gradients)
        said.append(found.chosen.detach())
    torch.testing.assert_close(said[1], said[0], atol=0, rtol=0.03)


def test_pictures_in_a_batch_do_not_change_each_other(load: Callable[[str], Any]) -> None:
    policy = load("stable-diffusion")
    both = next(policy.sample(WORDS[:2], [5, 6], steps=3, guidance=2.0, batch_size=2))
    one = next(policy.sample(WORDS[1:2], [6], steps=3, guidance=2.0, batch_size=1))
    assert np.abs(np.asarray(both[1], dtype=int) - np.asarray(one[0], dtype=int)).max() <= 1


def test_a_missing_component_is_named(tmp_path: Path) -> None:
    import shutil

    folder = BUILDERS["stable-diffusion"].build(tmp_path / "m")
    shutil.rmtree(folder / "vae")
    with pytest.raises(ValueError, match=r"has no vae. Expected the folder vae/"):
        load_policy(str(folder))


def test_an_unknown_family_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "MysteryPipeline"}')
    with pytest.raises(ValueError, match=r"MysteryPipeline.*Known: StableDiffusionPipeline"):
        load_policy(str(tmp_path))
    with pytest.raises(ValueError, match=r"neither model_index\.json"):
        load_policy(str(tmp_path / "nothing"))
