"""Judges of captions: hallucinated objects and missing objects.

CHAIR (Rohrbach et al. 2018, 1809.02156): CHAIR_i is the fraction of object mentions that are hallucinated, CHAIR_s the
fraction of captions with at least one. Report them with recall and length, since the shortest caption hallucinates
least. The vocabulary here is that of the synthetic shapes. `count_objects` takes any other vocabulary, such as the 80
objects of COCO with their synonyms, in a custom judge:

    def coco_chair_i(responses, ground_truths):
        counts = count_objects(responses, ground_truths, mentions=my_mentions)
        return [Ratio(c.hallucinated, c.mentioned) for c in counts]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from dpo_mm.data.schema import Response
from dpo_mm.judges import Explanation, Ratio
from dpo_mm.worlds import caption_scenes

Mentions = Callable[[str], list[str]]


class ObjectCounts(NamedTuple):
    """Object counts of one caption.

    Attributes:
        mentioned: objects that the caption mentions.
        hallucinated: mentioned objects that are not in the ground truth.
        present: objects in the ground truth.
        recalled: objects in the ground truth that the caption mentions.
    """

    mentioned: int
    hallucinated: int
    present: int
    recalled: int


def count_objects(
    responses: Sequence[Response], ground_truths: Sequence[str], mentions: Mentions = caption_scenes.mentions
) -> list[ObjectCounts]:
    """Compare the objects in each caption with those in its ground truth. Repeated mentions of an object count once."""
    counts = []
    for response, ground_truth in zip(responses, ground_truths, strict=True):
        mentioned, present = set(mentions(response.text)), set(mentions(ground_truth))
        counts.append(ObjectCounts(len(mentioned), len(mentioned - present), len(present), len(mentioned & present)))
    return counts


def chair_i(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """CHAIR_i: hallucinated objects, as a fraction of all mentioned objects."""
    return [Ratio(c.hallucinated, c.mentioned) for c in count_objects(responses, ground_truths)]


def chair_s(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """CHAIR_s: captions with a hallucinated object, as a fraction of all captions."""
    return [Ratio(float(c.hallucinated > 0), 1) for c in count_objects(responses, ground_truths)]


def recall(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """Object recall: mentioned objects of the ground truth, as a fraction of its objects."""
    return [Ratio(c.recalled, c.present) for c in count_objects(responses, ground_truths)]


def hallucination_f1_error(responses: Sequence[Response], ground_truths: Sequence[str]) -> list[Ratio]:
    """1 - F1 of the mentioned objects.

    Hallucinated and missing objects, divided by mentioned plus present objects. Use this judge for mining, since CHAIR
    rewards silence.
    """
    return [
        Ratio(c.hallucinated + c.present - c.recalled, c.mentioned + c.present)
        for c in count_objects(responses, ground_truths)
    ]


def explain(response: Response, ground_truth: str) -> Explanation:
    """List the hallucinated objects of a caption, with their positions, and the missing ones."""
    present, spans = caption_scenes.mentions(ground_truth), caption_scenes.spans(response.text)
    hallucinated = [span for span in spans if span[0] not in present]
    faults = {
        "hallucinated": [kind for kind, _, _ in hallucinated],
        "missing": sorted({*present} - {kind for kind, _, _ in spans}),
    }
    reason = "; ".join(f"{fault}: {', '.join(dict.fromkeys(kinds))}" for fault, kinds in faults.items() if kinds)
    return Explanation(reason, tuple((start, end) for _, start, end in hallucinated))


def correct(response: Response, ground_truth: str) -> str:
    """Remove hallucinated objects from a caption and append missing ones, in the wording of the synthetic captions."""
    present = caption_scenes.mentions(ground_truth)
    supported = [kind for kind in dict.fromkeys(caption_scenes.mentions(response.text)) if kind in present]
    kinds = [*supported, *(kind for kind in dict.fromkeys(present) if kind not in supported)]
    return caption_scenes.in_words(kinds) if kinds else ground_truth
