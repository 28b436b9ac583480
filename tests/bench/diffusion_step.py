"""Compare one training step on image pairs with the published loop: time, memory, time per part, and the FLOP bound.

    python -m tests.bench.diffusion_step --out docs/benchmarks/diffusion-step.json      # CPU, small and SD1.5-shaped
    python -m tests.bench.diffusion_step --size sd15 --device cuda --precision bf16     # real size, random weights
    python -m tests.bench.diffusion_step --size sdxl --device cuda --precision bf16 --checkpointing

The published loop is that of diffusers' research script train_diffusion_dpo, written anew from its description. It runs
the autoencoder and the text encoder in the step and samples one noise and timestep per pair. It runs the policy first,
then the reference by disabling the adapter while the policy's activations are alive. Its mean squared errors have no
factor 1/2, so its beta_dpo is half of our beta. Our step reads posteriors and prompt embeddings from the encoded dataset
on disk and samples noise in the collator. The reference runs online before the policy, or is precomputed for K draws.

Both use the same denoiser, adapter, rows and batch: LoRA of rank 16 on the attention layers, forward and backward, without
the optimizer's step, which is the same for both. The published loop gets decoded pixels, so its JPEG decoding is not
counted. Ours includes reading its rows. Variants run in random order within each round. Times are CPU times of one thread
(on a GPU, wall times between synchronisations), and the table has the medians. Before the timing, all variants get the
same noise and timesteps and must give the same loss.

The small size has the shape of SD1.5's UNet, autoencoder and text encoder with fewer channels and layers, at 256 px. Its
parts have FLOPs in the ratio of SD1.5's at 512 px (`shares`, counted on the meta device for both). Its attention heads are
as wide as SD1.5's (32 to 128, against 40 to 160): at a width of 8, attention on a CPU would take 2/3 of the step.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import io
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dpo_mm.cli.main import suppress_library_output
from dpo_mm.config import TrainConfig
from dpo_mm.data.image_files import encode_png
from dpo_mm.data.schema import drop_ties, make_image_rows
from dpo_mm.policies.diffusion.diffusion_policy import DTYPES
from dpo_mm.policies.diffusion.stable_diffusion import StableDiffusion
from dpo_mm.training.encoding import encode
from dpo_mm.training.pair_stream import PairStream
from dpo_mm.training.reference import precompute_reference_log_probs
from dpo_mm.training.trainer import PreferenceTrainer
from tests.contracts.families.words import WORDS, clip_tokenizer

TOKENS = 77


class Size(NamedTuple):
    """A model's shape: pixels per edge, and keyword arguments of its denoiser, autoencoder and text encoders."""

    pixels: int
    unet: dict[str, Any]
    vae: dict[str, Any]
    texts: tuple[dict[str, Any], ...]


SD_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
SDXL_UNET = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SIZES = {
    "small": Size(
        256,
        {
            "block_out_channels": (64, 128, 256, 256),
            "norm_num_groups": 16,
            "cross_attention_dim": 128,
            "attention_head_dim": 2,
        },
        {"block_out_channels": (26, 52, 104, 104), "layers_per_block": 2, "norm_num_groups": 13},
        ({"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},),
    ),
    "sd15": Size(512, {"cross_attention_dim": 768}, SD_VAE, (CLIP_L,)),
    "sdxl": Size(1024, SDXL_UNET, SD_VAE, (CLIP_L, CLIP_G)),
}


def modules(size: Size, words: Any = None) -> tuple[Any, Any, list[Any]]:
    """Denoiser, autoencoder and text encoders with random weights, on torch's default device."""
    latent = size.pixels // 8
    unet = diffusers.UNet2DConditionModel(**{"sample_size": latent, "attention_head_dim": 8, **size.unet})
    downs, ups = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    shape = {"latent_channels": 4, "sample_size": size.pixels, "scaling_factor": 0.18215}
    vae = diffusers.AutoencoderKL(down_block_types=downs, up_block_types=ups, **shape, **size.vae)
    ids = {} if words is None else {
        "vocab_size": len(words), "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }  # fmt: skip
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    texts = [
        kind(CLIPTextConfig(**text, projection_dim=text["hidden_size"], max_position_embeddings=TOKENS, **ids))
        for kind, text in zip(kinds, size.texts)
    ]
    return unet, vae, texts


def build(size: Size, *, device: str, precision: str) -> Any:
    """The policy of a pipeline of this size with random weights."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        words = clip_tokenizer(Path(folder))
    words.model_max_length = TOKENS
    with torch.device(device):
        unet, vae, texts = (
            [m.to(DTYPES[precision]) for m in part] if isinstance(part, list) else part.to(DTYPES[precision])
            for part in modules(size, words)
        )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    if len(texts) == 2:
        from dpo_mm.policies.diffusion.sdxl import StableDiffusionXL

        pipe = diffusers.StableDiffusionXLPipeline(vae, *texts, words, words, unet, scheduler)
        return StableDiffusionXL(pipe.to(device), "bench")
    pipe = diffusers.StableDiffusionPipeline(
        vae, texts[0], words, unet, scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return StableDiffusion(pipe.to(device), "bench")


def count_flops(function: Callable[[], Any]) -> float:
    """Count the FLOPs of a call, in 10^9."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops() / 1e9


def flops(size: Size) -> dict[str, float]:
    """FLOPs (10^9) of the denoiser and the autoencoder for one image, and of the text encoders for one prompt.

    They are counted on the meta device.
    """
    with torch.device("meta"):
        unet, vae, texts = modules(size)
        latent = size.pixels // 8
        width = unet.config.cross_attention_dim
        conditioning = None
        if len(texts) == 2:
            conditioning = {
                "text_embeds": torch.empty(1, texts[1].config.projection_dim),
                "time_ids": torch.empty(1, 6),
            }
        inputs = (torch.empty(1, 4, latent, latent), torch.zeros(1), torch.empty(1, TOKENS, width))
        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        return {
            "denoiser": count_flops(lambda: unet(*inputs, added_cond_kwargs=conditioning)),
            "autoencoder": count_flops(lambda: vae.encode(torch.empty(1, 3, size.pixels, size.pixels))),
            "text": sum(count_flops(lambda text=text: text(ids)) for text in texts),
        }


def step_gflops(gflops: dict[str, float], *, checkpointing: bool = False) -> dict[str, float]:
    """FLOPs (10^9) of a step on one pair, by variant.

    The published loop encodes two images and one prompt per pair. Per image the denoiser runs forward for the policy and
    for the reference. The backward pass costs as much as one more forward, because with a LoRA it only computes the
    gradients of inputs. With checkpointing the policy's forward pass runs twice.
    """
    passes = 3 + checkpointing
    online, precomputed = (2 * count * gflops["denoiser"] for count in (passes, passes - 1))
    published = online + 2 * gflops["autoencoder"] + gflops["text"]
    return {"published": published, "online": online, "precomputed": precomputed}


def largest_speedups(gflops: dict[str, float], *, checkpointing: bool = False) -> dict[str, float]:
    """The largest speed-up over the published loop that the FLOP counts allow, by variant."""
    steps = step_gflops(gflops, checkpointing=checkpointing)
    return {name: steps["published"] / value for name, value in steps.items() if name != "published"}


class Parts:
    """Seconds of each part of the steps. On a GPU it synchronises before each reading, unless it is not `on`."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds, self.on = device, {}, True  # type: tuple[str, dict[str, list[float]], bool]

    def now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self.on:
            yield
            return
        start = self.now()
        yield
        self.seconds.setdefault(name, []).append(self.now() - start)


class Draw(NamedTuple):
    """One sample: noise of the posteriors and of the step, (pairs, c, h, w), and timesteps, (pairs,)."""

    posterior: Tensor
    noise: Tensor
    timestep: Tensor


Step = Callable[[], float]


def rows_of(size: Size, pairs: int) -> list[dict[str, Any]]:
    """Pairs of images of smooth noise."""

    def png_bytes(seed: int) -> bytes:
        small = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        return encode_png(Image.fromarray(small).resize((size.pixels,) * 2, Image.Resampling.BICUBIC))

    return [
        {
            "id": f"row-{n}",
            "prompt": WORDS[n % len(WORDS)],
            "image_a": {"bytes": png_bytes(2 * n), "path": None},
            "image_b": {"bytes": png_bytes(2 * n + 1), "path": None},
            "preference": "a",
        }
        for n in range(pairs)
    ]  # fmt: skip


def published_step(
    policy: Any, config: TrainConfig, pixels: Tensor, ids: list[Tensor], parts: Parts
) -> Callable[..., float]:
    """The published loop's step.

    Args:
        pixels: chosen images, then rejected ones, (2 * pairs, 3, size, size).
        ids: token ids of the prompts for each text encoder.
    """
    unet, vae, scale = policy.model, policy.pipe.vae, policy.pipe.vae.config.scaling_factor
    texts = [
        getattr(policy.pipe, name) for name in ("text_encoder", "text_encoder_2") if getattr(policy.pipe, name, None)
    ]
    alphas_cumprod = policy.scheduler.alphas_cumprod.to(pixels.device)
    pairs, dtype = len(pixels) // 2, vae.dtype

    def encode_prompts() -> dict[str, Any]:
        if len(texts) == 1:
            return {"encoder_hidden_states": texts[0](ids[0])[0].repeat(2, 1, 1)}
        encoded = [text(tokens, output_hidden_states=True) for text, tokens in zip(texts, ids, strict=True)]
        sizes = torch.tensor([[float(pixels.shape[-1])] * 2 + [0.0, 0.0] + [float(pixels.shape[-1])] * 2], dtype=dtype)
        size_conditioning = {
            "text_embeds": encoded[1][0].repeat(2, 1),
            "time_ids": sizes.to(pixels.device).repeat(2 * pairs, 1),
        }
        hidden = torch.cat([output.hidden_states[-2] for output in encoded], -1)
        return {"encoder_hidden_states": hidden.repeat(2, 1, 1), "added_cond_kwargs": size_conditioning}

    def step(draw: Draw | None = None) -> float:
        with parts.part("autoencoder"):
            posteriors = [vae.encode(part).latent_dist for part in pixels.to(dtype).split(8)]
            samples = [posterior.sample() if draw is None else posterior.mean for posterior in posteriors]
            if draw is not None:
                noise_parts = draw.posterior.repeat(2, 1, 1, 1).split(8)
                samples = [p.mean + p.std * part for p, part in zip(posteriors, noise_parts, strict=True)]
            latent = (torch.cat(samples) * scale).float()
        with parts.part("noise"):
            noise = torch.randn_like(latent[:pairs]) if draw is None else draw.noise
            timestep = (
                torch.randint(0, len(alphas_cumprod), (pairs,), device=latent.device) if draw is None else draw.timestep
            )
            noise, timestep = noise.repeat(2, 1, 1, 1), timestep.repeat(2)
            alpha_bar = alphas_cumprod[timestep].float()[:, None, None, None]
            noisy = (alpha_bar.sqrt() * latent + (1 - alpha_bar).sqrt() * noise).to(dtype)
        with parts.part("text"):
            prompt = encode_prompts()
        with parts.part("policy forward"):
            errors = F.mse_loss(unet(noisy, timestep, **prompt).sample.float(), noise, reduction="none").mean([1, 2, 3])
        with parts.part("reference"):
            unet.disable_adapters()
            with torch.no_grad():
                reference_errors = F.mse_loss(
                    unet(noisy, timestep, **prompt).sample.float(), noise, reduction="none"
                ).mean([1, 2, 3])
            unet.enable_adapters()
        with parts.part("backward"):
            chosen, rejected = errors.chunk(2)
            reference_chosen, reference_rejected = reference_errors.chunk(2)
            difference = (reference_chosen - reference_rejected) - (chosen - rejected)
            loss = -F.logsigmoid(config.beta / 2 * difference).mean()
            loss.backward()
        return float(loss.detach())

    return step


def our_step(policy: Any, config: TrainConfig, rows: Any, parts: Parts) -> Step:
    """Our step, with rows from disk and the trainer's loss."""
    draws = config.fixed_draws_per_row
    if config.reference == "precomputed":
        rows = precompute_reference_log_probs(
            policy, PairStream(rows, seed=0, length=len(rows), num_fixed_draws=draws), config
        )
    trainer = PreferenceTrainer(policy, config, rows)
    policy.model.train()
    stream = PairStream(rows, seed=0, length=10**9, num_fixed_draws=draws, shuffle=False)
    run_reference, run_policy = trainer.reference, policy.log_probs
    visit = 0

    def timed_reference(model: Any, batch: Any) -> Any:
        with parts.part("reference"):
            policy.log_probs = run_policy
            try:
                return run_reference(model, batch)
            finally:
                policy.log_probs = timed_policy

    def timed_policy(model: Any, batch: Any) -> Any:
        with parts.part("policy forward"):
            return run_policy(model, batch)

    def step() -> float:
        nonlocal visit
        with parts.part("rows and draws"):
            batch = policy.collate([stream[visit * len(rows) + n] for n in range(len(rows))])
            batch = trainer._prepare_inputs(batch)
        visit += 1
        trainer.reference, policy.log_probs = timed_reference, timed_policy
        try:
            loss = trainer.compute_loss(policy.model, batch)
        finally:
            policy.log_probs = run_policy
        with parts.part("backward"):
            loss.backward()
        trainer._metrics["train"].clear()
        return float(loss.detach())

    return step


def randomise_adapter(model: Any) -> None:
    """Fill the adapter with the same random numbers in all variants, each matrix from a separate seed."""
    for number, (_, tensor) in enumerate(sorted((name, t) for name, t in model.named_parameters() if "lora_" in name)):
        with torch.no_grad():
            tensor.copy_(0.01 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))


class Bench(NamedTuple):
    """Steps and part times by variant, a function that frees gradients, each variant's loss on the same noise, the policy."""

    steps: dict[str, Step]
    parts: dict[str, Parts]
    clear: Callable[[], None]
    loss: dict[str, float]
    policy: Any


class Setup(NamedTuple):
    """Pairs per step, device, precision, gradient checkpointing, and draws per row of the precomputed reference."""

    pairs: int = 2
    device: str = "cpu"
    precision: str = "fp32"
    checkpointing: bool = False
    draws: int = 4


def prepare_bench(size: Size, options: Setup, folder: Path) -> Bench:
    """Prepare all variants on one policy. Its encoders stay in memory, because the published loop needs them."""
    policy = build(size, device=options.device, precision=options.precision)
    policy.model.train()
    rows = rows_of(size, options.pairs)
    pixels = torch.stack([
        policy.pixels(Image.open(io.BytesIO(row[side]["bytes"])))
        for side in ("image_a", "image_b") for row in rows
    ]).to(options.device)  # fmt: skip
    names = [name for name in ("tokenizer", "tokenizer_2") if getattr(policy.pipe, name, None)]
    tokenizer_options = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
    ids = [
        getattr(policy.pipe, n)([row["prompt"] for row in rows], **tokenizer_options).input_ids.to(options.device)
        for n in names
    ]
    encoded = encode(policy, drop_ties(make_image_rows(rows)), where="bench", cache=folder)
    config = TrainConfig(
        "bench", "bench", str(folder / "out"), batch_size=options.pairs, steps=1, precision=options.precision,
        gradient_checkpointing=options.checkpointing,
    )  # fmt: skip
    policy.prepare(config)
    randomise_adapter(policy.model)
    variants = {
        "online": config,
        "precomputed": config.__class__(
            **{**config.__dict__, "reference": "precomputed", "fixed_draws_per_row": options.draws}
        ),
    }
    parts = {name: Parts(options.device) for name in ("published", *variants)}
    published = published_step(policy, config, pixels, ids, parts["published"])
    steps: dict[str, Step] = {"published": published}
    steps |= {name: our_step(policy, variant_config, encoded, parts[name]) for name, variant_config in variants.items()}
    batch = policy.collate([{**encoded[n], "visit": 0} for n in range(options.pairs)])
    draw = Draw(_posterior(config, batch), batch["noise"], batch["timestep"])
    draw = Draw(*(tensor.to(options.device) for tensor in draw))
    loss = {"published": published(draw)} | {name: steps[name]() for name in variants}
    return Bench(steps, parts, lambda: policy.model.zero_grad(set_to_none=True), loss, policy)


def _posterior(config: TrainConfig, batch: dict[str, Any]) -> Tensor:
    """The posterior noise that our collator samples in the first epoch."""
    from dpo_mm.policies.diffusion import random_draws

    shape = tuple(batch["noise"].shape[1:])
    return torch.stack(
        [
            torch.from_numpy(random_draws.sample_noise(config.seed, id, 0, shape, purpose="posterior"))
            for id in batch["id"]
        ]
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure median seconds by variant and part, peak memory, the losses on the same noise, and the FLOP bound."""
    setup = Setup(options.pairs, options.device, options.precision, options.checkpointing, options.draws)
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare_bench(SIZES[options.size], setup, Path(folder))
        times: dict[str, list[float]] = {name: [] for name in bench.steps}
        for parts in bench.parts.values():
            parts.seconds.clear()
        for number in range(options.rounds):
            order = list(bench.steps)
            random.Random(number).shuffle(order)
            for name in order:
                start = bench.parts[name].now()
                bench.steps[name]()
                times[name].append(bench.parts[name].now() - start)
                bench.clear()
        peaks = {name: peak(step, bench.clear, options.device) for name, step in bench.steps.items()}
    medians = {name: statistics.median(values) for name, values in times.items()}
    gflops = {name: flops(size) for name, size in SIZES.items()}
    return {
        "size": options.size,
        "pairs": options.pairs,
        "rounds": options.rounds,
        "draws_kept": options.draws,
        "gradient_checkpointing": options.checkpointing,
        "loss_on_one_draw": bench.loss,
        "seconds": medians,
        "all_seconds": times,
        "parts": {
            name: {part: statistics.median(values) for part, values in parts.seconds.items()}
            for name, parts in bench.parts.items()
        },
        "peak_mib": peaks,
        "over_published": {name: medians["published"] / value for name, value in medians.items()},
        "round_ratios": {
            name: [a / b for a, b in zip(times["published"], values, strict=True)] for name, values in times.items()
        },
        "gflops": gflops,
        "shares": {
            name: {part: value / parts["denoiser"] for part, value in parts.items()} for name, parts in gflops.items()
        },
        "flops_allow": {
            name: largest_speedups(parts, checkpointing=options.checkpointing) for name, parts in gflops.items()
        },
    }


def peak(step: Step, clear: Callable[[], None], device: str) -> float:
    """The peak memory that a step adds, in MiB, of the process (Linux) or of the GPU's allocator."""
    clear()
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    resident = status("VmRSS")
    step()
    return status("VmHWM") - resident


def status(name: str) -> float:
    """A value of /proc/self/status, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    with suppress_library_output():
        results = measure(options)
    print(f"loss on one draw: {', '.join(f'{name} {loss:.6f}' for name, loss in results['loss_on_one_draw'].items())}")
    for name, seconds in results["seconds"].items():
        speedup_bound = results["flops_allow"][options.size].get(name)
        print(
            f"{name:12} {1000 * seconds:7.0f} ms  x{results['over_published'][name]:.2f}"
            f"{f' (FLOPs alone: x{speedup_bound:.2f})' if speedup_bound else '':20}  +{results['peak_mib'][name]:.0f} MiB  "
            + ", ".join(f"{part} {1000 * value:.0f}" for part, value in results["parts"][name].items())
        )
    for name, shares in results["shares"].items():
        print(f"{name:5} FLOPs of one denoiser forward: " + ", ".join(f"{k} {v:.3f}" for k, v in shares.items()))
    if options.out:
        device = torch.cuda.get_device_name() if options.device != "cpu" else f"{platform.machine()} CPU, one thread"
        about = {"command": "python -m tests.bench.diffusion_step", "device": device, "precision": options.precision,
                 "torch": torch.__version__, "diffusers": diffusers.__version__}  # fmt: skip
        options.out.write_text(json.dumps({**about, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
