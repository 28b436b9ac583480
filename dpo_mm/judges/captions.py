"""Judges of captions: what they name that isn't there, and what they leave out.

CHAIR (Rohrbach et al. 2018, 1809.02156): CHAIR_i is the share of object mentions that are invented, CHAIR_s the share
of captions with any. They stand beside recall and length, since the shortest caption invents the least. What can be
mentioned here is the world of shapes'; `counts` takes any other vocabulary, such as the 80 objects of COCO with their
synonyms, in a judge of your own:

    def coco_chair_i(answers, truths):
        return [Share(c.invented, c.mentioned) for c in counts(answers, truths, mentions=my_mentions)]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from dpo_mm.data.schema import Response
from dpo_mm.judges import Explanation, Ratio
from dpo_mm.worlds import caption_scenes

Mentions = Callable[[str], list[str]]


class Counts(NamedTuple):
    """Of one caption: objects mentioned, mentions of what the truth doesn't name, objects of the truth, those found."""

    mentioned: int
    invented: int
    there: int
    found: int


def counts(
    answers: Sequence[Response], truths: Sequence[str], mentions: Mentions = caption_scenes.mentions
) -> list[Counts]:
    """What each caption mentions against what its truth mentions; an object is one, however often it is named."""
    found = []
    for answer, truth in zip(answers, truths, strict=True):
        said, there = set(mentions(answer.text)), set(mentions(truth))
        found.append(Counts(len(said), len(said - there), len(there), len(said & there)))
    return found


def chair_i(answers: Sequence[Response], truths: Sequence[str]) -> list[Ratio]:
    """Invented mentions, of all mentions."""
    return [Ratio(one.invented, one.mentioned) for one in counts(answers, truths)]


def chair_s(answers: Sequence[Response], truths: Sequence[str]) -> list[Ratio]:
    """Captions with an invented mention, of all captions."""
    return [Ratio(float(one.invented > 0), 1) for one in counts(answers, truths)]


def recall(answers: Sequence[Response], truths: Sequence[str]) -> list[Ratio]:
    """Objects of the truth that are named, of all of them."""
    return [Ratio(one.found, one.there) for one in counts(answers, truths)]


def hallucination_f1_error(answers: Sequence[Response], truths: Sequence[str]) -> list[Ratio]:
    """Inventions and omissions, of all that is said or there: 1 - F1. What to mine by, since CHAIR rewards silence."""
    return [Ratio(one.invented + one.there - one.found, one.mentioned + one.there) for one in counts(answers, truths)]


def explain(answer: Response, truth: str) -> Explanation:
    """What a caption names that isn't there, with where, and what it leaves out."""
    there, spans = caption_scenes.mentions(truth), caption_scenes.spans(answer.text)
    invented = [span for span in spans if span[0] not in there]
    named = {
        "invented": [kind for kind, _, _ in invented],
        "left out": sorted({*there} - {kind for kind, _, _ in spans}),
    }
    reason = "; ".join(f"{what}: {', '.join(dict.fromkeys(kinds))}" for what, kinds in named.items() if kinds)
    return Explanation(reason, tuple((start, end) for _, start, end in invented))


def correct(answer: Response, truth: str) -> str:
    """The caption without what isn't there, and with what it left out after the rest; in the words of the world."""
    there = caption_scenes.mentions(truth)
    kept = [kind for kind in dict.fromkeys(caption_scenes.mentions(answer.text)) if kind in there]
    named = [*kept, *(kind for kind in dict.fromkeys(there) if kind not in kept)]
    return caption_scenes.in_words(named) if named else truth
