"""Checks of datasets of response pairs."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from dpo_mm.data.schema import prompt_images
from dpo_mm.doctor.checks import Finding
from dpo_mm.doctor.dataset_statistics import DatasetStatistics, digest, plain_text, shortcut_finding
from dpo_mm.doctor.duplicates import exact_duplicates
from dpo_mm.doctor.image_checks import regression_finding
from dpo_mm.doctor.image_features import ImageFeatures, extract_features
from dpo_mm.doctor.loading import LoadedDataset, Row, batches
from dpo_mm.doctor.shortcuts import run_sign_test
from dpo_mm.errors import name_row
from dpo_mm.printing.progress import progress_bar

FEATURES = ("length", "list items", "headings", "bold", "code", "lines", "refusal", "unfinished end")
"""Features of a response: logs of its length and of counts of markup. 1 for a refusal, 1 if it ends in a letter or digit."""
TOKENS = re.compile(
    r"<image(?:_\d+)?>|<img>|\[IMG\]|<\|?(?:image|image_pad|vision_start|vision_end|im_start|im_end|eot_id|endoftext"
    r"|start_header_id)\|?>|<start_of_turn>|<end_of_turn>|\[/?INST\]",
    re.IGNORECASE,
)
REFUSAL = re.compile(
    r"^\W*(?:i['’]?m (?:very )?sorry|sorry|i apologi[sz]e|i (?:can(?:no|['’])?t|am (?:not able|unable)|['’]?m (?:not able|unable))"
    r"|as an ai\b|unfortunately, i (?:can|am))",
    re.IGNORECASE,
)
MARKUP = {
    "list items": re.compile(r"^\s*(?:[-*+•]|\d+[.)])\s+", re.MULTILINE),
    "headings": re.compile(r"^#{1,6} ", re.MULTILINE),
    "bold": re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
    "code": re.compile(r"`[^`\n]+`|^```", re.MULTILINE),
    "lines": re.compile(r"\n"),
}


def collect_statistics(
    dataset: LoadedDataset, held_out_prompts: set[int], held_out_images: set[int]
) -> DatasetStatistics:
    """Read all rows once and collect their statistics.

    Args:
        held_out_prompts, held_out_images: digests of the held-out dataset.
    """
    statistics = DatasetStatistics()
    with progress_bar("checking responses", dataset.num_rows) as advance:
        for rows in batches(dataset):
            for row in rows:
                with name_row(f"{dataset.name}, row {row['id']}", "Fix the row, or remove it"):
                    _add_row(statistics, row, held_out_prompts, held_out_images)
            statistics.pack()
            advance(len(rows))
    return statistics


def text_of(messages: Any) -> str:
    """Return the text of messages, or the argument if it is a text already."""
    if isinstance(messages, str) or not messages:
        return messages or ""
    return "\n".join(
        message["content"] if isinstance(message["content"], str) else _join_parts(message["content"])
        for message in messages
    )


def _join_parts(parts: Any) -> str:
    return "".join(part.get("text") or "" for part in parts or [])


def prompt_digests(row: Row, images: list[ImageFeatures]) -> tuple[int, int]:
    """Return the digest of a prompt's text, and the digest of the text with its images."""
    text_digest = digest(plain_text(text_of(row["prompt"])))
    return text_digest, digest(text_digest, *(image.digest for image in images)) if images else text_digest


def _add_row(statistics: DatasetStatistics, row: Row, held_out_prompts: set[int], held_out_images: set[int]) -> None:
    statistics.add_row(row)
    cells = prompt_images(row)
    decoded = [extract_features(cell) for cell in cells]
    images = [image for image in decoded if not isinstance(image, str)]
    for number, reason in enumerate(decoded):
        if isinstance(reason, str):
            statistics.add_problem("undecodable-images", row, f"image {number} does not decode ({reason})")
            break
    text_digest, prompt_digest = prompt_digests(row, images)
    statistics.counts["images per row"][str(len(cells))] += 1
    for image in images:
        statistics.counts["format"][image.format] += 1
        statistics.counts["size"]["{} x {}".format(*image.size)] += 1
    if prompt_digest in held_out_prompts or text_digest in held_out_prompts:
        statistics.add_problem("held-out-prompts", row, text_of(row["prompt"]))
    if any(image.digest in held_out_images for image in images):
        statistics.add_problem("held-out-images", row)
    _check_texts(statistics, row, len(cells))
    if (row["chosen"] is None) != (row["rejected"] is None):
        statistics.add_one_sided(row["id"], liked=row["rejected"] is None)
        return
    chosen, rejected = text_of(row["chosen"]), text_of(row["rejected"])
    statistics.add_pair(
        row,
        row.get("chosen_model"),
        row.get("rejected_model"),
        features=response_features(chosen) - response_features(rejected),
        prompts=np.int64(prompt_digest),
        winners=np.int64(digest(chosen)),
        losers=np.int64(digest(rejected)),
        groups=np.int64(digest(row.get("group_id") or prompt_digest)),
        score_gaps=np.float64(np.nan if row.get("score_gap") is None else row["score_gap"]),
    )
    statistics.num_uncertain += row.get("score_gap") is not None or row.get("probability") is not None


def _check_texts(statistics: DatasetStatistics, row: Row, num_images: int) -> None:
    """Check the prompt and the responses of one row."""
    prompt, chosen, rejected = (text_of(row[column]) for column in ("prompt", "chosen", "rejected"))
    one_sided = (row["chosen"] is None) != (row["rejected"] is None)
    sides = [column for column in ("chosen", "rejected") if not one_sided or row[column] is not None]
    empty = [column for column in sides if not text_of(row[column]).strip()]
    if empty:
        statistics.add_problem("empty-responses", row, f"{' and '.join(empty)} is empty")
    elif chosen.split() == rejected.split():
        statistics.add_problem("identical-sides", row, chosen)
    if not prompt.strip():
        statistics.add_problem("empty-prompts", row)
    token = next((match for text in (prompt, chosen, rejected) if (match := TOKENS.search(text))), None)
    if token:
        statistics.add_problem("tokens-in-text", row, token[0])
    if not one_sided and _user_text(row["chosen"]) != _user_text(row["rejected"]):
        statistics.add_problem("prompts-differ", row)
    num_parts = sum(part["type"] == "image" for message in _messages(row["prompt"]) for part in _parts(message))
    if num_parts not in (0, num_images):
        statistics.add_problem("images-misplaced", row, f"{num_images} images, {num_parts} image parts")
    probability = row.get("probability")
    if (row.get("score_gap") or 0) < 0:
        statistics.add_problem("labels-against-evidence", row, f"score_gap is {row['score_gap']:g}, below 0")
    elif probability is not None and probability <= 0.5:
        comment = f"probability that chosen is better is {probability:g}"
        statistics.add_problem("labels-against-evidence", row, comment)


def _messages(content: Any) -> list[dict[str, Any]]:
    return [] if isinstance(content, str) or not content else list(content)


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    return [] if isinstance(message["content"], str) else list(message["content"] or [])


def _user_text(messages: Any) -> str:
    """Return the text of the turns that are not the assistant's, or "" if all of them are in the prompt."""
    return text_of([message for message in _messages(messages) if message["role"] != "assistant"])


def response_features(response: str) -> np.ndarray:
    """Return the values of FEATURES for a response, (len(FEATURES),)."""
    text = response.strip()
    counts = [np.log1p(len(pattern.findall(response))) for pattern in MARKUP.values()]
    unfinished = bool(text) and text[-1].isalnum()
    return np.array([np.log1p(len(text)), *counts, bool(REFUSAL.match(text)), unfinished], dtype=np.float32)


def run_checks(statistics: DatasetStatistics) -> list[Finding]:
    """Check the dataset as a whole: duplicates and shortcuts."""
    if not statistics.ids:
        return []
    ids, groups = statistics.ids, statistics.column("groups")
    winners, losers = statistics.column("winners"), statistics.column("losers")
    findings = exact_duplicates(statistics.column("prompts"), winners, losers, ids)
    differences = statistics.column("features")
    length = differences[:, 0]
    correlation = _correlation_with_gap(length, statistics.column("score_gaps"))
    for finding in shortcut_finding("length-shortcut", "length", run_sign_test(length, groups), length, ids):
        findings.append(finding._replace(summary=finding.summary + correlation))
    tests = [(run_sign_test(differences[:, n], groups), n) for n in range(1, 6)]
    test, index = max(tests, key=lambda pair: (pair[0].significant, pair[0].accuracy))
    findings += shortcut_finding("markup-shortcut", FEATURES[index], test, differences[:, index], ids)
    refusal = differences[:, FEATURES.index("refusal")]
    test = run_sign_test(refusal, groups)
    findings += shortcut_finding("refusal-shortcut", "refusal", test, refusal, ids, rare=True)
    return findings + regression_finding(differences, groups, ids, FEATURES, FEATURES)


def _correlation_with_gap(length: np.ndarray, score_gaps: np.ndarray) -> str:
    """Return text with the correlation of the length difference and the score gap, or "" if few rows have a gap."""
    known = np.isfinite(score_gaps)
    if known.sum() < 20 or length[known].std() == 0 or score_gaps[known].std() == 0:
        return ""
    return f", and its correlation with the score gap is {np.corrcoef(length[known], score_gaps[known])[0, 1]:.2f}"
