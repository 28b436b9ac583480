"""What can be wrong with a set of answers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from dpo_mm.doctor.checks import Finding
from dpo_mm.doctor.dataset_statistics import DatasetStatistics, digest, plain, shortcut
from dpo_mm.doctor.duplicates import repeated
from dpo_mm.doctor.image_checks import regression
from dpo_mm.doctor.image_features import Look, look
from dpo_mm.doctor.loading import LoadedDataset, Row, batches
from dpo_mm.doctor.shortcuts import told_by
from dpo_mm.progress import progress_bar

FEATURES = ("length", "list items", "headings", "bold", "code", "lines", "refusal", "unfinished end")
"""Of an answer: log of its characters, logs of counts of markup, refusal or not, ends without a stop or not."""
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


def collect_statistics(opened: LoadedDataset, prompts: set[int], pictures: set[int]) -> DatasetStatistics:
    """Everything that is kept of a set. prompts, pictures: digests of the held-out set's."""
    seen = DatasetStatistics()
    with progress_bar("looking at answers", opened.rows) as advance:
        for rows in batches(opened):
            for row in rows:
                _row(seen, row, prompts, pictures)
            seen.pack()
            advance(len(rows))
    return seen


def text(messages: Any) -> str:
    """The text of messages, or of what is a text already."""
    if isinstance(messages, str) or not messages:
        return messages or ""
    return "\n".join(
        message["content"] if isinstance(message["content"], str) else _joined(message["content"])
        for message in messages
    )


def _joined(parts: Any) -> str:
    return "".join(part.get("text") or "" for part in parts or [])


def prompt_digests(row: Row, looks: list[Look]) -> tuple[int, int]:
    """A prompt's digest by its text alone, and with its images."""
    words = digest(plain(text(row["prompt"])))
    return words, digest(words, *(one.digest for one in looks)) if looks else words


def _row(seen: DatasetStatistics, row: Row, prompts: set[int], pictures: set[int]) -> None:
    seen.common(row)
    cells = row.get("images") or []
    looked = [look(cell) for cell in cells]
    looks = [one for one in looked if not isinstance(one, str)]
    for number, why in enumerate(looked):
        if isinstance(why, str):
            seen.note("pictures-broken", row, f"image {number} does not decode ({why})")
            break
    words, whole = prompt_digests(row, looks)
    seen.counts["images a row"][str(len(cells))] += 1
    for one in looks:
        seen.counts["format"][one.format] += 1
        seen.counts["size"]["{} x {}".format(*one.size)] += 1
    if whole in prompts or words in prompts:
        seen.note("held-out-prompts", row, text(row["prompt"]))
    if any(one.digest in pictures for one in looks):
        seen.note("held-out-pictures", row)
    _texts(seen, row, len(cells))
    chosen, rejected = text(row["chosen"]), text(row["rejected"])
    values = {"features": features(chosen) - features(rejected), "prompts": np.int64(whole)}
    values |= {"winners": np.int64(digest(chosen)), "losers": np.int64(digest(rejected))}
    values |= {"groups": np.int64(digest(row.get("group_id") or whole)), "margins": _margin(row)}
    seen.pair(row, row.get("chosen_model"), row.get("rejected_model"), **values)
    seen.uncertain += row.get("score_gap") is not None or row.get("probability") is not None


def _margin(row: Row) -> np.float64:
    return np.float64(np.nan if row.get("score_gap") is None else row["score_gap"])


def _texts(seen: DatasetStatistics, row: Row, images: int) -> None:
    """What is wrong with a row's texts."""
    prompt, chosen, rejected = (text(row[column]) for column in ("prompt", "chosen", "rejected"))
    empty = [side for side, words in (("chosen", chosen), ("rejected", rejected)) if not words.strip()]
    if empty:
        seen.note("empty-answers", row, f"{' and '.join(empty)} is empty")
    elif chosen.split() == rejected.split():
        seen.note("identical-sides", row, chosen)
    if not prompt.strip():
        seen.note("empty-prompts", row)
    token = next((found for part in (prompt, chosen, rejected) if (found := TOKENS.search(part))), None)
    if token:
        seen.note("tokens-in-text", row, token[0])
    if _asked(row["chosen"]) != _asked(row["rejected"]):
        seen.note("prompts-differ", row)
    places = sum(part["type"] == "image" for message in _messages(row["prompt"]) for part in _parts(message))
    if places not in (0, images):
        seen.note("images-misplaced", row, f"{images} images, {places} places")
    probability = row.get("probability")
    if (row.get("score_gap") or 0) < 0 or (probability is not None and probability <= 0.5):
        what = f"score_gap {row['score_gap']:g}" if (row.get("score_gap") or 0) < 0 else f"probability {probability:g}"
        seen.note("labels-against-evidence", row, f"chosen is called the better one, {what}")


def _messages(content: Any) -> list[dict[str, Any]]:
    return [] if isinstance(content, str) or not content else list(content)


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    return [] if isinstance(message["content"], str) else list(message["content"] or [])


def _asked(messages: Any) -> str:
    """What a side holds of others than the assistant; nothing, where all of the prompt stands in the prompt."""
    return text([message for message in _messages(messages) if message["role"] != "assistant"])


def features(answer: str) -> np.ndarray:
    """(len(FEATURES),)."""
    words = answer.strip()
    counts = [np.log1p(len(pattern.findall(answer))) for pattern in MARKUP.values()]
    unfinished = bool(words) and words[-1].isalnum()
    return np.array([np.log1p(len(words)), *counts, bool(REFUSAL.match(words)), unfinished], dtype=np.float32)


def run_checks(seen: DatasetStatistics) -> list[Finding]:
    """Findings of the whole set."""
    winners, losers, groups = seen.column("winners"), seen.column("losers"), seen.column("groups")
    found = repeated(seen.column("prompts"), winners, losers, seen.ids)
    differences = seen.column("features")
    length = differences[:, 0]
    finding = shortcut("length-shortcut", "length", told_by(length, groups), length, seen.ids)
    found += [one._replace(what=one.what + _with_margin(length, seen.column("margins"))) for one in finding]
    marked = [(told_by(differences[:, n], groups), n) for n in range(1, 6)]
    best, place = max(marked, key=lambda one: (one[0].sure, one[0].accuracy))
    found += shortcut("format-of-text-shortcut", FEATURES[place], best, differences[:, place], seen.ids)
    refusal = differences[:, FEATURES.index("refusal")]
    found += shortcut("refusal-shortcut", "refusal", told_by(refusal, groups), refusal, seen.ids, rare=True)
    return found + regression(differences, groups, seen.ids, FEATURES, FEATURES)


def _with_margin(length: np.ndarray, margins: np.ndarray) -> str:
    """How the gap in length goes with the margin, in words, where rows have one."""
    known = np.isfinite(margins)
    if known.sum() < 20 or length[known].std() == 0 or margins[known].std() == 0:
        return ""
    return f"; its correlation with the margin is {np.corrcoef(length[known], margins[known])[0, 1]:.2f}"
