"""Make data/models/sums-writer: a tiny Llama that does arithmetic, trained only on generated text.

    python data/make_sums_writer.py        # about two minutes on one CPU core

A LlamaForCausalLM of transformers over single characters, trained on noisy notes (`dpo_mm.worlds.sums`). It forgets carries and
writes equations that cannot be evaluated. Preference tuning with a judge that evaluates the
responses is meant to correct both.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from dpo_mm.worlds import sums

FOLDER = Path(__file__).parent / "models" / "sums-writer"
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
)
WIDTH, LAYERS, BATCH, RATE = 64, 2, 128, 4e-3


def tokenizer() -> Any:
    """Build a tokenizer of single characters."""
    pieces = dict.fromkeys([*SPECIAL, *sums.CHARACTERS, "\n"])
    inner = Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(pieces)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = hf.PreTrainedTokenizerFast(tokenizer_object=inner, **names, clean_up_tokenization_spaces=False)
    words.chat_template = TEMPLATE
    return words


def build(words: Any) -> Any:
    """Build a random Llama for the tokenizer's characters."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    model = hf.LlamaForCausalLM(config)
    model.generation_config = hf.GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return model


def batch(words: Any, notes: list[sums.Sum], rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of notes, (notes, tokens) each. The loss ignores prompts and padding."""
    ids_of = lambda text: words.convert_tokens_to_ids(list(text))
    rows = [(ids_of(f"{one.prompt}\n"), ids_of(sums.noisy_answer(one, rng))) for one in notes]
    width = max(len(prompt) + len(answer) for prompt, answer in rows) + 2
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for row, (prompt, answer) in enumerate(rows):
        tokens = torch.tensor([1, *prompt, *answer, 2])
        ids[row, : len(tokens)] = tokens
        labels[row, 1 + len(prompt) : len(tokens)] = tokens[1 + len(prompt) :]
    return ids, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    words = tokenizer()
    model, notes = build(words), list(sums.sums(10**6, 0))
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.01)
    cosine = lambda step: min(1, (step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / options.steps)))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
    rng, started = np.random.default_rng(0), time.process_time()
    for step in range(1, options.steps + 1):
        ids, labels = batch(words, [notes[n] for n in rng.integers(len(notes), size=BATCH)], rng)
        loss = model(input_ids=ids, labels=labels, attention_mask=(ids > 0).long()).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 200 == 0:
            print(
                f"step {step}/{options.steps} loss {loss.item():.4f} {time.process_time() - started:.0f} s", flush=True
            )
    model.half().save_pretrained(options.out)
    words.save_pretrained(options.out)
    digest = hashlib.sha256((options.out / "model.safetensors").read_bytes()).hexdigest()
    print(f"{model.num_parameters():,} parameters, sha256 {digest}")


if __name__ == "__main__":
    main()
