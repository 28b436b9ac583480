"""Prompts of the world of drawings: written from a scene or a request, and parsed.

    describe(parse("two penguins and a red apple on a yellow background"))

A prompt names one to three things. It may give their colours, the position of one thing relative to another, and the background.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from dpo_mm.worlds import drawings
from dpo_mm.worlds.drawing_sprites import BACKGROUNDS, HUES, colours, names, plural, usual_colour
from dpo_mm.worlds.drawings import MIRRORED, Scene, SceneRequest, ThingRequest

CATEGORIES = ("one thing", "several of a kind", "two kinds", "position", "three kinds")
COUNTS = {1: ("a", "a", "a", "one"), 2: ("two", "two", "a pair of"), 3: ("three", "three", "a group of three")}
"""Wordings of a number of things. The first is the plainest, and repeated wordings are more frequent."""
RELATIONS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
    "next to": ("next to", "beside"),
}
OPENINGS = ("", "", "a drawing of ", "a picture of ")
ENDINGS = (" on a {} background", " on {}", " on a {} background", " against a {} background")
VOWEL_SOUND = re.compile("[aeio]|umb")
"""Start of a word that takes the article "an": not "unicorn"."""

Pick = Callable[[Sequence[str]], str]


def describe(request: SceneRequest, rng: np.random.Generator | None = None) -> str:
    """Write the prompt of a request.

    Args:
        request: content of the prompt.
        rng: chooses among the wordings that `parse` reads. None: the plainest wording.
    """

    def pick(options: Sequence[str]) -> str:
        return options[0] if rng is None else options[int(rng.integers(len(options)))]

    phrases = [_phrase(wanted, pick) for wanted in request.things]
    if request.relation:
        text = f" {pick(RELATIONS[request.relation])} ".join(phrases)
    elif len(phrases) == 2:
        text = pick((" and ", " and ", " with ")).join(phrases)
    elif len(phrases) == 3:
        text = "{}, {} and {}".format(*phrases)
    else:
        text = pick(OPENINGS) + phrases[0]
    if request.background:
        text += pick(ENDINGS).format(request.background).replace("a orange", "an orange")
    return text


def _phrase(wanted: ThingRequest, pick: Pick) -> str:
    """Write one kind of thing with its number."""
    noun = wanted.name if wanted.count == 1 else plural(wanted.name)
    text = f"{wanted.colour} {noun}" if wanted.colour else noun
    number = pick(COUNTS[wanted.count])
    return f"{'an' if number == 'a' and VOWEL_SOUND.match(text) else number} {text}"


def content_of(scene: Scene) -> SceneRequest:
    """Return everything that a scene shows as a request."""
    counts = Counter((thing.name, thing.colour) for thing in scene.things)
    things = tuple(ThingRequest(name, count, colour) for (name, colour), count in counts.items())
    relation = drawings.relation_of(*scene.things) if len(scene.things) == len(things) == 2 else None
    return SceneRequest(things, relation, scene.background)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Write a true caption of a scene. It always has the colours that are not usual, and often the rest."""
    content = content_of(scene)
    things = [
        wanted
        if wanted.colour != usual_colour(wanted.name) or (wanted.colour and rng.random() < 0.4)
        else ThingRequest(wanted.name, wanted.count)
        for wanted in content.things
    ]
    relation = content.relation
    if len(things) == 2 and rng.random() < 0.5:
        things, relation = things[::-1], MIRRORED[relation] if relation else None
    elif len(things) == 3:
        things = [things[number] for number in rng.permutation(3)]
    if relation and rng.random() < 0.35:
        relation = None
    elif relation in ("left of", "right of") and rng.random() < 0.3:
        relation = "next to"
    background = content.background if rng.random() < 0.5 else None
    return describe(SceneRequest(tuple(things), relation, background), rng)


def parse(prompt: str) -> SceneRequest:
    """Parse a prompt of the drawings.

    Raises:
        ValueError: if the prompt is any other text, has more than three things, or a thing in a colour that it does not have.
    """
    text = " ".join(prompt.lower().strip().rstrip(".").split())
    text = text.removeprefix(next((opening for opening in OPENINGS if opening and text.startswith(opening)), ""))
    ending = _ending().search(text)
    text = text[: ending.start()] if ending else text
    relation, phrases = _split(text)
    try:
        things = tuple(_thing(phrase) for phrase in phrases)
        drawings.check_count(sum(wanted.count for wanted in things))
        if relation and any(wanted.count > 1 for wanted in things):
            raise ValueError(f"{relation!r} needs one thing on each side. Leave it out, or remove some things")
    except ValueError as error:
        raise ValueError(f"prompt {prompt!r} is not a prompt of the drawings: {error}") from None
    return SceneRequest(things, relation, ending["background"] if ending else None)


@functools.cache
def _ending() -> re.Pattern[str]:
    return re.compile(rf" (?:on|against)(?: an?)? (?P<background>{'|'.join(BACKGROUNDS)})(?: background)?$")


def _split(text: str) -> tuple[str | None, list[str]]:
    """Split a prompt without its background into a relation and the phrases of its things."""
    for relation, wordings in RELATIONS.items():
        for wording in sorted(wordings, key=len, reverse=True):
            if f" {wording} " in text:
                return relation, text.split(f" {wording} ")
    return None, re.split(", and |, | and | with ", text)


@functools.cache
def _things() -> tuple[re.Pattern[str], dict[str, str], dict[str, int]]:
    """Pattern of a phrase, names by noun, and numbers by word."""
    nouns = {name: name for name in names()} | {plural(name): name for name in names()}
    numbers = {word: count for count, words in COUNTS.items() for word in words} | {"an": 1}
    pattern = (
        rf"(?P<number>{'|'.join(numbers)})(?: (?P<colour>{'|'.join(HUES)}))?"
        rf" (?P<noun>{'|'.join(sorted(map(re.escape, nouns), key=len, reverse=True))})"
    )
    return re.compile(pattern), nouns, numbers


def _thing(phrase: str) -> ThingRequest:
    """Parse the phrase of one kind of thing. Raises ValueError if it is any other text."""
    pattern, nouns, numbers = _things()
    match = pattern.fullmatch(phrase.strip())
    if match is None:
        raise ValueError(
            f"{phrase!r} is not a phrase like 'a penguin', 'two red apples' or 'three hot dogs'. Use another judge for "
            "other prompts, or one of the names in dpo_mm.worlds.drawing_sprites.names()"
        )
    name, colour = nouns[match["noun"]], match["colour"]
    if colour and colour not in colours(name):
        others = f"It comes in {', '.join(colours(name))}" if colours(name) else "Leave the colour out"
        raise ValueError(f"there is no {colour} {name}. {others}")
    return ThingRequest(name, numbers[match["number"]], colour)


def check_prompts(prompts: Iterable[str]) -> None:
    """Raise ValueError for the first prompt that is not a prompt of the drawings."""
    for prompt in prompts:
        parse(prompt)


def sample_prompts(count: int, seed: int, *, held_out: bool) -> list[str]:
    """Sample distinct prompts, equally many of each category, with or without held-out combinations.

    Args:
        count: number of prompts, a multiple of the number of categories.
        seed: seed of the scenes that they describe.
        held_out: True for prompts which all have a held-out combination, False for prompts without any.
    """
    rng = np.random.default_rng((seed, held_out))
    by_category: dict[str, dict[str, None]] = {category: {} for category in CATEGORIES}
    while any(len(prompts) < count // len(CATEGORIES) for prompts in by_category.values()):
        scene = drawings.sample_scene(rng)
        prompt = caption(scene, rng)
        prompts = by_category[parse(prompt).category]
        if drawings.is_held_out(scene.things) == held_out and len(prompts) < count // len(CATEGORIES):
            prompts[prompt] = None
    return [prompt for prompts in by_category.values() for prompt in prompts]
