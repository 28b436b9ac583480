"""Random pages and random facts about them, for `tests.bench.olmocr_rules`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

WORDS = [
    "the",
    "of",
    "Page",
    "7",
    "café",
    "ét",
    "naïve",
    "“quoted”",
    "it's",
    "it’s",
    "3–4",
    "a—b",
    "μ",
    "µm",
    "x_1",
    "snake_case",
    "*star",
    "1,200",
    "−5",
    "$",
    "12%",
    "[1]",
    "Fig.",
    "東京",
    "END",
]
MARKS = (
    "**{}**",
    "__{}__",
    "*{}*",
    "_{}_",
    "<b>{}</b>",
    "<i>{}</i>",
    "<strong>{}</strong>",
    "<em>{}</em>",
    "{}",
    "{}",
    "{}",
    "{}",
)
NOTES = ("[^{}]", "<sup>{}</sup>", "<SUP class='n'>{}</SUP>", "[^{}]: ")
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
CELLS = ("10", "20", "North", "South", "Q1", "Q2", "Sales **x**", "", "a", "12.5 %", "East–West", "1 000", "total")


def random_tests(rng: random.Random, count: int) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield random tests, each with a page."""
    makers = (_present, _order, _format, _footnote, _baseline, _table, _table)
    for number in range(count):
        test, page = rng.choice(makers)(rng)
        yield {"pdf": "a.pdf", "page": 1, "id": str(number), **test}, page


def _phrase(rng: random.Random, longest: int = 6) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))


def _text(rng: random.Random) -> str:
    parts = []
    for _ in range(rng.randint(1, 12)):
        part = rng.choice(MARKS).format(_phrase(rng))
        parts.append(
            rng.choice(("{}", "{}", "{}", "# {}\n", "\n## {}\n", "<h2 id='a'>{}</h2>", "- {}\n", "{}<br/>")).format(
                part
            )
        )
    return rng.choice((" ", "\n", "\n\n", "  ")).join(parts)


def _part(rng: random.Random, page: str) -> str:
    """A part of the page, possibly with other characters, or another phrase."""
    start = rng.randrange(max(1, len(page) - 5))
    part = page[start : start + rng.randint(3, 25)]
    if rng.random() < 0.25 or not part.strip():
        return _phrase(rng)
    for _ in range(rng.choice((0, 0, 1, 2))):
        place = rng.randrange(len(part))
        part = part[:place] + rng.choice(("", "x", "é")) + part[place + 1 :]
    return part if part.strip() else _phrase(rng)


def _present(rng: random.Random) -> tuple[dict[str, Any], str]:
    page = _text(rng)
    test: dict[str, Any] = {
        "type": rng.choice(("present", "absent")),
        "text": _part(rng, page),
        "max_diffs": rng.choice((0, 0, 1, 2)),
    }
    for name in ("first_n", "last_n"):
        if rng.random() < 0.2:
            test[name] = rng.randint(1, 60)
    if rng.random() < 0.3:
        test |= {"case_sensitive": False, "text": test["text"].swapcase()}
    return test, page


def _order(rng: random.Random) -> tuple[dict[str, Any], str]:
    page = _text(rng)
    return {
        "type": "order",
        "before": _part(rng, page),
        "after": _part(rng, page),
        "max_diffs": rng.choice((0, 0, 1, 2)),
    }, page


def _format(rng: random.Random) -> tuple[dict[str, Any], str]:
    page = _text(rng)
    test = {"type": "format", "text": _part(rng, page), "format": rng.choice(("heading", "bold", "italic"))}
    return {**test, "max_diffs": rng.choice((0, 1)), "case_sensitive": rng.random() < 0.7}, page


def _footnote(rng: random.Random) -> tuple[dict[str, Any], str]:
    marker, before, after = rng.choice(("1", "12", "a", "*")), _phrase(rng), _phrase(rng)
    note = rng.choice((*NOTES, marker.translate(SUPERSCRIPTS))).format(marker)
    page = f"{_text(rng)} {before}{rng.choice(('', ' '))}{note}{rng.choice(('', ' '))}{after} {_text(rng)}"
    test: dict[str, Any] = {"type": "footnote", "marker": rng.choice((marker, marker, "1"))}
    if rng.random() < 0.6:
        test["appears_before_marker"] = rng.choice((before, before, _part(rng, page)))
    if rng.random() < 0.6:
        test["appears_after_marker"] = rng.choice((after, after, _part(rng, page)))
    return {**test, "max_diffs": rng.choice((0, 1, 2))}, page


def _baseline(rng: random.Random) -> tuple[dict[str, Any], str]:
    loop = "".join(rng.choices("ab \n.", k=rng.randint(1, 6))) * rng.randint(25, 36)
    page = rng.choice(
        (_text(rng), "", "... !", _text(rng) + loop, "![a text](a.png) abc", "日本", "text 😀", "\U0001f680 go")
    )
    test: dict[str, Any] = {"type": "baseline"}
    if rng.random() < 0.3:
        test |= {"max_length": rng.randint(0, 30), "max_length_skips_image_alt_tags": rng.random() < 0.5}
    if rng.random() < 0.3:
        test["max_repeats"] = rng.randint(20, 40)
    return {**test, "check_disallowed_characters": rng.random() < 0.7}, page


def _table(rng: random.Random) -> tuple[dict[str, Any], str]:
    rows = [[rng.choice(CELLS) for _ in range(rng.randint(2, 4))] for _ in range(rng.randint(2, 5))]
    page = _text(rng) + "\n" + (_markdown(rng, rows) if rng.random() < 0.4 else _html(rng, rows)) + "\n" + _text(rng)
    test: dict[str, Any] = {
        "type": "table",
        "cell": rng.choice([cell for row in rows for cell in row if cell] or ["a"]),
    }
    for name in rng.sample(("up", "down", "left", "right", "top_heading", "left_heading"), rng.choice((0, 1, 1, 2))):
        test[name] = rng.choice([cell for row in rows for cell in row])
    return {**test, "max_diffs": rng.choice((0, 0, 1, 5)), "ignore_markdown_tables": rng.random() < 0.1}, page


def _markdown(rng: random.Random, rows: list[list[str]]) -> str:
    lines = [rng.choice(("| {} |", "|{}|", "{}")).format(" | ".join(row)) for row in rows]
    if rng.random() < 0.8:
        lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def _html(rng: random.Random, rows: list[list[str]]) -> str:
    lines = []
    for number, row in enumerate(rows):
        cells = ""
        for column, cell in enumerate(row):
            name = "th" if (number == 0 and rng.random() < 0.8) or (column == 0 and rng.random() < 0.3) else "td"
            spans = "".join(f' {span}="{rng.randint(2, 3)}"' for span in ("rowspan", "colspan") if rng.random() < 0.12)
            cells += f"<{name}{spans}>{rng.choice(('{}', '{}', '{}<br>n', ' {} ', '<b>{}</b>')).format(cell)}</{name}>"
        lines.append(f"<tr>{cells}</tr>")
    head = f"<thead>{lines[0]}</thead>" if rng.random() < 0.5 else lines[0]
    return f"<table>{head}{''.join(lines[1:])}</table>"
