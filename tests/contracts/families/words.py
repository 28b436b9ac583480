"""Prompts of the tests, and real tokenizers that are trained on them."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram
from tokenizers.pre_tokenizers import Metaspace, WhitespaceSplit
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import CLIPTokenizer, T5TokenizerFast

WORDS = ["a red circle", "two blue squares left of a green star", "an orange cross above a yellow triangle"]


def clip_tokenizer(folder: Path, *, length: int = 16) -> CLIPTokenizer:
    """A CLIP tokenizer trained on WORDS."""
    folder.mkdir(parents=True, exist_ok=True)
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = WhitespaceSplit()
    bpe.train_from_iterator(WORDS, BpeTrainer(vocab_size=120, end_of_word_suffix="</w>", show_progress=False))
    # The trainer breaks ties by a random hash, so ids and the order of merges are sorted: each process makes one model.
    vocabulary = {token: number for number, token in enumerate(sorted(bpe.get_vocab()))}
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary.setdefault(token, len(vocabulary))
    bpe.model.save(str(folder))
    lines = (folder / "merges.txt").read_text().splitlines()
    merges = sorted(
        (tuple(line.split()) for line in lines if not line.startswith("#")), key=lambda pair: (len("".join(pair)), pair)
    )
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer trained on WORDS, without sentencepiece."""
    special = ["<pad>", "</s>", "<unk>"]
    pieces = Tokenizer(Unigram())
    pieces.pre_tokenizer = Metaspace()
    pieces.train_from_iterator(
        WORDS, UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    vocabulary = json.loads(pieces.to_str())["model"]["vocab"]
    known = {piece: round(score, 3) for piece, score in vocabulary}
    learned = sorted(
        set(known) - set(special), key=lambda piece: (-known[piece], piece)
    )  # ties have no order of their own
    return T5TokenizerFast(vocab=[(piece, known[piece]) for piece in (*special, *learned)], extra_ids=0)
