"""Synthetic documents: small pages of text in real fonts, with their exact transcription.

A `DocumentPage` describes the text of a page and its layout, `render` renders it, and `transcription` is the ground
truth. Besides prose there is material that makes OCR models repeat themselves: tables of contents with dotted leaders,
tables of zeros, words that are rightly repeated, long runs of digits. A page of the form "json" has a header and a
footer, and its transcription is an object of header, body and footer, as document models emit.

Train and held-out pages are disjoint for every seed: prose comes from other works, and the checksum of any other line
assigns it to one split. A tokenizer must know `CHARACTERS`. Fonts: DejaVu from matplotlib and Aileron from Pillow, so no
system font is needed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import string
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from dpo_mm.worlds.faces import FACES, OVERSAMPLE, font_of, measure
from dpo_mm.worlds.prose import HEADERS, HELD_OUT_PASSAGES, LABELS, PASSAGES, TITLES, WORDS

WIDTH, HEIGHT = 80, 80
MARGIN = 3
KINDS = ("prose", "leaders", "zeros", "repeats", "digits")
FORMS = ("text", "json")
PROMPTS = {"text": "Transcribe this page.", "json": "Transcribe this page as JSON with header, body and footer."}
CHARACTERS = "\n " + string.ascii_letters + string.digits + ".,;:!?'\"-—()" + "{}\\"
SIZES = (9, 10)
PAPERS = ((255, 255, 255), (250, 247, 238), (245, 240, 228), (240, 242, 246), (236, 236, 234))
JITTER = 5  # largest offset of the text from its corner, in pixels
LEADING = 1.28  # distance between lines, in font sizes
HELD_OUT_DIVISOR = 4  # one line in this many is held out
LONG_RUN, LOOP_RATE = re.compile(r"([^\n\\]{1,12}?)\1{2,}"), 0.8
"""Runs (three repeats or more) in which the pseudo-labelling model loops, and how often it does if they have 8 characters."""


@dataclass(frozen=True)
class DocumentPage:
    """Text and layout of a page.

    Attributes:
        kind, form, face: one of KINDS, FORMS and FACES.
        lines: the body.
        header, footer: empty if there is none.
        size: font size, pixels per em.
        width, height: of the page, in pixels.
        x, y: offset of the text from the margin, in pixels.
        skew: degrees, anticlockwise.
        noise: standard deviation of the grain, 0-255.
        grain: seed of the grain.
        paper, ink: RGB and grey, 0-255.
    """

    kind: str
    lines: tuple[str, ...]
    form: str = "text"
    header: str = ""
    footer: str = ""
    face: str = "sans"
    size: int = 10
    width: int = WIDTH
    height: int = HEIGHT
    x: float = 0.0
    y: float = 0.0
    skew: float = 0.0
    noise: float = 0.0
    grain: int = 0
    paper: tuple[int, int, int] = (255, 255, 255)
    ink: int = 20


def transcription(page: DocumentPage) -> str:
    """Ground truth of a page: the lines, or compact JSON of header, body and footer."""
    if page.form == "text":
        return "\n".join(line for line in (page.header, *page.lines, page.footer) if line)
    parts = {"header": page.header, "body": "\n".join(page.lines), "footer": page.footer}
    return json.dumps(parts, ensure_ascii=False, separators=(",", ":"))


def pseudo_labelled_transcription(page: DocumentPage, rng: np.random.Generator, length: int) -> str:
    """Transcription by an older OCR model, with loops up to a total of `length` characters.

    Datasets of transcriptions are often the output of another model. This one has a single kind of error: in a long run
    of dots, zeros or words it may start to loop, and then repeats the run until the length limit.
    """
    text = transcription(page)
    for run in LONG_RUN.finditer(text):
        if len(run[0]) >= 8 and rng.random() < LOOP_RATE:
            return text[: run.end()] + (run[1] * length)[: max(0, length - run.end())]
    return text


def pages(
    count: int,
    seed: int,
    *,
    held_out: bool = False,
    kinds: Sequence[str] = KINDS,
    json_share: float = 0.3,
    width: int = WIDTH,
    height: int = HEIGHT,
) -> Iterator[DocumentPage]:
    """Generate `count` pages of mixed kinds. Page n depends only on the seed, the split, n and the other arguments.

    Args:
        count, seed: number of pages, seed of the generator.
        held_out: the split.
        kinds: kinds to choose from.
        json_share: fraction of JSON pages, [0, 1].
        width, height: of the pages, in pixels.
    """
    for number in range(count):
        rng = np.random.default_rng((seed, int(held_out), number))
        form = "json" if rng.random() < json_share else "text"
        kind = str(rng.choice(list(kinds)))
        yield sample_page(kind, rng, form=form, held_out=held_out, width=width, height=height)


def sample_page(
    kind: str,
    rng: np.random.Generator,
    *,
    form: str = "text",
    held_out: bool = False,
    width: int = WIDTH,
    height: int = HEIGHT,
) -> DocumentPage:
    """Sample a page of one kind, with two to five lines of body, or fewer if no more fit.

    Args:
        kind, form: one of KINDS and FORMS.
        rng: generator of everything that is not specified.
        held_out: the split.
        width, height: of the page, in pixels.

    Raises:
        ValueError: if the kind or form is unknown, or the page is too small for two lines.
    """
    if kind not in COMPOSERS or form not in FORMS:
        raise ValueError(f"page of kind {kind!r}, form {form!r}: expected a kind of {KINDS} and a form of {FORMS}")
    face, size = str(rng.choice(list(FACES))), int(rng.choice(SIZES))
    room = width - 2 * MARGIN
    header, footer = (_header(rng, face, size, room), _footer(rng)) if form == "json" else ("", "")
    max_lines = min(5, int((height - 2 * MARGIN - _extra_height(size, header, footer)) / (LEADING * size)))
    column = Column(face, size, room, held_out)
    if max_lines < 2 or column.room < 7 * size:
        raise ValueError(f"page of {width}x{height} is too small for two lines. Use 80x64 for text and 80x80 for json.")
    lines = COMPOSERS[kind](rng, column, int(rng.integers(min(3 if kind == "zeros" else 2, max_lines), max_lines + 1)))
    return _with_random_print(DocumentPage(kind, tuple(lines), form, header, footer, face, size, width, height), rng)


def _with_random_print(page: DocumentPage, rng: np.random.Generator) -> DocumentPage:
    """Sample the position, skew, grain, paper and ink of a page."""
    free_width = page.width - 2 * MARGIN - max(measure(line, page.face, page.size) for line in page.lines)
    free_height = page.height - 2 * MARGIN - _extra_height(page.size, page.header, page.footer) - _body_height(page)
    return dataclasses.replace(
        page,
        x=rng.uniform(0, min(free_width, JITTER)),
        y=rng.uniform(0, min(free_height, JITTER)),
        skew=rng.uniform(-1.2, 1.2),
        noise=rng.uniform(0, 7),
        grain=int(rng.integers(2**31)),
        paper=PAPERS[rng.integers(len(PAPERS))],
        ink=int(rng.integers(0, 70)),
    )


@dataclass(frozen=True)
class Column:
    """Column in which lines are set.

    Attributes:
        face, size: the font.
        room: width, in pixels.
        held_out: the split that its lines must belong to.
    """

    face: str
    size: int
    room: int
    held_out: bool

    def fits(self, line: str) -> bool:
        """Check if a line fits the column."""
        return measure(line, self.face, self.size) <= self.room

    def accepts(self, line: str) -> bool:
        """Check if a line fits and belongs to this split."""
        return (zlib.crc32(line.encode()) % HELD_OUT_DIVISOR == 0) == self.held_out and self.fits(line)


def _prose(rng: np.random.Generator, column: Column, count: int) -> list[str]:
    """Consecutive words of one passage, wrapped at the width of the column."""
    names = [name for name in PASSAGES if (name in HELD_OUT_PASSAGES) == column.held_out]
    while True:
        words = PASSAGES[str(rng.choice(names))].split()
        start = int(rng.integers(len(words) - 3 * count))
        lines = _wrap(words[start:], column, count)
        if lines:
            return lines


def _wrap(words: Sequence[str], column: Column, count: int) -> list[str]:
    """First `count` lines of the wrapped words, or no line if a word is too long or there are too few words."""
    lines, line = [], ""
    for word in words:
        if not column.fits(word):
            return []
        if column.fits(f"{line} {word}".lstrip()):
            line = f"{line} {word}".lstrip()
            continue
        lines.append(line)
        line = word
        if len(lines) == count:
            return lines
    return []


def _sample_lines(sample: Callable[[], str], column: Column, count: int) -> list[str]:
    """Sample lines until the column has accepted `count` of them."""
    lines: list[str] = []
    while len(lines) < count:
        candidate = sample()
        if column.accepts(candidate):
            lines.append(candidate)
    return lines


def _leaders(rng: np.random.Generator, column: Column, count: int) -> list[str]:
    """Lines of a table of contents, with dots up to the edge of the column: "Index ....... 41"."""

    def line() -> str:
        start = str(rng.choice(TITLES)) + (f" {rng.integers(1, 20)}" if rng.random() < 0.5 else "")
        dots, number = int(rng.integers(4, 9)), rng.integers(1, 400)
        while column.fits(f"{start} {'.' * (dots + 1)} {number}"):
            dots += 1
        return f"{start} {'.' * dots} {number}"

    return _sample_lines(line, column, count)


def _zeros(rng: np.random.Generator, column: Column, count: int) -> list[str]:
    """Rows of a table of mostly zeros, with the same number and format of cells. Some tables have labels."""
    cells, digits = int(rng.integers(3, 8)), int(rng.integers(3))
    labelled = rng.random() < 0.4
    while not column.fits("West" * labelled + cells * f" {0:.{digits}f}"):
        cells -= 1

    def line() -> str:
        values = rng.integers(1, 10, cells) * (rng.random(cells) < 0.25) * 10.0**-digits
        row = " ".join(f"{value:.{digits}f}" for value in values)
        return f"{rng.choice(LABELS)} {row}" if labelled else row

    return _sample_lines(line, column, count)


def _repeats(rng: np.random.Generator, column: Column, count: int) -> list[str]:
    """Words that are rightly repeated: "never never never gone", "tick tock, tick tock, tick tock"."""

    def line() -> str:
        words = rng.choice(WORDS, 2, replace=False)
        unit = " ".join(words) if rng.random() < 0.4 else str(words[0])
        mark = str(rng.choice(["", "", ",", "!"]))
        end = f" {rng.choice(WORDS)}" if rng.random() < 0.4 else ""
        return f"{mark} ".join([unit] * int(rng.integers(2, 7))) + end

    return _sample_lines(line, column, count)


def _digits(rng: np.random.Generator, column: Column, count: int) -> list[str]:
    """Long runs of digits, some of them a repeated block of one to four digits."""

    def line() -> str:
        length = int(rng.integers(8, 20))
        block = rng.integers(0, 10, int(rng.integers(1, 5)) if rng.random() < 0.35 else length)
        run = "".join(str(digit) for digit in np.resize(block, length))
        ending = "".join(str(digit) for digit in rng.integers(0, 10, 3))
        return run[:-3] + ending

    return _sample_lines(line, column, count)


Composer = Callable[[np.random.Generator, Column, int], list[str]]
COMPOSERS: dict[str, Composer] = {
    "prose": _prose,
    "leaders": _leaders,
    "zeros": _zeros,
    "repeats": _repeats,
    "digits": _digits,
}


def _header(rng: np.random.Generator, face: str, size: int, room: int) -> str:
    names = [name for name in HEADERS if measure(f"{name} 40", face, size) <= room]
    name = str(rng.choice(names))
    return f"{name} {rng.integers(1, 40)}" if rng.random() < 0.6 else name


def _footer(rng: np.random.Generator) -> str:
    number = int(rng.integers(1, 300))
    return str(rng.choice([f"Page {number}", f"- {number} -", f"p. {number}", f"({number})"]))


def _extra_height(size: int, header: str, footer: str) -> float:
    """Height of header and footer in pixels, each with half a line between it and the body."""
    return 1.5 * LEADING * size * (bool(header) + bool(footer))


def _body_height(page: DocumentPage) -> float:
    return LEADING * page.size * len(page.lines)


def render(page: DocumentPage) -> Image.Image:
    """Render a page as an RGB image: anti-aliased text, then skew, then grain.

    Raises:
        ValueError: if the text does not fit the page.
    """
    large = (page.width * OVERSAMPLE, page.height * OVERSAMPLE)
    mask = Image.new("L", large)
    pen = ImageDraw.Draw(mask)
    font = font_of(page.face, page.size * OVERSAMPLE)
    for x, y, line in _positioned_lines(page):
        pen.text((x * OVERSAMPLE, y * OVERSAMPLE), line, fill=255, font=font, anchor="lm")
    rotated = mask.rotate(page.skew, Image.Resampling.BICUBIC)
    coverage = np.asarray(rotated.resize((page.width, page.height), Image.Resampling.BOX), dtype=np.float64) / 255
    grain = np.random.default_rng(page.grain).normal(0, page.noise, coverage.shape) if page.noise else 0.0
    pixels = page.ink + (np.array(page.paper) - page.ink) * (1 - coverage[..., None]) + np.expand_dims(grain, -1)
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def _positioned_lines(page: DocumentPage) -> list[tuple[float, float, str]]:
    """Lines with x of the left end and y of the middle, in pixels. Header and footer are centred."""
    advance = LEADING * page.size
    top = MARGIN + page.y + 1.5 * advance * bool(page.header)
    lines = [(MARGIN + page.x, top + (row + 0.5) * advance, line) for row, line in enumerate(page.lines)]
    for line, y in ((page.header, MARGIN + advance / 2), (page.footer, page.height - MARGIN - advance / 2)):
        if line:
            lines.append(((page.width - measure(line, page.face, page.size)) / 2, y, line))
    for x, _, line in lines:
        if x < 0 or x + measure(line, page.face, page.size) > page.width:
            raise ValueError(
                f"line {line!r} is wider than the page ({page.width} pixels). Wrap it or use a larger page."
            )
    if top + _body_height(page) + _extra_height(page.size, "", page.footer) > page.height - MARGIN + 1e-6:
        raise ValueError(f"{len(page.lines)} lines do not fit {page.height} pixels. Use fewer lines or a larger page.")
    return lines


def characters(page: DocumentPage) -> Iterator[tuple[str, float, float, int, int]]:
    """List each character of a rendered page: itself, x and y of its centre in pixels, its line and column."""
    turn, cx, cy = math.radians(page.skew), page.width / 2, page.height / 2
    for row, (left, y, line) in enumerate(sorted(_positioned_lines(page), key=lambda positioned: positioned[1])):
        edges = [left + measure(line[:n], page.face, page.size) for n in range(len(line) + 1)]
        for column, (start, end) in enumerate(itertools.pairwise(edges)):
            dx, dy = (start + end) / 2 - cx, y - cy
            x, down = cx + dx * math.cos(turn) + dy * math.sin(turn), cy - dx * math.sin(turn) + dy * math.cos(turn)
            yield line[column], x, down, row, column
