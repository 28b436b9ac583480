"""Checks of the doctor: their titles, their advice and their findings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

MAX_EXAMPLES = 5
"""Number of example rows per finding."""
SEVERITIES = ("error", "warning", "note")


class CheckSpec(NamedTuple):
    """Description of a check: its title, the advice for its findings, the kinds of dataset and the usual severity."""

    title: str
    advice: str
    kinds: tuple[str, ...] = ("images", "responses")
    severity: str = "error"


IMAGES, RESPONSES = ("images",), ("responses",)
CHECKS: dict[str, CheckSpec] = {
    "labels-unknown": CheckSpec(
        "Invalid preference labels",
        "Write a, b, tie or both_bad. Training refuses the dataset until then.",
        IMAGES,
    ),
    "labels-against-evidence": CheckSpec(
        "Labels that contradict the row's own votes or scores",
        "A tie may have become a win, or a and b were swapped. Import the dataset again, "
        "or set preference from the votes.",
    ),
    "contradictory-labels": CheckSpec(
        "The same pair with opposite winners",
        "Keep one row with votes_a and votes_b or p_a, or leave the pair out. Opposite labels cancel in training.",
    ),
    "duplicate-pairs": CheckSpec(
        "The same pair with the same winner, more than once",
        "Keep one row of each. Copies give a pair more weight and leak between the training and evaluation splits.",
        severity="warning",
    ),
    "near-duplicate-pairs": CheckSpec(
        "Pairs whose images are almost those of another pair",
        "Look at a few. Leave out re-encoded or rescaled copies. Different seeds that look alike may stay.",
        IMAGES,
        "warning",
    ),
    "ids-repeated": CheckSpec(
        "Ids shared by several rows",
        "Give every row a unique id. Noise draws, votes and soft labels are stored by id.",
        severity="warning",
    ),
    "identical-sides": CheckSpec(
        "The two images or responses of a pair are identical",
        "Leave these rows out. There is nothing to prefer, and the label is noise.",
    ),
    "near-identical-sides": CheckSpec(
        "The two images of a pair are almost identical",
        "Look at a few. If they differ only in compression, leave them out.",
        IMAGES,
        "warning",
    ),
    "undecodable-images": CheckSpec(
        "Images that do not decode",
        "Train with undecodable_images: drop, or get the files again. The examples give the reasons.",
    ),
    "held-out-prompts": CheckSpec(
        "Prompts that also appear in the held-out set",
        "Leave these rows out of training. Otherwise the comparison uses prompts from the training data.",
    ),
    "held-out-images": CheckSpec(
        "Images that also appear in the held-out set",
        "Leave these rows out of training, or report the overlap with the comparison.",
        severity="warning",
    ),
    "model-always-wins": CheckSpec(
        "One model always wins or always loses",
        "Training would learn that model's look. Use pairs of one model's outputs, or pairs of many models.",
    ),
    "same-two-models": CheckSpec(
        "Every pair compares the same two models",
        "Telling the two models apart is a shortcut to the label. Add pairs where both come from one model.",
        severity="warning",
    ),
    "resolution-shortcut": CheckSpec(
        "Resolution predicts the winner",
        "Bring both images to one size before training: crop or scale all images alike.",
        IMAGES,
    ),
    "format-shortcut": CheckSpec(
        "File format predicts the winner",
        "Encode both images in one format. Otherwise compression marks the winner or the loser.",
        IMAGES,
    ),
    "file-size-shortcut": CheckSpec(
        "File size predicts the winner",
        "Encode both images alike. If the finding stays, annotators prefer detail. "
        "Decide whether you want to train on that.",
        IMAGES,
    ),
    "colour-shortcut": CheckSpec(
        "Brightness, contrast or saturation predicts the winner",
        "This may be taste, or the look of a model or camera. To avoid learning it, balance it or lower its weight.",
        IMAGES,
        "warning",
    ),
    "length-shortcut": CheckSpec(
        "Length predicts the chosen response",
        "Training will change the length of responses. Use a length-normalised objective (simpo, or sigmoid with LD-DPO), "
        "or balance lengths.",
        RESPONSES,
    ),
    "markup-shortcut": CheckSpec(
        "Markup (lists, headings, bold, code) predicts the chosen response",
        "Training will teach markup. Strip it from both responses, or balance it.",
        RESPONSES,
        "warning",
    ),
    "refusal-shortcut": CheckSpec(
        "Refusals predict the winner",
        "Chosen refusals train the model to refuse. Rejected refusals train it never to. "
        "Look at them, and balance them or leave them out.",
        RESPONSES,
        "warning",
    ),
    "trivial-features": CheckSpec(
        "A logistic regression on trivial features predicts the label",
        "A model can predict these labels without learning your preference. "
        "Balance the features listed here, then run again.",
        severity="warning",
    ),
    "empty-responses": CheckSpec(
        "Empty responses", "Leave these rows out. An empty response has no tokens to train on.", RESPONSES
    ),
    "empty-prompts": CheckSpec("Empty prompts", "Leave these rows out, or add their prompts.", severity="warning"),
    "prompts-differ": CheckSpec(
        "Chosen and rejected respond to different prompts",
        "Both must respond to the same prompt. Move the turns that they share into prompt, and remove the rest.",
        RESPONSES,
    ),
    "tokens-in-text": CheckSpec(
        "Image or chat tokens written into texts",
        "Give images as parts and roles as messages. A token in a text is read as an image or turn that does not exist.",
        RESPONSES,
    ),
    "images-misplaced": CheckSpec(
        "The number of images differs from the number of image parts in the prompt",
        "Give as many image parts as images, or no image parts at all (the images then come first).",
        RESPONSES,
    ),
    "no-ties-or-votes": CheckSpec(
        "No ties, votes or scores",
        "Every label counts as certain. If your source has ties, votes or scores, import it again with them: "
        "soft labels need them.",
        severity="note",
    ),
    "licence-missing": CheckSpec(
        "Rows without a licence",
        "Find the dataset's licence and import with --license before you publish anything trained on it.",
        severity="warning",
    ),
    "licence-non-commercial": CheckSpec(
        "Rows that may not be used commercially",
        "A model trained on them may inherit the restriction. Leave them out for commercial work.",
        severity="warning",
    ),
}


SHORTCUT_CHECKS = {"trivial-features", *(name for name in CHECKS if name.endswith("-shortcut"))}
"""Checks that need pairs of at least `MIN_GROUPS` prompts."""
PAIR_CHECKS = {
    "labels-against-evidence",
    "contradictory-labels",
    "duplicate-pairs",
    "near-duplicate-pairs",
    "identical-sides",
    "near-identical-sides",
    "model-always-wins",
    "same-two-models",
    "prompts-differ",
    "no-ties-or-votes",
    *SHORTCUT_CHECKS,
}
"""Checks that need pairs. They are not counted as passed without one."""


class Finding(NamedTuple):
    """Result of a check that failed on `rows` of `total` rows.

    Args:
        check: key of CHECKS.
        severity: one of SEVERITIES.
        rows, total: number of rows with the problem, and of rows checked.
        summary: one sentence with the counts.
        examples: (row id, comment) of the first few rows. The comment may be empty.
    """

    check: str
    severity: str
    rows: int
    total: int
    summary: str
    examples: tuple[tuple[str, str], ...] = ()

    @property
    def title(self) -> str:
        return CHECKS[self.check].title

    @property
    def advice(self) -> str:
        return CHECKS[self.check].advice


class RowProblems:
    """Counter of the problems of single rows, by check. It stores the first few rows as examples."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = defaultdict(int)
        self.examples: dict[str, list[tuple[str, str]]] = defaultdict(list)

    def add(self, check: str, row_id: str, comment: str = "") -> None:
        """Count a row for a check."""
        self.counts[check] += 1
        if len(self.examples[check]) < MAX_EXAMPLES:
            self.examples[check].append((row_id, comment))

    def findings(self, total: int) -> list[Finding]:
        """Return one finding per check that has rows. total: number of rows of the dataset."""
        return [
            Finding(
                check, CHECKS[check].severity, count, total, row_count_text(count, total), tuple(self.examples[check])
            )
            for check, count in self.counts.items()
        ]


def row_count_text(count: int, total: int) -> str:
    """Text of a number of rows with its percentage, such as "3 of 200 rows (1.5%)"."""
    return f"{count:,} of {total:,} rows ({count / max(total, 1):.1%})"


def first_examples(ids: list[str], rows: Iterable[int], comments: Iterable[str] = ()) -> tuple[tuple[str, str], ...]:
    """Return (id, comment) of the first few rows.

    Args:
        ids: ids of all rows.
        rows: indices into ids.
        comments: one per row, in the order of rows. Missing ones are empty.
    """
    texts = list(comments)
    return tuple(
        (ids[row], texts[n] if n < len(texts) else "") for n, row in zip(range(MAX_EXAMPLES), rows, strict=False)
    )


def sort_by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Sort findings by severity, errors first, and within a severity in the order of CHECKS."""
    order = list(CHECKS)
    return sorted(findings, key=lambda finding: (SEVERITIES.index(finding.severity), order.index(finding.check)))
