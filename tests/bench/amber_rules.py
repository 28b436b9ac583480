"""Compare the judges of AMBER with its published code on made-up descriptions, one by one.

    git clone https://github.com/junyangwang0410/AMBER
    python -m tests.bench.amber_rules --amber AMBER --out docs/benchmarks/amber-rules.json   # 1 minute

A description names objects of an image of AMBER, words that AMBER associates with them, hallucinations that it lists, and other
words, in singular and plural. If data of NLTK is missing, spaCy splits, tags and lemmatises the words for both sides. `--model`
names another spaCy model than the published one. So the counts can be compared without the published data, but not their size.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import nltk
import spacy

from dpo_mm.data.schema import Response
from dpo_mm.judges import judge_card, load_judge
from dpo_mm.judges.benchmarks.amber_words import SPACY_MODEL

JUDGES = {"CHAIR": "amber_chair", "Cover": "amber_cover", "Hal": "amber_hal", "Cog": "amber_cog"}
DESCRIPTIONS = 500
SENTENCES = (
    "The image shows {a} and {b} near {c}.",
    "In the foreground, {a} is standing next to {b}, while {c} can be seen behind.",
    "There are {a}, {b} and {c}.",
    "{a} is on the left. It looks bright and {c} lights the scene.",
    "Overall, the scene has {a}; {b} adds to the atmosphere.",
    "A person might walk past {a} to reach {b}.",
)
OTHERS = "atmosphere scene kitten sofa lorry puppy bicycle rocks ladies boys seaside meadow Kids skyline ship waves image".split()  # noqa: SIM905


def describe(entry: dict[str, Any], relations: dict[str, list[str]], rng: random.Random) -> str:
    """Make up a description of an image."""
    right = [other for word in entry["truth"] for other in (word, word, *relations[word])]
    listed = [other for word in entry["hallu"] for other in (word, word, *relations[word])]
    others = [*OTHERS, *rng.sample(sorted(relations), 10)]

    def phrase() -> str:
        word = rng.choice(rng.choices((right, listed, others), (6, 2, 2))[0])
        plural = rng.random() < 0.25
        return (
            f"{rng.choice(('two', 'many', 'some'))} {word}s"
            if plural
            else f"{rng.choice(('a', 'the', 'a large', 'one'))} {word}"
        )

    return " ".join(
        sentence.format(a=phrase(), b=phrase(), c=phrase()) for sentence in rng.choices(SENTENCES, k=rng.randint(1, 5))
    )


def stand_in_nltk(language: Any) -> bool:
    """Let spaCy do the work of NLTK if its data is missing. Return if it does."""
    try:
        nltk.pos_tag(nltk.word_tokenize("a dog"))
        nltk.stem.WordNetLemmatizer().lemmatize("dogs")
        return False
    except LookupError:
        pass
    document = lambda words: language(spacy.tokens.Doc(language.vocab, words=list(words)))
    nltk.word_tokenize = lambda text: [token.text for token in language.make_doc(text) if not token.is_space]
    nltk.pos_tag = lambda words: [(token.text, token.tag_) for token in document(words)]
    lemma = functools.cache(lambda word: document(["two", word])[1].lemma_)
    nltk.stem.WordNetLemmatizer.lemmatize = lambda self, word, pos="n": lemma(word)
    return True


def published_figures(amber: Path, language: Any, folder: Path) -> Any:
    """A function (id, text) -> the four figures that the published code prints for one description."""
    spacy.load = lambda name: functools.cache(language)
    spec = importlib.util.spec_from_file_location("amber_inference", amber / "inference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.tqdm = lambda rows: rows
    annotations = json.loads((amber / "data" / "annotations.json").read_text(encoding="utf-8"))
    one, responses = folder / "annotations.json", folder / "responses.json"
    data = amber / "data"
    flags = [
        "--word_association",
        data / "relation.json",
        "--safe_words",
        data / "safe_words.txt",
        "--metrics",
        data / "metrics.txt",
    ]
    sys.argv = [
        "inference.py",
        *map(str, flags),
        "--annotation",
        str(one),
        "--inference_data",
        str(responses),
        "--evaluation_type",
        "g",
    ]
    module.args = module.get_args()

    def figures(number: int, text: str) -> dict[str, float]:
        one.write_text(json.dumps([annotations[number]]), encoding="utf-8")
        responses.write_text(json.dumps([{"id": 1, "response": text}]), encoding="utf-8")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            module.main(module.args)
        pairs = [
            line.split(":")
            for line in printed.getvalue().splitlines()
            if line.count(":") == 1 and line.split(":")[1].strip()
        ]
        return {name: float(value) for name, value in pairs}

    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--amber", type=Path, required=True, help="checkout of the published code")
    parser.add_argument("--model", default=SPACY_MODEL, help="name or folder of a spaCy model")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    language, rng, data = spacy.load(arguments.model), random.Random(0), arguments.amber / "data"
    has_stand_in = stand_in_nltk(language)
    published = {figure: f"{name}:{arguments.model}@{data}" for figure, name in JUDGES.items()}
    judges = {figure: load_judge(name) for figure, name in published.items()}
    by_lists = {figure: load_judge(f"{name}_words@{data}") for figure, name in JUDGES.items()}
    figures = published_figures(arguments.amber.resolve(), language, Path(tempfile.mkdtemp()))
    relations = json.loads((data / "relation.json").read_text(encoding="utf-8"))
    entries = json.loads((data / "annotations.json").read_text(encoding="utf-8"))
    numbers = rng.sample([n for n, entry in enumerate(entries) if entry["type"] == "generative"], DESCRIPTIONS)
    texts = [describe(entries[number], relations, rng) for number in numbers]
    responses = [Response(text, 1, hit_limit=False) for text in texts]
    truths = [json.dumps({name: entries[number][name] for name in ("truth", "hallu")}) for number in numbers]
    expected = [figures(number, text) for number, text in zip(numbers, texts, strict=True)]
    measured: dict[str, Any] = {
        "command": f"python -m tests.bench.amber_rules --amber AMBER --model {language.meta['lang']}_{language.meta['name']}",
        "words": {
            name: value
            for name, value in judge_card(published["Hal"]).items()
            if name in ("model", "nltk", "spacy", "similarity")
        },
        "nltk_data": "spaCy instead" if has_stand_in else "NLTK's",
        "descriptions": DESCRIPTIONS,
        "figures": {},
    }
    for figure, judge in judges.items():
        ratios, counts = judge(responses, truths), Counter[str]()
        for ratio, values in zip(ratios, expected, strict=True):
            # The published code adds 0.001 to totals, and prints one decimal.
            share = (
                100 * ratio.hits / (ratio.total + 0.001) if figure != "Hal" else 100 - 100 * (1 - ratio.hits) / 1.001
            )
            counts["same"] += round(share, 1) == values[figure]
        lists = by_lists[figure](responses, truths)
        rate = lambda ratios: round(100 * sum(each.hits for each in ratios) / sum(each.total for each in ratios), 1)
        measured["figures"][figure] = {**counts, "published rule": rate(ratios), "word lists": rate(lists)}
    text = json.dumps(measured, indent=1) + "\n"
    arguments.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
