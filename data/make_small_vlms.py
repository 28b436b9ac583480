"""Make data/models/page-reader and data/models/shapes-captioner: small LLaVA models, from nothing but code.

    python data/make_small_vlms.py reader        # about an hour on one CPU core
    python data/make_small_vlms.py captioner     # about half an hour

Both are stock LlavaForConditionalGeneration (a CLIP vision tower, a projector, a Llama), fine-tuned on the training
side of their world alone, and saved in half precision with processor and card. Each vision tower first learns what stands in
each patch; the reader then begins with pages of a line or two. Neither is finished: the reader stops before it is reliable, the captioner learns from web captions that
name things which aren't there. That is what preference tuning is for.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from dpo_mm.config import CompareAnswersConfig
from dpo_mm.evaluation.compare_answers import ask
from dpo_mm.judges import metric_of
from dpo_mm.policies.protocol import load_policy
from dpo_mm.questions import read_questions
from dpo_mm.worlds import captions, documents, shapes

HERE = Path(__file__).parent
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
PATCH = 8
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
)
Sample = tuple[np.ndarray, str, str]
"""Picture (side, side, 3) uint8, prompt, answer."""


def tokenizer(pattern: str, vocabulary: list[str]) -> Any:
    """A tokenizer of the pieces that the pattern cuts; it decodes to the very text."""
    pieces = dict.fromkeys([*SPECIAL, *vocabulary])
    inner = Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(pieces)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    inner.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        **names,
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )


def reader_tokenizer() -> Any:
    """Characters, and each prompt as one token."""
    prompts = list(documents.PROMPTS.values())
    pattern = "|".join(prompt.replace(".", r"\.") for prompt in sorted(prompts, key=len, reverse=True)) + r"|[\s\S]"
    return tokenizer(pattern, [*prompts, *documents.CHARACTERS])


def captioner_tokenizer() -> Any:
    """Words with the space before them."""
    words = [*shapes.COLOURS, *shapes.SHAPES, "and", "a", "an"]
    return tokenizer(
        rf"{captions.PROMPT[:-1]}\.| ?[a-z]+|[\s\S]",
        [captions.PROMPT, *(f" {w}" for w in words), "a", "an", ",", ".", "\n"],
    )


def build(words: Any, side: int, width: int, layers: int) -> tuple[Any, Any]:
    """A random LLaVA for square pictures of `side` pixels, and its processor."""
    torch.manual_seed(0)
    size = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 32}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**size, intermediate_size=4 * width, image_size=side, patch_size=PATCH),
        text_config=hf.LlamaConfig(
            **size,
            intermediate_size=3 * width,
            vocab_size=len(words),
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=True,
        ),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        image_seq_length=(side // PATCH) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    shape = {"height": side, "width": side}
    pixels = hf.CLIPImageProcessor(
        size=shape, crop_size=shape, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    )
    processor = hf.LlavaProcessor(
        pixels,
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    model = hf.LlavaForConditionalGeneration(config)
    model.generation_config = hf.GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return model, processor


def read_samples(count: int, seed: int, *, short: bool) -> Iterator[Sample]:
    """Pages of the training side; short: a line or two of each, as plain text."""
    for number, page in enumerate(documents.pages(count, seed)):
        if short:
            lines = page.lines[: 1 + number % 2]
            page = dataclasses.replace(page, lines=lines, form="text", header="", footer="")
        yield np.asarray(documents.render(page)), documents.PROMPTS[page.form], documents.transcription(page)


def caption_samples(count: int, seed: int, *, short: bool) -> Iterator[Sample]:
    """Scenes of the training side with their web captions; short: those of one thing."""
    rng = np.random.default_rng((seed, 1))
    every = captions.scenes(count * 8, seed)
    for scene in itertools.islice((s for s in every if len(s.things) == 1 or not short), count):
        yield np.asarray(shapes.render(scene)), captions.PROMPT, captions.web_caption(scene, rng)


@dataclasses.dataclass
class Pool:
    """Samples as tensors, in order of their length: pixels (n, 3, side, side) uint8, ids and where the answer starts."""

    pixels: torch.Tensor
    ids: list[torch.Tensor]
    starts: list[int]


def pool(samples: Iterator[Sample], words: Any, image_tokens: int) -> Pool:
    rows = []
    for picture, prompt, answer in samples:
        before = [1, *([words.convert_tokens_to_ids("<image>")] * image_tokens), *words.encode(prompt + "\n")]
        rows.append((picture, torch.tensor([*before, *words.encode(answer), 2]), len(before)))
    rows.sort(key=lambda row: len(row[1]))
    pixels = torch.from_numpy(np.stack([row[0] for row in rows])).permute(0, 3, 1, 2).contiguous()
    return Pool(pixels, [row[1] for row in rows], [row[2] for row in rows])


LETTERS, LINES, COLUMNS = 2, 8, 24
"""Of a patch of a page: letters told apart, and the lines and columns that its first one can stand in."""
Labelled = tuple[np.ndarray, np.ndarray]
"""Picture (side, side, 3) uint8, and what stands in each patch, (patches, labels)."""


def labelled_pages(count: int, seed: int) -> Iterator[Labelled]:
    """Pages, and of each patch its first and second character (0: none), line and column + 1."""
    place = {letter: n for n, letter in enumerate(documents.CHARACTERS, start=1)}
    side = documents.WIDTH // PATCH
    for page in documents.pages(count, seed):
        found = np.zeros((side * side, LETTERS + 2), np.int64)
        for letter, x, y, line, column in documents.characters(page):
            at = int(np.clip(y // PATCH, 0, side - 1)) * side + int(np.clip(x // PATCH, 0, side - 1))
            nth = int((found[at, :LETTERS] > 0).sum())
            if nth == 0:
                found[at, LETTERS:] = min(line, LINES - 1), min(column + 1, COLUMNS - 1)
            if nth < LETTERS:
                found[at, nth] = place[letter]
        yield np.asarray(documents.render(page)), found


def labelled_scenes(count: int, seed: int) -> Iterator[Labelled]:
    """Scenes, and of each patch the shape and colour of the thing there (0: none)."""
    side = shapes.SIZE // PATCH
    middles = (np.arange(side) + 0.5) * PATCH
    for scene in captions.scenes(count, seed):
        found = np.zeros((side, side, 2), np.int64)
        for thing in scene.things:
            across, down = (np.abs(middles - middle) <= thing.size / 2 for middle in (thing.x, thing.y))
            kind = 1 + shapes.SHAPES.index(thing.shape), 1 + list(shapes.COLOURS).index(thing.colour)
            found[np.ix_(down, across)] = kind
        yield np.asarray(shapes.render(scene)), found.reshape(side * side, 2)


def look_first(model: Any, samples: list[Labelled], sizes: tuple[int, ...], steps: int, batch: int) -> None:
    """The vision tower learns what stands in each patch, before a word is said. sizes: values of each label."""
    pixels = torch.from_numpy(np.stack([picture for picture, _ in samples])).permute(0, 3, 1, 2)
    targets = torch.from_numpy(np.stack([labels for _, labels in samples]))
    tower = model.model.vision_tower
    head = torch.nn.Linear(tower.config.hidden_size, sum(sizes))
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], 2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    generator, started = torch.Generator().manual_seed(0), time.time()
    for step in range(1, steps + 1):
        picked = torch.randint(len(samples), (batch,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            states = tower(pixels[picked].float() / 127.5 - 1).last_hidden_state[:, 1:]
        parts = head(states.float()).split(sizes, -1)
        losses = [F.cross_entropy(part.flatten(0, 1), targets[picked, :, n].flatten()) for n, part in enumerate(parts)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if step % 100 == 0:
            truth = targets[picked, :, 0]
            right = (parts[0].argmax(-1) == truth)[truth > 0].float().mean()
            shown = [round(float(one.detach()), 3) for one in losses]
            print(f"look {step}/{steps} {shown} right {right:.3f} {time.time() - started:.0f} s", flush=True)


def batches(pool: Pool, size: int, steps: int, rng: np.random.Generator) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of samples of about one length, in random order."""
    for _ in range(steps):
        window = min(len(pool.ids), 6 * size)
        start = int(rng.integers(len(pool.ids) - window + 1))
        picked = start + rng.permutation(window)[:size]
        longest = max(len(pool.ids[n]) for n in picked)
        ids, labels = torch.zeros(size, longest, dtype=torch.long), torch.full((size, longest), -100)
        for row, n in enumerate(picked):
            ids[row, : len(pool.ids[n])] = pool.ids[n]
            labels[row, pool.starts[n] : len(pool.ids[n])] = pool.ids[n][pool.starts[n] :]
        mask = torch.arange(longest) < torch.tensor([len(pool.ids[n]) for n in picked])[:, None]
        pixels = pool.pixels[torch.from_numpy(picked)].float() / 127.5 - 1
        yield {"input_ids": ids, "labels": labels, "attention_mask": mask.long(), "pixel_values": pixels}


def fit(model: Any, stages: list[tuple[Pool, int]], batch: int, rate: float, work: Path) -> None:
    """Train on each pool for its number of steps, one cosine over all."""
    total = sum(steps for _, steps in stages)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.01)
    learning = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 200) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1, s / total))))
    )
    rng, started, step, recent = np.random.default_rng(0), time.time(), 0, 0.0
    model.train()
    for samples, steps in stages:
        for inputs in batches(samples, batch, steps, rng):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**inputs).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            learning.step()
            step += 1
            recent = 0.98 * recent + 0.02 * float(loss.detach()) if step > 1 else float(loss.detach())
            if step % 100 == 0:
                print(f"step {step}/{total} loss {recent:.4f} {time.time() - started:.0f} s", flush=True)
            if step % 1000 == 0:
                model.save_pretrained(work / f"step-{step}")


def save(model: Any, processor: Any, folder: Path) -> None:
    """The model in half precision, its processor, and the hash of its weights."""
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    print(json.dumps({"folder": str(folder), "parameters": model.num_parameters(), "sha256": digest}))


def card(kind: str, given: dict[str, Any], folder: Path, batch: int) -> str:
    """The model's card, with what it does on 400 held-out questions at greedy decoding."""
    config = CompareAnswersConfig(
        str(folder), "", given["questions"], judges=given["judges"], max_new_tokens=given["limit"]
    )
    policy, questions = load_policy(str(folder)), read_questions(config.questions)
    found = ask(policy, questions, config, base=True, title="asking for the card")
    rates = {name: shares.sum(0) for name, shares in found.shares.items()}
    measured = "\n".join(
        f"| {metric_of(name)} | {hits / max(of, 1):.3f} | {hits:g} of {of:g} |" for name, (hits, of) in rates.items()
    )
    weights = folder / "model.safetensors"
    look, stages = given["look"], given["stages"]
    steps = " then ".join(f"{n:,} on {'short' if short else 'whole'} ones" for short, _, n in stages)
    return f"""---
license: apache-2.0
pipeline_tag: image-text-to-text
library_name: transformers
---
# {given["folder"]}

{given["what"]}
It exists so that preference tuning can be tried, tested and measured without a download; it can do nothing else.

Made by `python data/make_small_vlms.py {kind}` from what code draws; no picture or page of anyone's.

- Stock classes: LlavaForConditionalGeneration (CLIP tower, Llama), {policy.core.num_parameters():,} parameters, half precision.
- {given["side"]}x{given["side"]} pixels, patches of {PATCH}; {len(policy.rows.tokenizer)} tokens.
- The vision tower first learned what stands in each patch ({look[3]:,} steps of {batch}), then all of it was fine-tuned: {steps} (steps of {batch}).
- {given["imperfect"]}

On 400 held-out questions ({given["questions"]}), greedy, at most {given["limit"]} tokens:

| measure | value | count |
|---|---|---|
{measured}

| file | bytes | sha256 |
|---|---|---|
| {weights.name} | {weights.stat().st_size:,} | `{hashlib.sha256(weights.read_bytes()).hexdigest()}` |
"""


KINDS: dict[str, dict[str, Any]] = {
    "reader": {
        "folder": "page-reader",
        "side": documents.WIDTH,
        "words": reader_tokenizer,
        "samples": read_samples,
        "stages": ((True, 8_000, 800), (False, 30_000, 4_000)),
        "size": {"width": 128, "layers": 4},
        "rate": 1.2e-3,
        "questions": "pages-held-out",
        "judges": ("degeneration", "runaway", "repetition", "cer", "valid_json", "tokens"),
        "limit": 200,
        "what": "A reader of small pages of printed text, as text or as JSON of header, body and footer.",
        "imperfect": "Stopped here on purpose: it reads most pages and loses itself in loops on some, as readers do.",
        "look": (labelled_pages, (*[1 + len(documents.CHARACTERS)] * LETTERS, LINES, COLUMNS), 20_000, 2_500),
    },
    "captioner": {
        "folder": "shapes-captioner",
        "side": shapes.SIZE,
        "words": captioner_tokenizer,
        "samples": caption_samples,
        "stages": ((False, 20_000, 2_500),),
        "size": {"width": 128, "layers": 4},
        "rate": 1.2e-3,
        "questions": "scenes-held-out",
        "judges": ("chair_i", "chair_s", "recall", "words"),
        "limit": 48,
        "what": "A captioner of coloured shapes: it names each thing with its colour, left to right.",
        "imperfect": (
            "Its captions are as the web's: about three in ten name a companion of what is there that isn't there, "
            "and so it invents. That is what preference tuning is for."
        ),
        "look": (labelled_scenes, (1 + len(shapes.SHAPES), 1 + len(shapes.COLOURS)), 15_000, 2_000),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--work", type=Path, default=Path("work-vlm"))
    parser.add_argument("--out", type=Path, default=HERE / "models")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps, for a trial")
    parser.add_argument("--only-card", action="store_true", help="measure what is there and write its card")
    given = parser.parse_args()
    kind = KINDS[given.kind]
    if given.only_card:
        folder = given.out / kind["folder"]
        (folder / "README.md").write_text(card(given.kind, kind, folder, given.batch))
        return
    words, image_tokens = kind["words"](), (kind["side"] // PATCH) ** 2
    model, processor = build(words, kind["side"], **kind["size"])
    print(f"{model.num_parameters():,} parameters, {len(words)} tokens")
    labelled, sizes, count, steps = kind["look"]
    samples = list(labelled(int(count * min(1, given.scale * 4)), 99))
    look_first(model, samples, sizes, int(steps * given.scale), given.batch)
    model.save_pretrained(given.work / "look")
    stages = []
    for seed, (short, count, steps) in enumerate(kind["stages"]):
        samples = kind["samples"](int(count * min(1, given.scale * 4)), 100 + seed, short=short)
        stages.append((pool(samples, words, image_tokens), int(steps * given.scale)))
    fit(model, stages, given.batch, kind["rate"], given.work)
    save(model, processor, given.out / kind["folder"])
    (given.out / kind["folder"] / "README.md").write_text(
        card(given.kind, kind, given.out / kind["folder"], given.batch)
    )


if __name__ == "__main__":
    main()
