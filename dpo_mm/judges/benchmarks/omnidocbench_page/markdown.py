"""Split a response, one page as Markdown, into the parts that are compared: paragraphs, formulas and tables.

Parts have a position, which tells the reading order. As published, that of a paragraph does not count the blank lines above it,
and that of a formula does.

Source: github.com/opendatalab/OmniDocBench (Apache-2.0), utils/extract.py.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dpo_mm.judges.benchmarks.omnidocbench_page.markdown_tables import has_rows, tables_as_html

Kind = Literal["text", "formula", "inline formula", "table", "LaTeX table"]
Span = tuple[int, int]
REMOVED = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (r"!\[(?>.*?\]\().*?\)", r"^```(?:markdown)\n?", r"^```html\n?", r"^```latex\n?", r"```\n?$")
)
"""Images and fences, removed one after the other."""
SHORTENED = ((re.compile("_{4,}"), "____"), (re.compile(" {4,}"), "    "))
DOCUMENT_TAGS = ("<html>", "</html>", "<body>", "</body>")
FORMULA = re.compile(r"\$\$(.*?)\$\$|\\\[(.*?)\\\]|\$(.*?)\$|\\\((.*?)\\\)", re.DOTALL)
WITH_OTHER_MARKS = re.compile(r"\$\$(.*?)\$\$|\$(.*?)\$|\\\((.*?)\\\)", re.DOTALL)
HTML_TABLE = re.compile(r"<table.*?</table>", re.DOTALL)
LATEX_TABLE = re.compile(r"\\begin\{table\}.*?\\end\{table\}", re.DOTALL)
CODE = re.compile(r"```\w+\n(.*?)```", re.DOTALL)
STYLES = (
    (re.compile(r"\\title\{([^}\n]*)\}"), lambda match: match[1]),
    (re.compile(r"\\title\s*+\{([^}]*)\}"), lambda match: match[1].strip()),
    (re.compile(r"\\text\s*+\{([^}]*)\}"), lambda match: match[1].strip()),
    (re.compile(r"\\section\*?\{([^}\n]*)\}"), lambda match: match[1]),
    (re.compile(r"\\section\*?\{([^}]*)\}"), lambda match: match[1].strip()),
)
"""Commands around a text, and what is left of them."""


@dataclass(frozen=True)
class Part:
    """Part of a response.

    Attributes:
        kind: what it is. A formula between single dollars is "inline", and its paragraph contains it too.
        position: where it begins, in characters.
        text: its content. A displayed formula stands between \\[ and \\].
    """

    kind: Kind
    position: int
    text: str


@dataclass(frozen=True)
class Delimiters:
    """Beginning and end of a table.

    Attributes:
        opening: pattern of its beginning.
        closing: text of its end.
        length: number of characters that are skipped at a beginning or an end.
        restart: number of characters after a beginning without an end from which the search starts again.
    """

    opening: str
    closing: str
    length: int
    restart: int


HTML = Delimiters(r"<table[^>]*>", "</table>", length=8, restart=16)
TABULAR = Delimiters(r"\\begin\{tabular\}", r"\end{tabular}", length=14, restart=16)
"""The published code takes one character more than `\\end{tabular}` has."""


def split_markdown(response: str) -> list[Part]:
    """Return the parts of a response by position."""
    text = _cleaned(response)
    spans = _latex_tables(text)
    parts = _parts("LaTeX table", text, spans)
    text = _blanked(text, spans)
    spans = _delimited(text, HTML)
    parts += _parts("table", text, spans)
    text = _blanked(text, spans)
    formulas = _formulas(text)
    parts += [part for part, _ in formulas]
    text = _blanked(text, [span for part, span in formulas if part.kind == "formula"])
    if has_rows(text):
        text = tables_as_html(text)
        spans = [match.span() for match in HTML_TABLE.finditer(text)]
        parts += _parts("table", text, spans)
        text = _blanked(text, spans)
    codes = list(CODE.finditer(text))
    parts += [Part("text", match.start(), match[1].strip()) for match in codes]
    parts += _paragraphs(_blanked(text, [match.span() for match in codes]))
    return sorted(parts, key=lambda part: part.position)


def _cleaned(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    for pattern in REMOVED:
        text = pattern.sub("", text)
    for pattern, shorter in SHORTENED:
        text = pattern.sub(shorter, text)
    for tag in DOCUMENT_TAGS:
        text = text.replace(tag, "")
    return text


def _parts(kind: Kind, text: str, spans: list[Span]) -> list[Part]:
    return [Part(kind, start, text[start:end].strip()) for start, end in spans]


def _blanked(text: str, spans: list[Span]) -> str:
    """Text with spaces instead of spans, so that positions stay what they are."""
    for start, end in spans:
        length = len(text[start:end])
        text = text[:start] + " " * length + text[end:]
    return text


def _latex_tables(text: str) -> list[Span]:
    spans = [match.span() for match in LATEX_TABLE.finditer(text)]
    return sorted([*spans, *_delimited(_blanked(text, spans), TABULAR)], key=lambda span: span[0])


def _delimited(text: str, delimiters: Delimiters) -> list[Span]:
    """Spans of outermost pairs of delimiters. The first beginning without an end is skipped, and the search starts again."""
    openings = [match.start() for match in re.finditer(f"(?={delimiters.opening})", text)]
    closings = [match.start() for match in re.finditer(f"(?={re.escape(delimiters.closing)})", text)]
    spans: list[Span] = []
    start: int | None = 0
    while start is not None and start < len(text) and closings and start <= closings[-1]:
        outermost, unclosed = _outermost(openings, closings, start, delimiters.length)
        spans += outermost
        start = None if unclosed is None else unclosed + delimiters.restart
    return spans


def _outermost(openings: list[int], closings: list[int], start: int, length: int) -> tuple[list[Span], int | None]:
    """Return the spans from a start on, and the outermost beginning without an end, if there is one."""
    spans: list[Span] = []
    stack: list[int] = []
    position = start
    while True:
        opening = _next(openings, position)
        closing = _next(closings, position)
        if opening is None and closing is None:
            return spans, stack[0] if stack else None
        if opening is not None and (closing is None or opening < closing):
            stack.append(opening)
            position = opening + length
        else:
            assert closing is not None
            position = closing + length
            if len(stack) == 1:
                spans.append((stack[0], position))
            del stack[-1:]


def _next(positions: list[int], start: int) -> int | None:
    number = bisect_left(positions, start)
    return positions[number] if number < len(positions) else None


def _formulas(text: str) -> list[tuple[Part, Span]]:
    """Formulas with their spans. One with dollars or \\( in it is inline, unless the dollars are double."""
    formulas = []
    for match in FORMULA.finditer(text):
        line = match[0].replace("\n", " ")
        inner = WITH_OTHER_MARKS.search(line)
        kind: Kind = "inline formula" if inner and not inner[1] else "formula"
        displayed = r"\\[\1\\]" if inner and inner[1] else r"\\[\2\3\\]"
        formulas.append((Part(kind, match.start(), WITH_OTHER_MARKS.sub(displayed, line)), match.span()))
    return formulas


def _paragraphs(text: str) -> Iterator[Part]:
    for command, content_of in STYLES:
        text = command.sub(content_of, text)
    position = 0
    for paragraph in text.split("\n\n" if "\n\n" in text else "\n"):
        content = "\n".join(line.strip() for line in paragraph.split("\n") if line.strip())
        if content.startswith("<table") and content.endswith("</table>"):
            yield Part("table", position, content)
        elif content.startswith("$") and content.endswith("$"):
            if content.replace("$", "").strip():
                yield Part("formula", position, content)
        elif content:
            yield Part("text", position, content)
        position += len(paragraph)
