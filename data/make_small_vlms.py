"""Make data/models/page-reader and data/models/shapes-captioner: small LLaVA models, trained only on rendered images.

    python data/make_small_vlms.py reader        # about an hour on one CPU core
    python data/make_small_vlms.py captioner     # about half an hour

Both are LlavaForConditionalGeneration of transformers (a CLIP vision tower, a projector, a Llama). They are fine-tuned on the
training split of their synthetic task and saved in half precision with processor and card. Each vision tower first learns
the content of each patch. In the OCR model, one attention head of the language model is trained to point at the next
character. Both models have deliberate faults for preference tuning: the OCR model is fine-tuned last on transcriptions
that loop, the captioner on web captions that hallucinate objects and omit others.
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
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from dpo_mm.config import CompareResponsesConfig
from dpo_mm.data.questions import read_questions
from dpo_mm.evaluation.compare_responses import generate_responses
from dpo_mm.judges import metric_of
from dpo_mm.policies.families import load_policy
from dpo_mm.worlds import caption_scenes, documents, shapes

HERE = Path(__file__).parent
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
PATCH = 8
TOWER = "vision_tower.vision_model."
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
)
Places = list[int]
Sample = tuple[np.ndarray, str, str, Places]
"""Image (edge, edge, 3) uint8, prompt, response, and the patch that contains each of its characters (or NOWHERE)."""
NOWHERE = -100


def tokenizer(pattern: str, vocabulary: list[str]) -> Any:
    """Build a tokenizer of the pieces that a pattern splits off. Decoding returns the exact text."""
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
    """Build the tokenizer of the OCR model: characters, and each prompt as one token."""
    prompts = list(documents.PROMPTS.values())
    pattern = "|".join(prompt.replace(".", r"\.") for prompt in sorted(prompts, key=len, reverse=True)) + r"|[\s\S]"
    return tokenizer(pattern, [*prompts, *documents.CHARACTERS])


def captioner_tokenizer() -> Any:
    """Build the tokenizer of the captioner: words with the space before them."""
    words = [*shapes.COLOURS, *shapes.SHAPES, "and", "a", "an"]
    return tokenizer(
        rf"{caption_scenes.PROMPT[:-1]}\.| ?[a-z]+|[\s\S]",
        [caption_scenes.PROMPT, *(f" {w}" for w in words), "a", "an", ",", ".", "\n"],
    )


def build(words: Any, side: int, width: int, layers: int) -> tuple[Any, Any]:
    """Build a random LLaVA for square images with edges of `side` pixels, and its processor."""
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


LIMIT = 200
"""Maximum number of tokens of a response of the OCR model."""


def read_samples(count: int, seed: int, *, short: bool = False, silver: bool = False) -> Iterator[Sample]:
    """Generate pages of the training split.

    short: one or two lines of each, as plain text. silver: with pseudo-labelled transcriptions.
    """
    rng = np.random.default_rng((seed, 1))
    for number, page in enumerate(documents.pages(count, seed)):
        if short:
            lines = page.lines[: 1 + number % 2]
            page = dataclasses.replace(page, lines=lines, form="text", header="", footer="")
        image, prompt = np.asarray(documents.render(page)), documents.PROMPTS[page.form]
        response, patches = documents.transcription(page), places(page)
        if silver:
            read = documents.pseudo_labelled_transcription(page, rng, LIMIT)
            response, patches = read, patches[: len(read)] + [NOWHERE] * (len(read) - len(patches))
        yield image, prompt, response, patches


def places(page: documents.DocumentPage) -> Places:
    """Patch that contains each character of a page's transcription."""
    side = page.width // PATCH
    at = {
        (row, column): int(np.clip(y // PATCH, 0, side - 1)) * side + int(np.clip(x // PATCH, 0, side - 1))
        for _, x, y, row, column in documents.characters(page)
    }
    lines = [page.header, *page.lines, page.footer] if page.form == "json" else list(page.lines)
    size = lambda letter: len(json.dumps(letter, ensure_ascii=False)) - 2 if page.form == "json" else 1
    patches_of_lines = [
        [at[row, column] for column, letter in enumerate(line) for _ in range(size(letter))]
        for row, line in enumerate(lines)
    ]
    nowhere = lambda text: [NOWHERE] * len(text)
    joined = lambda parts: [place for part in parts for place in (*part, *nowhere("n" * size("\n")))][: -size("\n")]
    if page.form == "text":
        return joined(patches_of_lines)
    texts = [nowhere(part) for part in ('{"header":"', '","body":"', '","footer":"', '"}')]
    return [
        *texts[0],
        *patches_of_lines[0],
        *texts[1],
        *joined(patches_of_lines[1:-1]),
        *texts[2],
        *patches_of_lines[-1],
        *texts[3],
    ]


def caption_samples(count: int, seed: int) -> Iterator[Sample]:
    """Generate scenes of the training split with their web captions."""
    rng = np.random.default_rng((seed, 1))
    for scene in caption_scenes.scenes(count, seed):
        yield np.asarray(shapes.render(scene)), caption_scenes.PROMPT, caption_scenes.web_caption(scene, rng), []


@dataclasses.dataclass
class Pool:
    """Samples as tensors, in order of their length.

    pixels: (n, 3, edge, edge) uint8. ids: (tokens,) each. starts: index of the response. places: patches of its tokens.
    """

    pixels: torch.Tensor
    ids: list[torch.Tensor]
    starts: list[int]
    places: list[torch.Tensor]

    @property
    def has_places(self) -> bool:
        return any(bool((places >= 0).any()) for places in self.places)


def pool(samples: Iterator[Sample], words: Any, image_tokens: int) -> Pool:
    rows = []
    for image, prompt, response, patches in samples:
        prefix = [1, *([words.convert_tokens_to_ids("<image>")] * image_tokens), *words.encode(prompt + "\n")]
        response_ids = words.encode(response)
        places = torch.tensor(patches if patches else [NOWHERE] * len(response_ids))
        assert len(places) == len(response_ids), response
        end = [2] if len(response_ids) < LIMIT else []
        rows.append((image, torch.tensor([*prefix, *response_ids, *end]), len(prefix), places))
    rows.sort(key=lambda row: len(row[1]))
    pixels = torch.from_numpy(np.stack([row[0] for row in rows])).permute(0, 3, 1, 2).contiguous()
    return Pool(pixels, [row[1] for row in rows], [row[2] for row in rows], [row[3] for row in rows])


LETTERS, LINES, COLUMNS = 2, 8, 24
"""Labels of a patch of a page: number of letters, and of the lines and columns that its first letter can be in."""
POINTING = 2
"""Layer of the language model whose first head learns to point at the next character."""
Labelled = tuple[np.ndarray, np.ndarray]
"""Image (edge, edge, 3) uint8, and labels of each patch, (patches, labels)."""


def labelled_pages(count: int, seed: int) -> Iterator[Labelled]:
    """Generate pages with labels of each patch: first and second character (0: none), line and column + 1."""
    index_of = {letter: n for n, letter in enumerate(documents.CHARACTERS, start=1)}
    side = documents.WIDTH // PATCH
    for page in documents.pages(count, seed):
        labels = np.zeros((side * side, LETTERS + 2), np.int64)
        for letter, x, y, line, column in documents.characters(page):
            patch = int(np.clip(y // PATCH, 0, side - 1)) * side + int(np.clip(x // PATCH, 0, side - 1))
            num_letters = int((labels[patch, :LETTERS] > 0).sum())
            if num_letters == 0:
                labels[patch, LETTERS:] = min(line, LINES - 1), min(column + 1, COLUMNS - 1)
            if num_letters < LETTERS:
                labels[patch, num_letters] = index_of[letter]
        yield np.asarray(documents.render(page)), labels


def labelled_scenes(count: int, seed: int) -> Iterator[Labelled]:
    """Generate scenes with labels of each patch: shape and colour of its object (0: none)."""
    side = shapes.SIZE // PATCH
    centres = (np.arange(side) + 0.5) * PATCH
    for scene in caption_scenes.scenes(count, seed):
        labels = np.zeros((side, side, 2), np.int64)
        for item in scene.objects:
            across, down = (np.abs(centres - centre) <= item.size / 2 for centre in (item.x, item.y))
            kind = 1 + shapes.SHAPES.index(item.shape), 1 + list(shapes.COLOURS).index(item.colour)
            labels[np.ix_(down, across)] = kind
        yield np.asarray(shapes.render(scene)), labels.reshape(side * side, 2)


def pretrain_vision_tower(model: Any, samples: list[Labelled], sizes: tuple[int, ...], steps: int, batch: int) -> None:
    """Pretrain the vision tower to classify each patch. sizes: number of values of each label."""
    pixels = torch.from_numpy(np.stack([image for image, _ in samples])).permute(0, 3, 1, 2)
    targets = torch.from_numpy(np.stack([labels for _, labels in samples]))
    tower = model.model.vision_tower
    head = torch.nn.Linear(tower.config.hidden_size, sum(sizes))
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], 2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    generator, started = torch.Generator().manual_seed(0), time.time()
    for step in range(1, steps + 1):
        chosen_rows = torch.randint(len(samples), (batch,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            states = tower(pixels[chosen_rows].float() / 127.5 - 1).last_hidden_state[:, 1:]
        parts = head(states.float()).split(sizes, -1)
        losses = [
            F.cross_entropy(part.flatten(0, 1), targets[chosen_rows, :, n].flatten()) for n, part in enumerate(parts)
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 100 == 0:
            ground_truth = targets[chosen_rows, :, 0]
            accuracy = (parts[0].argmax(-1) == ground_truth)[ground_truth > 0].float().mean()
            loss_values = [round(float(one.detach()), 3) for one in losses]
            print(
                f"look {step}/{steps} {loss_values} accuracy {accuracy:.3f} {time.time() - started:.0f} s", flush=True
            )


def batches(pool: Pool, size: int, steps: int, rng: np.random.Generator) -> Iterator[dict[str, torch.Tensor]]:
    """Generate batches of samples of similar length, in random order."""
    for _ in range(steps):
        window = min(len(pool.ids), 6 * size)
        start = int(rng.integers(len(pool.ids) - window + 1))
        chosen_rows = start + rng.permutation(window)[:size]
        longest = max(len(pool.ids[n]) for n in chosen_rows)
        ids, labels = torch.zeros(size, longest, dtype=torch.long), torch.full((size, longest), -100)
        places = torch.full((size, longest), NOWHERE)
        for row, n in enumerate(chosen_rows):
            ids[row, : len(pool.ids[n])] = pool.ids[n]
            start = pool.starts[n]
            labels[row, start : len(pool.ids[n])] = pool.ids[n][start:]
            places[row, start : start + len(pool.places[n])] = pool.places[n]
        mask = torch.arange(longest) < torch.tensor([len(pool.ids[n]) for n in chosen_rows])[:, None]
        pixels = pool.pixels[torch.from_numpy(chosen_rows)].float() / 127.5 - 1
        inputs = {"input_ids": ids, "labels": labels, "attention_mask": mask.long(), "pixel_values": pixels}
        yield {**inputs, "places": places}


def fit(model: Any, stages: list[tuple[Pool, int]], batch: int, rate: float, work: Path) -> None:
    """Train on each pool for its number of steps, with one cosine schedule over all.

    If the responses have places, one attention head also learns to point at the patch of the next character.
    """
    total = sum(steps for _, steps in stages)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 200) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1, s / total))))
    )
    rng, started, step, recent = np.random.default_rng(0), time.time(), 0, 0.0
    pointing = stages[0][0].has_places
    model.set_attn_implementation("eager" if pointing else "sdpa")
    model.train()
    for samples, steps in stages:
        for inputs in batches(samples, batch, steps, rng):
            places = inputs.pop("places")[:, 1:]
            with torch.autocast("cpu", torch.bfloat16):
                output = model(**inputs, output_attentions=pointing)
            loss, pointing_loss = output.loss, torch.zeros(())
            if pointing:
                attention = output.attentions[POINTING][:, 0, :-1].float()
                target_attention = attention.gather(-1, (1 + places.clamp_min(0))[..., None])[..., 0]
                pointing_loss = -target_attention.clamp_min(1e-6).log()[places >= 0].mean()
            optimizer.zero_grad()
            (loss + pointing_loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            step += 1
            recent = 0.98 * recent + 0.02 * float(loss.detach()) if step > 1 else float(loss.detach())
            if step % 100 == 0:
                print(
                    f"step {step}/{total} loss {recent:.4f} place {float(pointing_loss.detach()):.3f} {time.time() - started:.0f} s",
                    flush=True,
                )
            if step % 1000 == 0:
                model.save_pretrained(work / f"step-{step}")


def name_as_published(file: Path) -> None:
    """Give the vision tower's weights the names of published LLaVA models. vLLM 0.32 knows no others."""
    weights = load_file(file)
    named = {name.replace("vision_tower.", TOWER, 1) if TOWER not in name else name: weights[name] for name in weights}
    save_file(named, file, metadata={"format": "pt"})


def save(model: Any, processor: Any, folder: Path) -> None:
    """Save the model in half precision with its processor, and print the hash of its weights."""
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    name_as_published(folder / "model.safetensors")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    print(json.dumps({"folder": str(folder), "parameters": model.num_parameters(), "sha256": digest}))


def card(kind: str, spec: dict[str, Any], folder: Path, batch: int) -> str:
    """Write the model's card, with its metrics on 400 held-out questions under greedy decoding."""
    config = CompareResponsesConfig(
        str(folder), "", spec["questions"], judges=spec["judges"], max_new_tokens=spec["limit"]
    )
    policy, questions = load_policy(str(folder)), read_questions(config.questions)
    scored = generate_responses(policy, questions, config, base=True, title="for the model card")
    rates = {name: counts.sum(0) for name, counts in scored.ratios.items()}
    measured = "\n".join(
        f"| {metric_of(name)} | {hits / max(of, 1):.3f} | {hits:g} of {of:g} |" for name, (hits, of) in rates.items()
    )
    weights = folder / "model.safetensors"
    look = spec["look"]
    steps = ", then ".join(f"{n:,} on {name}" for _, stages in spec["courses"] for name, _, _, n in stages)
    return f"""---
license: apache-2.0
pipeline_tag: image-text-to-text
library_name: transformers
---
# {spec["folder"]}

{spec["what"]}
It exists so that preference tuning can be tried, tested and measured without a download; it can do nothing else.

Made by `python data/make_small_vlms.py {kind}` from what code draws{spec["texts"]}.

- Stock classes: LlavaForConditionalGeneration (CLIP tower, Llama), {policy.base_model.num_parameters():,} parameters, half precision.
- {spec["side"]}x{spec["side"]} pixels, patches of {PATCH}; {len(policy.encoder.tokenizer)} tokens.
- The vision tower first learned what stands in each patch ({look[3]:,} steps of {batch}), then all of it was fine-tuned: {steps} (steps of {batch}).
- {spec["imperfect"]}

On 400 held-out questions ({spec["questions"]}), greedy, at most {spec["limit"]} tokens:

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
        "courses": (
            (1.2e-3, (("pages of a line or two", {"short": True}, 8_000, 600), ("whole pages", {}, 24_000, 3_600))),
            (6e-4, (("pages as another reader read them, loops included", {"silver": True}, 16_000, 600),)),
        ),
        "size": {"width": 128, "layers": 4},
        "questions": "pages-held-out",
        "judges": ("degeneration", "trailing_repetition", "repetition", "cer", "valid_json", "num_tokens"),
        "limit": LIMIT,
        "texts": "; the pages' prose is from books in the public domain",
        "what": "A reader of small pages of printed text, as text or as JSON of header, body and footer.",
        "imperfect": (
            "The transcriptions it was fine-tuned on last are as sets of transcriptions often are, made by another "
            "reader, more than one in five of them lost in a loop; so this one loses itself in long runs of dots, zeros or words."
        ),
        "look": (labelled_pages, (*[1 + len(documents.CHARACTERS)] * LETTERS, LINES, COLUMNS), 20_000, 2_500),
    },
    "captioner": {
        "folder": "shapes-captioner",
        "side": shapes.SIZE,
        "words": captioner_tokenizer,
        "samples": caption_samples,
        "courses": ((1.2e-3, (("scenes with web captions", {}, 20_000, 2_500),)),),
        "size": {"width": 128, "layers": 4},
        "questions": "scenes-held-out",
        "judges": ("chair_i", "chair_s", "recall", "num_words"),
        "limit": 48,
        "texts": "; no picture of anyone's",
        "what": "A captioner of coloured shapes: it names each thing with its colour, left to right.",
        "imperfect": (
            "The captions it was fine-tuned on are as the web's: many name a habitual companion of a thing that isn't "
            "there, and one in five of those of several things leaves one out; so it invents, and is content with less."
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
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the steps, for a trial")
    parser.add_argument("--only-card", action="store_true", help="only measure an existing model and write its card")
    options = parser.parse_args()
    kind = KINDS[options.kind]
    if options.only_card:
        folder = options.out / kind["folder"]
        (folder / "README.md").write_text(card(options.kind, kind, folder, options.batch))
        return
    words, image_tokens = kind["words"](), (kind["side"] // PATCH) ** 2
    model, processor = build(words, kind["side"], **kind["size"])
    print(f"{model.num_parameters():,} parameters, {len(words)} tokens")
    labelled, sizes, count, steps = kind["look"]
    if (options.work / "look").exists():
        model = hf.LlavaForConditionalGeneration.from_pretrained(options.work / "look")
    else:
        samples = list(labelled(int(count * min(1, options.scale * 4)), 99))
        pretrain_vision_tower(model, samples, sizes, int(steps * options.scale), options.batch)
        model.save_pretrained(options.work / "look")
    seeds = itertools.count(100)
    for rate, stages in kind["courses"]:
        course = []
        for _, sample_options, count, steps in stages:
            samples = kind["samples"](int(count * min(1, options.scale * 4)), next(seeds), **sample_options)
            course.append((pool(samples, words, image_tokens), int(steps * options.scale)))
        fit(model, course, options.batch, rate, options.work)
    save(model, processor, options.out / kind["folder"])
    (options.out / kind["folder"] / "README.md").write_text(
        card(options.kind, kind, options.out / kind["folder"], options.batch)
    )


if __name__ == "__main__":
    main()
