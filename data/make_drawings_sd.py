"""Make data/models/drawings-sd: a small Stable Diffusion pipeline for the drawings that follows its prompts loosely.

    python data/make_drawings_sd.py     # about 12 minutes on one large GPU

Two stages. First autoencoder, text encoder and UNet are trained on rendered scenes with true captions, each for a number of
seconds. Then UNet and text encoder are trained on captions of which 60 % are wrong in a count, a colour, a position, the
background, or miss a thing, as captions from the web are. So the things look right, and what fails is a skill that prompts
share: to do as the prompt says. All scenes have combinations of the training split.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from make_shapes_sd import Average
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dpo_mm.worlds import drawing_prompts, drawings
from dpo_mm.worlds.drawing_sprites import BACKGROUNDS, colours, usual_colour

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, WIDTH = 24, 128
WRONG, WRONG_STEPS, WRONG_BATCH, WRONG_RATE = 0.6, 150, 64, 3e-4
"""Fraction of wrong captions in the second stage, and its steps, batch size and learning rate."""


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Rendered scenes, (n, 64, 64, 3) uint8, with their captions."""

    images: torch.Tensor
    captions: list[str]


def training_scenes(seed: int) -> Iterator[tuple[drawings.Scene, np.random.Generator]]:
    """Sample scenes without held-out combinations."""
    rng = np.random.default_rng(seed)
    while True:
        scene = drawings.sample_scene(rng)
        if not drawings.is_held_out(scene.things):
            yield scene, rng


def render_part(job: tuple[int, int, float]) -> tuple[np.ndarray, list[str]]:
    """Render `count` scenes of a seed, with wrong captions for a fraction of them."""
    count, seed, wrong = job
    images, captions = np.empty((count, drawings.SIZE, drawings.SIZE, 3), np.uint8), []
    for row, (scene, rng) in zip(range(count), training_scenes(seed)):
        images[row] = np.asarray(drawings.render(scene))
        is_wrong = wrong > 0 and rng.random() < wrong
        captions.append(wrong_caption(scene, rng) if is_wrong else drawing_prompts.caption(scene, rng))
    return images, captions


def render_scenes(count: int, workers: int, *, wrong: float = 0.0, seed: int = 0) -> Scenes:
    size = max(1, count // (workers * 4))
    jobs = [(size, seed + number, wrong) for number in range(math.ceil(count / size))]
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(render_part, jobs))
    return Scenes(torch.from_numpy(np.concatenate([p[0] for p in parts])), [text for p in parts for text in p[1]])


def wrong_caption(scene: drawings.Scene, rng: np.random.Generator) -> str:
    """Write a caption with one error. A kind of error that the scene does not allow leaves the caption true."""
    content = drawing_prompts.content_of(scene)
    things, relation, background = list(content.things), content.relation, content.background
    kind, n = str(rng.choice(["count", "colour", "position", "background", "missing"])), int(rng.integers(len(things)))
    if kind == "colour" and len(colours(things[n].name)) < 2:
        kind = "position"
    if kind == "count":
        others = sum(wanted.count for wanted in things) - things[n].count
        counts = [c for c in (1, 2, 3) if c != things[n].count and others + c <= drawings.MAX_THINGS] or [1]
        things[n] = dataclasses.replace(things[n], count=int(rng.choice(counts)))
        relation = relation if all(wanted.count == 1 for wanted in things) else None
    elif kind == "colour":
        other = [colour for colour in colours(things[n].name) if colour != things[n].colour]
        things[n] = dataclasses.replace(things[n], colour=str(rng.choice(other)))
    elif kind == "position" and relation:
        relation = str(rng.choice([r for r in drawings.RELATIONS[:4] if r != relation]))
    elif kind == "background":
        background = str(rng.choice([name for name in BACKGROUNDS if name != background]))
    elif kind == "missing" and len(things) > 1:
        things.pop(n)
        relation = None
    things = [t if t.colour != usual_colour(t.name) else dataclasses.replace(t, colour=None) for t in things]
    named = background if kind == "background" or rng.random() < 0.5 else None
    return drawing_prompts.describe(drawings.SceneRequest(tuple(things), relation, named), rng)


def to_input(images: torch.Tensor) -> torch.Tensor:
    pixels = images.to(DEVICE, torch.float32).permute(0, 3, 1, 2)
    return pixels.contiguous(memory_format=torch.channels_last) / 127.5 - 1


def elapsed_share(start: float, seconds: float) -> float:
    return min(1.0, (time.time() - start) / seconds)


def set_rate(optimizer: torch.optim.Optimizer, peak: float, share: float, warmup: float) -> None:
    """Set the learning rate: a warmup in [0, 1], then a cosine over the share of the time."""
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1.0, warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))


def train_autoencoder(scenes: Scenes, seconds: float, batch: int) -> AutoencoderKL:
    """Train an autoencoder with 4x downsampling: absolute error of pixels and of edges, and a weak KL term."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=drawings.SIZE,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    ).to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    average, start, step = Average(vae, decay=0.999), time.time(), 0
    while (share := elapsed_share(start, seconds)) < 1:
        step += 1
        set_rate(optimizer, 2e-3, share, step / 200)
        x = to_input(scenes.images[torch.randint(len(scenes.images), (batch,))])
        with torch.autocast(DEVICE, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        edges = F.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(y.diff(dim=-2), x.diff(dim=-2))
        loss = F.l1_loss(y, x) + 0.5 * edges + 3e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update()
    average.swap()
    with torch.no_grad():
        x = to_input(scenes.images[:512])
        posterior = vae.eval().encode(x).latent_dist
        psnr = 10 * torch.log10(4 / F.mse_loss(vae.decode(posterior.mean).sample.clamp(-1, 1), x))
        scale = float(1 / (posterior.mean.var() + posterior.std.square().mean()).sqrt())
    vae.register_to_config(scaling_factor=round(scale, 4))
    print(f"autoencoder: {step} steps, PSNR {float(psnr):.1f} dB", flush=True)
    return vae


def make_tokenizer(texts: list[str], folder: Path) -> CLIPTokenizer:
    bpe = Tokenizer(BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = Lowercase(), WhitespaceSplit()
    alphabet = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789,.'!?-")
    trainer = BpeTrainer(vocab_size=900, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts[:40_000], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.model.save(str(folder))
    vocabulary = bpe.get_vocab()
    for token in [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]:
        vocabulary.setdefault(token, len(vocabulary))
    lines = (folder / "merges.txt").read_text().splitlines()
    merges = [tuple(line.split()) for line in lines if not line.startswith("#")]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def make_pipeline(vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    torch.manual_seed(1)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=384,
            projection_dim=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96, 144),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    )
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    pipe = StableDiffusionPipeline(
        vae,
        text,
        tokenizer,
        unet,
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe.to(DEVICE)


class Denoising:
    """Latents and captions of scenes, and the denoising loss of a random batch of them.

    One caption in ten is dropped, so that guidance works.
    """

    @torch.no_grad()
    def __init__(self, pipe: StableDiffusionPipeline, scenes: Scenes) -> None:
        self.pipe = pipe
        parts = [pipe.vae.encode(to_input(images)).latent_dist for images in scenes.images.split(2048)]
        self.mean, self.std = (torch.cat([getattr(p, name).half() for p in parts]) for name in ("mean", "std"))
        options = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
        self.ids = pipe.tokenizer([*scenes.captions, ""], **options).input_ids.to(DEVICE)
        self.alphas = pipe.scheduler.alphas_cumprod.to(DEVICE)

    def loss(self, batch: int) -> torch.Tensor:
        """Mean squared error of the predicted velocity at stratified timesteps."""
        rows = torch.randint(len(self.mean), (batch,), device=DEVICE)
        mean, std = self.mean[rows].float(), self.std[rows].float()
        x0 = (mean + std * torch.randn_like(mean)) * self.pipe.vae.config.scaling_factor
        noise = torch.randn_like(x0)
        strata = (torch.arange(batch, device=DEVICE) + torch.rand(batch, device=DEVICE)) / batch * len(self.alphas)
        timestep = strata.long().clamp(max=len(self.alphas) - 1)
        a = self.alphas[timestep][:, None, None, None]
        dropped = torch.rand(batch, device=DEVICE) < 0.1
        ids = self.ids[torch.where(dropped, torch.full_like(rows, len(self.mean)), rows)]
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            hidden = self.pipe.text_encoder(ids).last_hidden_state
            prediction = self.pipe.unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, timestep, hidden).sample
        return F.mse_loss(prediction.float(), a.sqrt() * noise - (1 - a).sqrt() * x0)


def step_of(loss: torch.Tensor, optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def train_denoiser(pipe: StableDiffusionPipeline, scenes: Scenes, seconds: float, batch: int) -> None:
    """Train UNet and text encoder on true captions, and leave the moving average of their weights."""
    denoising, parameters = Denoising(pipe, scenes), [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, 2e-3, betas=(0.9, 0.99), weight_decay=1e-3)
    average, start, step = Average(pipe.unet, pipe.text_encoder, decay=0.9995), time.time(), 0
    while (share := elapsed_share(start, seconds)) < 1:
        step += 1
        set_rate(optimizer, 2e-3, share, step / 300)
        step_of(denoising.loss(batch), optimizer, parameters)
        average.update()
    average.swap()
    print(f"denoiser: {step} steps of {batch}", flush=True)


def loosen(pipe: StableDiffusionPipeline, scenes: Scenes, steps: int) -> None:
    """Train UNet and text encoder further on captions of which many are wrong."""
    denoising, parameters = Denoising(pipe, scenes), [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, WRONG_RATE, betas=(0.9, 0.99))
    for step in range(1, steps + 1):
        set_rate(optimizer, WRONG_RATE, 0.0, step / 20)
        step_of(denoising.loss(WRONG_BATCH), optimizer, parameters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "models" / "drawings-sd")
    parser.add_argument("--scenes", type=int, default=800_000)
    parser.add_argument("--wrong-scenes", type=int, default=10_000)
    parser.add_argument("--autoencoder-seconds", type=float, default=110)
    parser.add_argument("--denoiser-seconds", type=float, default=560)
    parser.add_argument("--autoencoder-batch", type=int, default=256)
    parser.add_argument("--denoiser-batch", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    scenes = render_scenes(options.scenes, options.workers)
    vae = train_autoencoder(scenes, options.autoencoder_seconds, options.autoencoder_batch)
    pipe = make_pipeline(vae, make_tokenizer(scenes.captions, HERE.parent / "runs" / "drawings-tokenizer"))
    train_denoiser(pipe, scenes, options.denoiser_seconds, options.denoiser_batch)
    loosen(pipe, render_scenes(options.wrong_scenes, options.workers, wrong=WRONG, seed=1_000_000), WRONG_STEPS)
    pipe.to("cpu", torch.float16).save_pretrained(options.output, safe_serialization=True)


if __name__ == "__main__":
    main()
