"""Make data/models/shapes-editor: a small InstructPix2Pix pipeline that edits coloured shapes, and its lists of edits.

    python data/make_shapes_editor.py        # about nine CPU minutes, on one core

The autoencoder is that of `shapes-sd`. Text encoder and UNet begin with its weights. The UNet gets four more input channels
for the image to edit, whose weights begin at zero. It learns to predict v instead of the noise, because the image to edit then
enters the prediction at every noise level. Both are trained together on rendered edits (`dpo_mm.worlds.shape_edits`),
of which all have training combinations, so held-out ones are new to it. The weights are saved in --work every few hundred
steps, and a later run continues from the last of them with a new optimizer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline, UNet2DConditionModel
from make_shapes_sd import Average, encode, make_tokenizer, schedule
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from dpo_mm.data.image_files import encode_png
from dpo_mm.judges.edit_judge import edit_followed, edit_preserved
from dpo_mm.worlds import shape_edits, shapes

HERE = Path(__file__).parent
LEARNING_RATE, BATCH, HORIZON, SAVE_EVERY = 1e-3, 32, 6_000, 250
"""Training stops before the HORIZON of the learning rate, when many edits fail that others of the same kind get right."""
DROPPED = 0.05
"""Fraction of rows without instruction, without image, and without both, as in InstructPix2Pix (2211.09800), section 3.2.1."""
SAMPLER = {"num_inference_steps": 10, "guidance_scale": 1.0}
LISTS = {"train": (240, 1, False), "held-out": (120, 2, True)}
"""Number of edits, seed of their scenes, and whether their combinations are held out, per list."""


class Edits:
    """Rendered edits: images to edit, edited images, instructions."""

    def __init__(self, tasks: Iterable[shape_edits.EditTask]) -> None:
        chosen = list(tasks)
        self.sources, self.targets = (
            [shapes.render(getattr(one, side)) for one in chosen] for side in ("source", "target")
        )
        self.instructions = [one.instruction for one in chosen]


def pixels(images: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def make_editor(work: Path) -> StableDiffusionInstructPix2PixPipeline:
    """Build the pipeline from `shapes-sd`, with a vocabulary of the words in instructions."""
    drawer = StableDiffusionPipeline.from_pretrained(HERE / "models" / "shapes-sd", dtype=torch.float32)
    texts = sorted({task.instruction for task in shape_edits.tasks(20_000, seed=0)})
    tokenizer = make_tokenizer(work / "tokenizer", texts)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: getattr(tokenizer, name) for name in names}
    torch.manual_seed(1)
    text = CLIPTextModel(
        CLIPTextConfig(**{**drawer.text_encoder.config.to_dict(), **ids, "vocab_size": len(tokenizer)})
    )
    weights, table = drawer.text_encoder.state_dict(), "embeddings.token_embedding.weight"
    (name,) = (name for name in weights if name.endswith(table))
    rows, known = text.state_dict()[name].clone(), drawer.tokenizer.get_vocab()
    for token, row in tokenizer.get_vocab().items():
        if token in known:
            rows[row] = weights[name][known[token]]
    text.load_state_dict({**weights, name: rows})
    unet = UNet2DConditionModel.from_config({**drawer.unet.config, "in_channels": 8})
    weights = drawer.unet.state_dict()
    first = weights["conv_in.weight"]
    unet.load_state_dict({**weights, "conv_in.weight": torch.cat([first, torch.zeros_like(first)], 1)})
    not_needed = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    scheduler = type(drawer.scheduler).from_config({**drawer.scheduler.config, "prediction_type": "v_prediction"})
    return StableDiffusionInstructPix2PixPipeline(drawer.vae, text, tokenizer, unet, scheduler, **not_needed)


def train(pipe: StableDiffusionInstructPix2PixPipeline, edits: Edits, first: int, steps: int, work: Path) -> None:
    """Train text encoder and UNet together with v prediction, and save the moving average of their weights."""
    text, unet = pipe.text_encoder.train(), pipe.unet.train().to(memory_format=torch.channels_last)
    (source, _), (mean, std) = (encode(pipe.vae, pixels(images)) for images in (edits.sources, edits.targets))
    scale = pipe.vae.config.scaling_factor
    limit = pipe.tokenizer.model_max_length
    ids = pipe.tokenizer(
        [*edits.instructions, ""], padding="max_length", max_length=limit, return_tensors="pt"
    ).input_ids
    parameters = [*unet.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    average, alphas = Average(unet, text, decay=0.998), pipe.scheduler.alphas_cumprod
    rate, total = schedule(optimizer, HORIZON, 100), 0.0
    for step in range(1, steps + 1):
        if step > first:
            generator = torch.Generator().manual_seed(step)
            rows = torch.randint(len(mean), (BATCH,), generator=generator)
            x0 = scale * (mean[rows].float() + std[rows].float() * torch.randn(mean[rows].shape, generator=generator))
            noise = torch.randn(x0.shape, generator=generator)
            strata = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH * len(alphas)
            timestep = strata.long().clamp(max=len(alphas) - 1)
            a, dropped = alphas[timestep][:, None, None, None], torch.rand(BATCH, generator=generator)
            noisy, v = a.sqrt() * x0 + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x0
            instructions = torch.where(dropped < 2 * DROPPED, torch.tensor(len(mean)), rows)
            has_image = ((dropped < DROPPED) | (dropped >= 3 * DROPPED))[:, None, None, None]
            model_input = torch.cat([noisy, source[rows].float() * has_image], 1)
            model_input = model_input.contiguous(memory_format=torch.channels_last)
            loss = F.mse_loss(unet(model_input, timestep, text(ids[instructions]).last_hidden_state).sample, v)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            average.update()
            total += loss.item()
        rate.step()
        if step > first and (step % SAVE_EVERY == 0 or step == steps):
            average.swap()
            print(f"step {step}/{steps} loss {total / SAVE_EVERY:.4f} {rates(pipe, 60, seed=2)}", flush=True)
            pipe.save_pretrained(work / f"step-{step}")
            average.swap()
            total = 0.0


@torch.no_grad()
def rates(pipe: StableDiffusionInstructPix2PixPipeline, count: int, seed: int) -> dict[str, tuple[float, float, float]]:
    """Rates of held-out edits that are followed, preserved and both, by kind and overall."""
    pipe.set_progress_bar_config(disable=True)
    edits = Edits(shape_edits.tasks(count, seed=seed, held_out=True))
    images = pipe(edits.instructions, edits.sources, **SAMPLER, generator=torch.Generator().manual_seed(0)).images
    sources = [[source] for source in edits.sources]
    scores = np.array([judge(images, edits.instructions, sources) for judge in (edit_followed, edit_preserved)])
    scores = np.vstack([scores, scores.prod(0)])
    kinds = np.array([shape_edits.parse(text).kind for text in edits.instructions])
    by_kind = {kind: scores[:, kinds == kind] for kind in shape_edits.KINDS} | {"all": scores}
    return {kind: tuple(round(float(rate), 3) for rate in part.mean(1)) for kind, part in by_kind.items()}


def write_lists(folder: Path) -> None:
    """Write the lists of edits as prompts with images: `prompt`, `category`, and `image` as PNG."""
    for name, (count, seed, held_out) in LISTS.items():
        edits = Edits(shape_edits.tasks(count, seed=seed, held_out=held_out))
        images = [{"bytes": encode_png(image), "path": None} for image in edits.sources]
        kinds = [shape_edits.parse(text).kind for text in edits.instructions]
        table = pa.table({"prompt": edits.instructions, "category": kinds, "image": images})
        pq.write_table(table, folder / f"edits-{name}.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "models" / "shapes-editor")
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "shapes-editor")
    parser.add_argument("--edits", type=int, default=6_000)
    parser.add_argument("--steps", type=int, default=1_000)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    write_lists(HERE / "shapes")
    done = max((int(path.name.partition("-")[2]) for path in options.work.glob("step-*")), default=0)
    done = min(done, options.steps)
    saved = options.work / f"step-{done}"
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(saved) if done else make_editor(options.work)
    if done < options.steps:
        tasks = shape_edits.tasks(options.edits, seed=0, held_out=False)
        train(pipe, Edits(tasks), done, options.steps, options.work)
        pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(options.work / f"step-{options.steps}")
    pipe.to("cpu", torch.float16).save_pretrained(options.output, safe_serialization=True)
    for file in options.output.rglob("*.json"):
        content = json.loads(file.read_text())
        if content.pop("_name_or_path", None):  # the folder of this machine from which it was loaded
            file.write_text(json.dumps(content, indent=2) + "\n")
    reloaded = StableDiffusionInstructPix2PixPipeline.from_pretrained(options.output, dtype=torch.float32)
    write_card(options, reloaded)


def write_card(options: argparse.Namespace, pipe: StableDiffusionInstructPix2PixPipeline) -> None:
    table = "\n".join(
        f"| {kind} | {followed:.1%} | {preserved:.1%} | {both:.1%} |"
        for kind, (followed, preserved, both) in rates(pipe, 300, seed=3).items()
    )
    sums = "\n".join(
        f"| {path.relative_to(options.output)} | {path.stat().st_size:,} | `{hashlib.sha256(path.read_bytes()).hexdigest()}` |"
        for path in sorted(options.output.rglob("*.safetensors"))
    )
    (options.output / "README.md").write_text(f"""---
license: apache-2.0
pipeline_tag: image-to-image
library_name: diffusers
---
# shapes-editor

An InstructPix2Pix pipeline of diffusers' classes that edits coloured shapes at 64x64: it recolours, removes or adds one.
It exists so that preference tuning of an editor can be tried, tested and measured without a download. It edits nothing else.

`python data/make_shapes_editor.py` makes it from `shapes-sd` and {options.edits:,} rendered edits (`dpo_mm/worlds/shape_edits.py`).

- Autoencoder of `shapes-sd`. Text encoder and UNet start from its weights.
- {options.steps:,} steps of {BATCH}, v prediction, instruction or image dropped as in InstructPix2Pix. Half precision.
- Default sampler: DPM-Solver++ (2M), {SAMPLER["num_inference_steps"]} steps, guidance {SAMPLER["guidance_scale"]} (none).

Rates on 300 held-out edits, one image each:

| edit | instruction followed | rest preserved | both |
|---|---|---|---|
{table}

Training stopped early: the edits are recognisable, but many change more than they should. Preference pairs can work on that.

| file | bytes | sha256 |
|---|---|---|
{sums}
""")


if __name__ == "__main__":
    main()
