"""Two tasks for a language model with exact judges, and plain questions on the side.

A prompt asks for a JSON object with given keys, or for a number of bullet points of at most so many words. The ground truth of
a question is its rule, not a response. Training and held-out prompts have no thing or topic in common.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_mm.data.schema import Response
from dpo_mm.judges import Ratio


def _names(text: str) -> list[str]:
    return " ".join(text.split()).split(", ")


NUMBERS = {2: "two", 3: "three", 4: "four", 6: "six", 8: "eight", 10: "ten"}
KEYS = ("name", "colour", "price", "weight", "material", "age", "owner", "origin", "rating", "size")
THINGS = _names("""
bicycle, lighthouse, violin, river, hotel, kettle, castle, bridge, camera, boat, tent, guitar, clock, lamp, chair,
table, sofa, backpack, wagon, telescope, candle, carpet, mirror, piano, drum, knife, helmet, jacket, wallet, suitcase,
bakery, museum, library, garden, farm, barn, volcano, statue, windmill, tractor, train, scooter, kite, ladder, hammer,
teapot, vase, blanket
""")
TOPICS = _names("""
keeping bees, winter hiking, used cars, cats, the moon, baking bread, learning a language, house plants, public
libraries, swimming, board games, chess, tea, solar panels, recycling, sleep, earthquakes, penguins, old maps,
tomatoes, cycling to work, small kitchens, camping, dogs, rain, honey, running, trains, whales, the sun, desert
animals, coffee, mountains, painting, opera, spiders, frogs, salads, football, snow, owls, cheese, the sea, job
interviews, moving house, autumn, glaciers, photography
""")
HELD_OUT_EVERY = 3
"""Every third thing and topic is held out."""
JSON_WORDINGS = (
    "Write a JSON object that describes a {thing}. It has exactly the keys {keys}. Reply with the JSON only.",
    "Describe a {thing} as a JSON object with the keys {keys}. No other keys, no explanation.",
    "JSON object with the keys {keys} for a {thing}:",
)
LIST_WORDINGS = (
    "Write exactly {items} bullet points about {topic}, none longer than {words} words.",
    "List {items} facts about {topic} as bullet points. Each has at most {words} words.",
    "Give me {items} short bullet points on {topic}. None has more than {words} words. Write nothing else.",
)
FENCE = re.compile(r"```(?:json)?\s*\n(.*?)\n?```", re.DOTALL)
BULLET = re.compile(r"(?:[-*•]|\d+[.)])\s+(\S.*)")
FACTS = {
    "What is the capital of France?": ["Paris"],
    "What is the capital of Italy?": ["Rome"],
    "What is the capital of Spain?": ["Madrid"],
    "What is the capital of Germany?": ["Berlin"],
    "What is the capital of Japan?": ["Tokyo"],
    "What is the capital of Egypt?": ["Cairo"],
    "What is the capital of Russia?": ["Moscow"],
    "What is the capital of England?": ["London"],
    "What is the capital of Greece?": ["Athens"],
    "What is the capital of Portugal?": ["Lisbon"],
    "What is the capital of China?": ["Beijing"],
    "What is the capital of Canada?": ["Ottawa"],
    "What is the largest planet in our solar system?": ["Jupiter"],
    "Which planet is closest to the sun?": ["Mercury"],
    "Which planet is known as the red planet?": ["Mars"],
    "What is the largest ocean on Earth?": ["Pacific"],
    "On which continent is Kenya?": ["Africa"],
    "On which continent is Brazil?": ["South America"],
    "Who wrote the play Hamlet?": ["Shakespeare"],
    "Who painted the Mona Lisa?": ["Leonardo", "Vinci"],
    "Who developed the theory of relativity?": ["Einstein"],
    "What is the chemical symbol of gold?": ["Au"],
    "What is the chemical formula of water?": ["H2O", "H₂O"],
    "Which gas do plants take in for photosynthesis?": ["carbon dioxide", "CO2", "CO₂"],
    "Which language is spoken in Brazil?": ["Portuguese"],
    "What colour do you get if you mix blue and yellow?": ["green"],
    "What is the opposite of hot?": ["cold"],
    "Which animal is known as the king of the jungle?": ["lion"],
    "How many days does a week have?": ["seven", "7"],
    "How many months does a year have?": ["twelve", "12"],
}
"""Questions on the side that test knowledge, and their answers, of which any is right."""
SUMS = 30
"""Number of sums on the side."""


def tasks(count: int, *, held_out: bool) -> list[dict[str, Any]]:
    """Make different prompts of one split, as rows of a file of questions. Half of them ask for JSON, half for a list.

    Args:
        count: number of prompts, even.
        held_out: whether they are about the held-out things and topics.
    """
    rng = np.random.default_rng(int(held_out))
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < count:
        is_json = len(rows) % 2 == 0
        row = _json_task(rng, held_out) if is_json else _list_task(rng, held_out)
        rows.setdefault(row["prompt"], {"id": f"{row['category']}-{len(rows)}", **row})
    return list(rows.values())


def of_split(names: Sequence[str], *, held_out: bool) -> list[str]:
    """Things or topics of one split."""
    return [name for number, name in enumerate(names) if (number % HELD_OUT_EVERY == 0) == held_out]


def _json_task(rng: np.random.Generator, held_out: bool) -> dict[str, Any]:
    keys = [str(key) for key in rng.permutation(KEYS)[: rng.integers(2, 5)]]
    named = ", ".join(f'"{key}"' for key in keys[:-1]) + f' and "{keys[-1]}"'
    wording, thing = rng.choice(JSON_WORDINGS), rng.choice(of_split(THINGS, held_out=held_out))
    prompt = str(wording).format(thing=thing, keys=named)
    return {"prompt": prompt, "ground_truth": json.dumps({"keys": keys}), "category": "json"}


def _list_task(rng: np.random.Generator, held_out: bool) -> dict[str, Any]:
    items, words = int(rng.integers(2, 5)), int(rng.choice([6, 8, 10]))
    wording, topic = rng.choice(LIST_WORDINGS), rng.choice(of_split(TOPICS, held_out=held_out))
    prompt = str(wording).format(topic=topic, items=NUMBERS[items], words=NUMBERS[words])
    return {"prompt": prompt, "ground_truth": json.dumps({"items": items, "words": words}), "category": "list"}


def side_questions() -> list[dict[str, Any]]:
    """Make the plain questions on the side: facts, and sums and differences of numbers up to 20."""
    rows = [
        {"id": f"fact-{number}", "prompt": prompt, "ground_truth": answers, "category": "facts"}
        for number, (prompt, answers) in enumerate(FACTS.items())
    ]
    rng = np.random.default_rng(2)
    sums: dict[str, str] = {}
    while len(sums) < SUMS:
        a, b = sorted((int(n) for n in rng.integers(1, 21, size=2)), reverse=True)
        text, value = (f"{a} + {b}", a + b) if len(sums) % 2 else (f"{a} - {b}", a - b)
        if value not in (a, b):
            sums[f"What is {text}?"] = str(value)
    return rows + [
        {"id": f"sum-{number}", "prompt": prompt, "ground_truth": [answer], "category": "sums"}
        for number, (prompt, answer) in enumerate(sums.items())
    ]


def follows(text: str, rule: dict[str, Any]) -> bool:
    """Check a response against the rule of its prompt: {"keys": names}, or {"items": number, "words": limit}."""
    return has_keys(text, rule["keys"]) if "keys" in rule else is_list(text, rule["items"], rule["words"])


def has_keys(text: str, keys: Sequence[str]) -> bool:
    """Check that a text is one JSON object with exactly these keys. A code fence around it is allowed, other text is not."""
    fence = FENCE.fullmatch(text.strip())
    try:
        value = json.loads(fence.group(1) if fence else text, object_pairs_hook=_Members)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, _Members) and sorted(key for key, _ in value) == sorted(keys)


class _Members(list[tuple[str, Any]]):
    """Members of a JSON object, so that a key that is there twice counts twice."""


def is_list(text: str, items: int, words: int) -> bool:
    """Check that a text has exactly so many bullet points, all different, of at most so many words, and no other line.

    A point begins with "-", "*", "•" or a number.
    """
    points = [BULLET.fullmatch(line.strip()) for line in text.splitlines() if line.strip()]
    bodies = [point.group(1) for point in points if point]
    lengths = [len(body.split()) for body in bodies]
    return len(bodies) == len(points) == len(set(bodies)) == items and max(lengths) <= words


def right(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """Rate of responses that follow the rule of their prompt."""
    return [Ratio(float(follows(r.text, _rule(truth))), 1) for r, truth in zip(responses, ground_truths, strict=True)]


def _rule(ground_truth: str) -> dict[str, Any]:
    rule: dict[str, Any] = json.loads(ground_truth)
    return rule


def answered(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """Rate of responses that contain the answer as a whole word."""
    return [
        Ratio(float(re.search(rf"(?<!\w){re.escape(truth)}(?!\w)", r.text, re.IGNORECASE) is not None), 1)
        for r, truth in zip(responses, ground_truths, strict=True)
    ]


right.by_rule = answered.by_rule = True  # type: ignore[attr-defined]
