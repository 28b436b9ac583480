"""What the doctor looks for, and what it says when it has found it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

SHOWN = 5
"""Examples of a finding."""
SEVERITIES = ("error", "warning", "note")


class CheckSpec(NamedTuple):
    """A check: its title, what to do about a finding, which kinds of sets it is for, its usual severity."""

    title: str
    advice: str
    kinds: tuple[str, ...] = ("images", "answers")
    severity: str = "error"


IMAGES, ANSWERS = ("images",), ("answers",)
CHECKS: dict[str, CheckSpec] = {
    "labels-unknown": CheckSpec(
        "Preferences that are none",
        "Write a, b, tie or both_bad; training refuses the set as it is.",
        IMAGES,
    ),
    "labels-against-evidence": CheckSpec(
        "Labels that their own votes or scores speak against",
        "A tie may have become a win, or sides were swapped: import the set again, or set preference from the votes.",
    ),
    "contradictory-labels": CheckSpec(
        "The same pair, won by one side here and by the other there",
        "Keep one row with votes_a and votes_b or p_a, or leave the pair out: what it teaches cancels out.",
    ),
    "duplicate-pairs": CheckSpec(
        "The same pair with the same winner, again",
        "Keep one of each; copies weigh a pair more than the rest and leak between training and watched rows.",
        severity="warning",
    ),
    "near-duplicate-pairs": CheckSpec(
        "Pairs whose pictures are almost those of another pair",
        "Look at a few; re-encoded or rescaled copies should go, seeds that look alike may stay.",
        IMAGES,
        "warning",
    ),
    "ids-repeated": CheckSpec(
        "Ids that stand for several rows",
        "Give every row its own: draws, votes and soft labels are kept by id.",
        severity="warning",
    ),
    "identical-sides": CheckSpec(
        "Both sides are the same",
        "Leave these rows out: there is nothing to prefer, and the label is noise.",
    ),
    "near-identical-sides": CheckSpec(
        "Both pictures are almost the same",
        "Look at a few; if what differs is compression alone, leave them out.",
        IMAGES,
        "warning",
    ),
    "pictures-broken": CheckSpec(
        "Pictures that do not decode",
        "Train with undecodable_images drop, or get the files again; the reasons stand with the examples.",
    ),
    "held-out-prompts": CheckSpec(
        "Prompts that are in the held-out set too",
        "Leave these rows out of training, or the comparison is on what was trained.",
    ),
    "held-out-pictures": CheckSpec(
        "Pictures that are in the held-out set too",
        "Leave these rows out of training, or say so beside the comparison.",
        severity="warning",
    ),
    "model-always-wins": CheckSpec(
        "One model is always the winner",
        "What is learned is that model's look. Take pairs from one model on both sides, or from many on both.",
    ),
    "same-two-models": CheckSpec(
        "Every pair is between the same two models",
        "Telling the models apart is a shortcut to the label. Mix in pairs from one model on both sides.",
        severity="warning",
    ),
    "resolution-shortcut": CheckSpec(
        "Resolution tells the winner",
        "Bring both sides to one size before training: crop or scale all pictures alike.",
        IMAGES,
    ),
    "format-shortcut": CheckSpec(
        "File format tells the winner",
        "Encode both sides in one format; compression marks one side's pictures.",
        IMAGES,
    ),
    "file-size-shortcut": CheckSpec(
        "File size tells the winner",
        "Encode both sides alike. If it stays, detail itself is preferred: decide whether you want that.",
        IMAGES,
    ),
    "look-shortcut": CheckSpec(
        "Brightness, contrast or saturation tells the winner",
        "It may be taste, or a model's or camera's look. If you don't want it learned, even it out or weigh it down.",
        IMAGES,
        "warning",
    ),
    "length-shortcut": CheckSpec(
        "Length tells the chosen answer",
        "Training will change lengths. Take length-normalised objectives (simpo, or sigmoid with LD-DPO), or balance lengths.",
        ANSWERS,
    ),
    "format-of-text-shortcut": CheckSpec(
        "Formatting (lists, headings, bold, code) tells the chosen answer",
        "Training will teach formatting. Strip it from both sides, or balance it.",
        ANSWERS,
        "warning",
    ),
    "refusal-shortcut": CheckSpec(
        "Refusals fall on one side",
        "Chosen refusals teach to refuse, rejected ones never to. Look at them, and balance or leave them out.",
        ANSWERS,
        "warning",
    ),
    "trivial-features": CheckSpec(
        "A logistic regression on trivial features predicts the label",
        "A model can win so without seeing what you mean. Even out the features named here, then ask again.",
        severity="warning",
    ),
    "empty-answers": CheckSpec("Empty answers", "Leave these rows out; an empty answer can't be trained on.", ANSWERS),
    "empty-prompts": CheckSpec("Empty prompts", "Leave these rows out, or give them their prompt.", severity="warning"),
    "prompts-differ": CheckSpec(
        "The two sides answer different prompts",
        "Both sides must answer the same prompt: move what they share into prompt, leave out the rest.",
        ANSWERS,
    ),
    "tokens-in-text": CheckSpec(
        "Image or chat tokens written into texts",
        "Give images as parts and roles as messages; a token in a text is read as an image or a turn that isn't there.",
        ANSWERS,
    ),
    "images-misplaced": CheckSpec(
        "Images and their places in the prompt do not match",
        "Give as many image parts as images, or none at all (then they come first).",
        ANSWERS,
    ),
    "ties-and-votes-lost": CheckSpec(
        "No ties, votes or scores are left",
        "Every label counts as certain. If your source has them, import it again and keep them: soft labels need them.",
        severity="note",
    ),
    "licence-missing": CheckSpec(
        "Rows without a licence",
        "Find the set's licence and import with --license, before you publish anything trained on it.",
        severity="warning",
    ),
    "licence-non-commercial": CheckSpec(
        "Rows that may not be used commercially",
        "What you train on them may inherit that. Leave them out for commercial work.",
        severity="warning",
    ),
}


class Finding(NamedTuple):
    """What a check found, in so many rows of `total`. what: a sentence. examples: row ids, each with what is said of it."""

    check: str
    severity: str
    rows: int
    total: int
    what: str
    examples: tuple[tuple[str, str], ...] = ()

    @property
    def title(self) -> str:
        return CHECKS[self.check].title

    @property
    def advice(self) -> str:
        return CHECKS[self.check].advice


class Notes:
    """What is wrong with single rows, by check: counted, the first few kept."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = defaultdict(int)
        self.examples: dict[str, list[tuple[str, str]]] = defaultdict(list)

    def add(self, check: str, row: str, what: str = "") -> None:
        self.counts[check] += 1
        if len(self.examples[check]) < SHOWN:
            self.examples[check].append((row, what))

    def findings(self, total: int) -> list[Finding]:
        """A finding for each check that has rows. total: rows of the set."""
        return [
            Finding(check, CHECKS[check].severity, count, total, share(count, total), tuple(self.examples[check]))
            for check, count in self.counts.items()
        ]


def share(count: int, total: int) -> str:
    """A count as words."""
    return f"{count:,} of {total:,} rows ({count / max(total, 1):.1%})"


def examples(ids: list[str], rows: Iterable[int], what: Iterable[str] = ()) -> tuple[tuple[str, str], ...]:
    """The first few rows by their ids, each with what is said of it."""
    words = list(what)
    return tuple((ids[row], words[n] if n < len(words) else "") for n, row in zip(range(SHOWN), rows, strict=False))


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first, and within a severity in the order of CHECKS."""
    order = list(CHECKS)
    return sorted(findings, key=lambda one: (SEVERITIES.index(one.severity), order.index(one.check)))
