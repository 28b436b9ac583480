"""One training step on image pairs, ours beside the published loop: time, memory, per part, and what FLOPs allow.

    python -m tests.bench.diffusion_step --out docs/benchmarks/diffusion-step.json      # CPU, small and SD1.5-shaped
    python -m tests.bench.diffusion_step --size sd15 --device cuda --precision bf16     # real size, random weights
    python -m tests.bench.diffusion_step --size sdxl --device cuda --precision bf16 --checkpointing

The published loop is the one of diffusers' research script train_diffusion_dpo, written anew from its description:
autoencoder and text encoder in the step, one noise and timestep a pair, the policy's forward, then the reference by
switching the adapter off while the policy's activations are alive, mean squared errors without the 1/2 (so that its
beta_dpo is half of our beta), and the backward pass. Ours: posteriors and prompt embeddings read from the encoded set on
disk, draws made in the collator, the reference asked online before the policy, or kept for K draws.

The same denoiser, adapter, rows and batch on all sides; LoRA of rank 16 on the attention layers, forward and backward,
without the optimizer's step (the same for all). Pictures are decoded pixels for the published loop, so its JPEG decoding
is left out; ours pays for reading its rows. Variants run in random order within each round; times are of the process's
CPU, single-threaded (GPU: wall time between synchronisations), and the table is of medians. Before that, all are given
the same draws and must give the same loss.

Small: UNet, autoencoder and text encoder of SD1.5's shape with channels and depth cut, 256 px, their FLOPs in the ratio
of SD1.5's own at 512 px (`shares`; counted, on the meta device, beside those of the real ones), its attention heads as
wide as SD1.5's (32 to 128; 40 to 160): at a width of 8, this CPU's attention alone would be 2/3 of the step.
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
    """A model's shape: keywords of its denoiser, autoencoder and text encoders; pixels of a side."""

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
    """Denoiser, autoencoder and text encoders, random, on the device that is the default."""
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
    """The policy of a random pipeline of this size, on the device."""
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


def counted(function: Callable[[], Any]) -> float:
    """FLOPs of a call, 10^9."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops() / 1e9


def flops(size: Size) -> dict[str, float]:
    """FLOPs (10^9) of one picture's denoiser forward, its encoding, and a prompt's; on the meta device."""
    with torch.device("meta"):
        unet, vae, texts = modules(size)
        latent = size.pixels // 8
        width = unet.config.cross_attention_dim
        more = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)} if len(texts) == 2 else None
        given = (torch.empty(1, 4, latent, latent), torch.zeros(1), torch.empty(1, TOKENS, width))
        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        return {
            "denoiser": counted(lambda: unet(*given, added_cond_kwargs=more)),
            "autoencoder": counted(lambda: vae.encode(torch.empty(1, 3, size.pixels, size.pixels))),
            "text": sum(counted(lambda text=text: text(ids)) for text in texts),
        }


def allowed(one: dict[str, float]) -> dict[str, float]:
    """What a perfect implementation would gain over the published loop, by FLOPs.

    A pair: two pictures encoded, one prompt; a picture's denoiser forward for the policy and for the reference, and once
    more for the backward pass, which with a LoRA gives gradients to inputs alone.
    """
    step = 2 * 3 * one["denoiser"]
    published = step + 2 * one["autoencoder"] + one["text"]
    return {"online": published / step, "precomputed": published / (step * 2 / 3)}


class Parts:
    """Seconds of each part of the steps that ran; a GPU is waited for."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, {}  # type: tuple[str, dict[str, list[float]]]

    def now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self.seconds.setdefault(name, []).append(self.now() - start)


class Draw(NamedTuple):
    """Noise of the posteriors and of the step, (pairs, c, h, w), and timesteps, (pairs,)."""

    posterior: Tensor
    noise: Tensor
    timestep: Tensor


Step = Callable[[], float]


def rows_of(size: Size, pairs: int) -> list[dict[str, Any]]:
    """Pairs of pictures of smooth noise."""

    def picture(seed: int) -> bytes:
        small = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        return encode_png(Image.fromarray(small).resize((size.pixels,) * 2, Image.Resampling.BICUBIC))

    return [
        {
            "id": f"row-{n}",
            "prompt": WORDS[n % len(WORDS)],
            "image_a": {"bytes": picture(2 * n), "path": None},
            "image_b": {"bytes": picture(2 * n + 1), "path": None},
            "preference": "a",
        }
        for n in range(pairs)
    ]  # fmt: skip


def published(
    policy: Any, config: TrainConfig, pixels: Tensor, ids: list[Tensor], parts: Parts
) -> Callable[..., float]:
    """The published loop's step. pixels: chosen, then rejected, (2 pairs, 3, s, s). ids: of each text encoder."""
    unet, vae, scale = policy.model, policy.pipe.vae, policy.pipe.vae.config.scaling_factor
    texts = [
        getattr(policy.pipe, name) for name in ("text_encoder", "text_encoder_2") if getattr(policy.pipe, name, None)
    ]
    kept = policy.scheduler.alphas_cumprod.to(pixels.device)
    pairs, dtype = len(pixels) // 2, vae.dtype

    def told() -> dict[str, Any]:
        if len(texts) == 1:
            return {"encoder_hidden_states": texts[0](ids[0])[0].repeat(2, 1, 1)}
        found = [text(tokens, output_hidden_states=True) for text, tokens in zip(texts, ids, strict=True)]
        sizes = torch.tensor([[float(pixels.shape[-1])] * 2 + [0.0, 0.0] + [float(pixels.shape[-1])] * 2], dtype=dtype)
        more = {"text_embeds": found[1][0].repeat(2, 1), "time_ids": sizes.to(pixels.device).repeat(2 * pairs, 1)}
        hidden = torch.cat([one.hidden_states[-2] for one in found], -1)
        return {"encoder_hidden_states": hidden.repeat(2, 1, 1), "added_cond_kwargs": more}

    def step(draw: Draw | None = None) -> float:
        with parts.part("autoencoder"):
            latents = [vae.encode(part).latent_dist for part in pixels.to(dtype).split(8)]
            fresh = [one.sample() if draw is None else one.mean for one in latents]
            if draw is not None:
                fresh = [one.mean + one.std * draw.posterior.repeat(2, 1, 1, 1) for one in latents]
            latent = (torch.cat(fresh) * scale).float()
        with parts.part("noise"):
            noise = torch.randn_like(latent[:pairs]) if draw is None else draw.noise
            at = torch.randint(0, len(kept), (pairs,), device=latent.device) if draw is None else draw.timestep
            noise, at = noise.repeat(2, 1, 1, 1), at.repeat(2)
            level = kept[at].float()[:, None, None, None]
            noisy = (level.sqrt() * latent + (1 - level).sqrt() * noise).to(dtype)
        with parts.part("text"):
            prompt = told()
        with parts.part("policy forward"):
            error = F.mse_loss(unet(noisy, at, **prompt).sample.float(), noise, reduction="none").mean([1, 2, 3])
        with parts.part("reference"):
            unet.disable_adapters()
            with torch.no_grad():
                before = F.mse_loss(unet(noisy, at, **prompt).sample.float(), noise, reduction="none").mean([1, 2, 3])
            unet.enable_adapters()
        with parts.part("backward"):
            won, lost = error.chunk(2)
            won_before, lost_before = before.chunk(2)
            inside = (won_before - lost_before) - (won - lost)
            loss = -F.logsigmoid(config.beta / 2 * inside).mean()
            loss.backward()
        return float(loss.detach())

    return step


def ours(policy: Any, config: TrainConfig, rows: Any, parts: Parts) -> Step:
    """Our step: rows from disk, the trainer's own loss."""
    draws = config.fixed_draws_per_row
    if config.reference == "precomputed":
        rows = precompute_reference_log_probs(
            policy, PairStream(rows, seed=0, length=len(rows), num_fixed_draws=draws), config
        )
    trainer = PreferenceTrainer(policy, config, rows)
    policy.model.train()
    stream = PairStream(rows, seed=0, length=10**9, num_fixed_draws=draws, shuffle=False)
    asked, asks = trainer.reference, policy.log_probs
    visit = 0

    def reference(model: Any, batch: Any) -> Any:
        with parts.part("reference"):
            policy.log_probs = asks
            try:
                return asked(model, batch)
            finally:
                policy.log_probs = timed

    def timed(model: Any, batch: Any) -> Any:
        with parts.part("policy forward"):
            return asks(model, batch)

    def step() -> float:
        nonlocal visit
        with parts.part("rows and draws"):
            batch = policy.collate([stream[visit * len(rows) + n] for n in range(len(rows))])
            batch = trainer._prepare_inputs(batch)
        visit += 1
        trainer.reference, policy.log_probs = reference, timed
        try:
            loss = trainer.compute_loss(policy.model, batch)
        finally:
            policy.log_probs = asks
        with parts.part("backward"):
            loss.backward()
        trainer._metrics["train"].clear()
        return float(loss.detach())

    return step


def stir(model: Any) -> None:
    """The same adapter on all sides, away from zero: each matrix from its own seed."""
    for number, (_, tensor) in enumerate(sorted((name, t) for name, t in model.named_parameters() if "lora_" in name)):
        with torch.no_grad():
            tensor.copy_(0.01 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))


class Bench(NamedTuple):
    """Steps by variant, the parts that each notes, how to free gradients, and each variant's loss on one same draw."""

    steps: dict[str, Step]
    parts: dict[str, Parts]
    clear: Callable[[], None]
    loss: dict[str, float]


def prepared(given: argparse.Namespace, folder: Path) -> Bench:
    """The variants on one policy (whose encoders stay, for the published loop)."""
    size = SIZES[given.size]
    policy = build(size, device=given.device, precision=given.precision)
    policy.model.train()
    rows = rows_of(size, given.pairs)
    pixels = torch.stack([
        policy.pixels(Image.open(io.BytesIO(row[side]["bytes"])))
        for side in ("image_a", "image_b") for row in rows
    ]).to(given.device)  # fmt: skip
    names = [name for name in ("tokenizer", "tokenizer_2") if getattr(policy.pipe, name, None)]
    told = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
    ids = [getattr(policy.pipe, n)([row["prompt"] for row in rows], **told).input_ids.to(given.device) for n in names]
    encoded = encode(policy, drop_ties(make_image_rows(rows)), where="bench", cache=folder)
    config = TrainConfig(
        "bench", "bench", str(folder / "out"), batch_size=given.pairs, steps=1, precision=given.precision,
        gradient_checkpointing=given.checkpointing,
    )  # fmt: skip
    policy.prepare(config)
    stir(policy.model)
    variants = {
        "online": config,
        "precomputed": config.__class__(
            **{**config.__dict__, "reference": "precomputed", "fixed_draws_per_row": given.draws}
        ),
    }
    parts = {name: Parts(given.device) for name in ("published", *variants)}
    loop = published(policy, config, pixels, ids, parts["published"])
    steps: dict[str, Step] = {"published": loop}
    steps |= {name: ours(policy, one, encoded, parts[name]) for name, one in variants.items()}
    first = policy.collate([{**encoded[n], "visit": 0} for n in range(given.pairs)])
    draw = Draw(_posterior(config, first), first["noise"], first["timestep"])
    draw = Draw(*(tensor.to(given.device) for tensor in draw))
    loss = {"published": loop(draw)} | {name: steps[name]() for name in variants}
    return Bench(steps, parts, lambda: policy.model.zero_grad(set_to_none=True), loss)


def _posterior(config: TrainConfig, batch: dict[str, Any]) -> Tensor:
    """The posterior's noise that our collator drew at visit 0."""
    from dpo_mm.policies.diffusion import random_draws

    shape = tuple(batch["noise"].shape[1:])
    return torch.stack(
        [torch.from_numpy(random_draws.sample_noise(config.seed, id, 0, shape, what="posterior")) for id in batch["id"]]
    )


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """Medians of seconds by variant and part, peak memory, the losses on one same draw, and what FLOPs allow."""
    with tempfile.TemporaryDirectory() as folder:
        bench = prepared(given, Path(folder))
        times: dict[str, list[float]] = {name: [] for name in bench.steps}
        for parts in bench.parts.values():
            parts.seconds.clear()
        for number in range(given.rounds):
            order = list(bench.steps)
            random.Random(number).shuffle(order)
            for name in order:
                start = bench.parts[name].now()
                bench.steps[name]()
                times[name].append(bench.parts[name].now() - start)
                bench.clear()
        peaks = {name: peak(step, bench.clear, given.device) for name, step in bench.steps.items()}
    medians = {name: statistics.median(values) for name, values in times.items()}
    one = {name: flops(size) for name, size in SIZES.items()}
    return {
        "size": given.size,
        "pairs": given.pairs,
        "rounds": given.rounds,
        "draws_kept": given.draws,
        "gradient_checkpointing": given.checkpointing,
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
        "gflops": one,
        "shares": {
            name: {part: value / parts["denoiser"] for part, value in parts.items()} for name, parts in one.items()
        },
        "flops_allow": {name: allowed(parts) for name, parts in one.items()},
    }


def peak(step: Step, clear: Callable[[], None], device: str) -> float:
    """What a step adds to memory at most, MiB (Linux, or the GPU's allocator)."""
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
    given = parser.parse_args()
    if given.device == "cpu":
        torch.set_num_threads(1)
    with suppress_library_output():
        found = measured(given)
    print(f"loss on one draw: {', '.join(f'{name} {loss:.6f}' for name, loss in found['loss_on_one_draw'].items())}")
    for name, seconds in found["seconds"].items():
        bound = found["flops_allow"][given.size].get(name)
        print(
            f"{name:12} {1000 * seconds:7.0f} ms  x{found['over_published'][name]:.2f}"
            f"{f' (FLOPs alone: x{bound:.2f})' if bound else '':20}  +{found['peak_mib'][name]:.0f} MiB  "
            + ", ".join(f"{part} {1000 * value:.0f}" for part, value in found["parts"][name].items())
        )
    for name, shares in found["shares"].items():
        print(f"{name:5} FLOPs of one denoiser forward: " + ", ".join(f"{k} {v:.3f}" for k, v in shares.items()))
    if given.out:
        device = torch.cuda.get_device_name() if given.device != "cpu" else f"{platform.machine()} CPU, one thread"
        about = {"command": "python -m tests.bench.diffusion_step", "device": device, "precision": given.precision,
                 "torch": torch.__version__, "diffusers": diffusers.__version__}  # fmt: skip
        given.out.write_text(json.dumps({**about, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
