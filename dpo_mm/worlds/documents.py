"""The world of documents: small pages of text in real fonts, with their exact transcription.

A `DocumentPage` says what stands on it and how it is printed, `render` draws it, `transcription` is what a perfect reader
returns. Besides prose there is the material that makes readers repeat themselves: tables of contents with dotted
leaders, tables of zeros, words that are rightly repeated, long runs of digits. A page of the form "json" has a header
and a footer, and its transcription is an object of header, body and footer, as document readers emit.

Train and held-out pages are disjoint for every seed: prose comes from other works, and any other line belongs to one
side by its checksum. Characters: `CHARACTERS`, all a tokenizer must know. Fonts: DejaVu as matplotlib ships it, and
Aileron as Pillow does; no system font is needed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
import string
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dpo_mm.worlds.prose import HEADERS, HELD_OUT_PASSAGES, LABELS, PASSAGES, TITLES, WORDS

WIDTH, HEIGHT = 80, 80
MARGIN = 3
KINDS = ("prose", "leaders", "zeros", "repeats", "digits")
FORMS = ("text", "json")
PROMPTS = {"text": "Transcribe this page.", "json": "Transcribe this page as JSON with header, body and footer."}
CHARACTERS = "\n " + string.ascii_letters + string.digits + ".,;:!?'\"-—()" + "{}\\"
SIZES = (9, 10)
FACES = {
    "sans": "DejaVuSans.ttf",
    "sans bold": "DejaVuSans-Bold.ttf",
    "serif": "DejaVuSerif.ttf",
    "serif italic": "DejaVuSerif-Italic.ttf",
    "mono": "DejaVuSansMono.ttf",
    "aileron": None,  # Pillow's own
}
PAPERS = ((255, 255, 255), (250, 247, 238), (245, 240, 228), (240, 242, 246), (236, 236, 234))
JITTER = 5  # pixels that the text may stand right of and below its corner
OVERSAMPLE = 4
LEADING = 1.28  # line to line, in sizes
HELD_OUT_SHARE = 4  # one line in so many
LONG_RUN, LOST_RATE = re.compile(r"([^\n\\]{1,12}?)\1{2,}"), 0.8
"""What an older reader loses itself in, three rounds and eight characters or more, and how often it does."""


@dataclass(frozen=True)
class DocumentPage:
    """What stands on a page and how it is printed.

    lines: the body. header, footer: empty where there is none. size: pixels an em. x, y: pixels from the margin to the
    text. skew: degrees, anticlockwise. noise: sd of the grain, 0-255, drawn from `grain`. paper: RGB. ink: grey, 0-255.
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
    """What a perfect reader returns: the lines, or compact JSON of header, body and footer."""
    if page.form == "text":
        return "\n".join(line for line in (page.header, *page.lines, page.footer) if line)
    parts = {"header": page.header, "body": "\n".join(page.lines), "footer": page.footer}
    return json.dumps(parts, ensure_ascii=False, separators=(",", ":"))


def pseudo_labelled_transcription(page: DocumentPage, rng: np.random.Generator, length: int) -> str:
    """The transcription as an older reader made it, whose loops are of `length` characters.

    Sets of transcriptions are often the work of another reader. This one makes no mistake but one: once in a long run,
    of dots, zeros or words, it may not come out of it, and repeats it for as long as it is let.
    """
    text = transcription(page)
    for run in LONG_RUN.finditer(text):
        if len(run[0]) >= 8 and rng.random() < LOST_RATE:
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
    """`count` pages of mixed kinds; page n depends on seed, side and n alone. json_share: of the pages, [0, 1]."""
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
    """A page of one kind, two to five lines of body (fewer where fewer fit), all else drawn from `rng`.

    width, height: pixels. Raises ValueError for an unknown kind or form and for a page too small for its text.
    """
    if kind not in COMPOSERS or form not in FORMS:
        raise ValueError(f"page of kind {kind!r}, form {form!r}: expected a kind of {KINDS} and a form of {FORMS}")
    face, size = str(rng.choice(list(FACES))), int(rng.choice(SIZES))
    room = width - 2 * MARGIN
    header, footer = (_header(rng, face, size, room), _footer(rng)) if form == "json" else ("", "")
    most = min(5, int((height - 2 * MARGIN - _furniture(size, header, footer)) / (LEADING * size)))
    column = Column(face, size, room, held_out)
    if most < 2 or column.room < 7 * size:
        raise ValueError(f"page of {width}x{height} is too small for two lines; take 80x64 for text, 80x80 for json")
    lines = COMPOSERS[kind](rng, column, int(rng.integers(min(3 if kind == "zeros" else 2, most), most + 1)))
    return _printed(DocumentPage(kind, tuple(lines), form, header, footer, face, size, width, height), rng)


def _printed(page: DocumentPage, rng: np.random.Generator) -> DocumentPage:
    """The page with its place, skew, grain, paper and ink drawn from `rng`."""
    right = page.width - 2 * MARGIN - max(measure(line, page.face, page.size) for line in page.lines)
    down = page.height - 2 * MARGIN - _furniture(page.size, page.header, page.footer) - _tall(page)
    return dataclasses.replace(
        page,
        x=rng.uniform(0, min(right, JITTER)),
        y=rng.uniform(0, min(down, JITTER)),
        skew=rng.uniform(-1.2, 1.2),
        noise=rng.uniform(0, 7),
        grain=int(rng.integers(2**31)),
        paper=PAPERS[rng.integers(len(PAPERS))],
        ink=int(rng.integers(0, 70)),
    )


@dataclass(frozen=True)
class Column:
    """Where lines are set: face, size and room in pixels, and the side of the split that they must be of."""

    face: str
    size: int
    room: int
    held_out: bool

    def fits(self, line: str) -> bool:
        return measure(line, self.face, self.size) <= self.room

    def takes(self, line: str) -> bool:
        """Whether a line fits and is of this side."""
        return self.fits(line) and (zlib.crc32(line.encode()) % HELD_OUT_SHARE == 0) == self.held_out


def measure(line: str, face: str, size: int) -> float:
    """The width of a line in pixels. Raises ValueError where the face is unknown or its file is missing."""
    return _font(face, size * OVERSAMPLE).getlength(line) / OVERSAMPLE


@functools.cache
def _font(face: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if face not in FACES:
        raise ValueError(f"face {face!r} is unknown; expected one of {', '.join(FACES)}")
    name = FACES[face]
    if name is None:
        return ImageFont.load_default(size)
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", name)
    if not path.is_file():
        raise ValueError(
            f"face {face!r}: {path} is missing; matplotlib ships it: pip install --force-reinstall matplotlib"
        )
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def _prose(rng: np.random.Generator, column: Column, count: int) -> list[str]:
    """Consecutive words of one passage, broken where the column ends."""
    names = [name for name in PASSAGES if (name in HELD_OUT_PASSAGES) == column.held_out]
    while True:
        words = PASSAGES[str(rng.choice(names))].split()
        start = int(rng.integers(len(words) - 3 * count))
        lines = _broken(words[start:], column, count)
        if lines:
            return lines


def _broken(words: Sequence[str], column: Column, count: int) -> list[str]:
    """The first `count` lines that these words fill, or none where a word is too long or the words too few."""
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


def _drawn(line: Callable[[], str], column: Column, count: int) -> list[str]:
    """`count` lines from a maker of lines, those that the column takes."""
    lines: list[str] = []
    while len(lines) < count:
        candidate = line()
        if column.takes(candidate):
            lines.append(candidate)
    return lines


def _leaders(rng: np.random.Generator, column: Column, count: int) -> list[str]:
    """Lines of a table of contents, the dots running to the edge of the column: "Index ....... 41"."""

    def line() -> str:
        start = str(rng.choice(TITLES)) + (f" {rng.integers(1, 20)}" if rng.random() < 0.5 else "")
        dots, number = int(rng.integers(4, 9)), rng.integers(1, 400)
        while column.fits(f"{start} {'.' * (dots + 1)} {number}"):
            dots += 1
        return f"{start} {'.' * dots} {number}"

    return _drawn(line, column, count)


def _zeros(rng: np.random.Generator, column: Column, count: int) -> list[str]:
    """Rows of a table that is mostly zeros, all with as many cells of one format, some tables with labels."""
    cells, digits = int(rng.integers(3, 8)), int(rng.integers(3))
    labelled = rng.random() < 0.4
    while not column.fits("West" * labelled + cells * f" {0:.{digits}f}"):
        cells -= 1

    def line() -> str:
        values = rng.integers(1, 10, cells) * (rng.random(cells) < 0.25) * 10.0**-digits
        row = " ".join(f"{value:.{digits}f}" for value in values)
        return f"{rng.choice(LABELS)} {row}" if labelled else row

    return _drawn(line, column, count)


def _repeats(rng: np.random.Generator, column: Column, count: int) -> list[str]:
    """Words that are rightly repeated: "never never never gone", "tick tock, tick tock, tick tock"."""

    def line() -> str:
        words = rng.choice(WORDS, 2, replace=False)
        again = " ".join(words) if rng.random() < 0.4 else str(words[0])
        mark = str(rng.choice(["", "", ",", "!"]))
        end = f" {rng.choice(WORDS)}" if rng.random() < 0.4 else ""
        return f"{mark} ".join([again] * int(rng.integers(2, 7))) + end

    return _drawn(line, column, count)


def _digits(rng: np.random.Generator, column: Column, count: int) -> list[str]:
    """Long runs of digits, some of one digit or a few over and over."""

    def line() -> str:
        length = int(rng.integers(8, 20))
        block = rng.integers(0, 10, int(rng.integers(1, 5)) if rng.random() < 0.35 else length)
        run = "".join(str(digit) for digit in np.resize(block, length))
        own = "".join(str(digit) for digit in rng.integers(0, 10, 3))
        return run[:-3] + own

    return _drawn(line, column, count)


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


def _furniture(size: int, header: str, footer: str) -> float:
    """The height in pixels that header and footer take, each with half a line between it and the body."""
    return 1.5 * LEADING * size * (bool(header) + bool(footer))


def _tall(page: DocumentPage) -> float:
    return LEADING * page.size * len(page.lines)


def render(page: DocumentPage) -> Image.Image:
    """The page as an RGB image of its width and height, text anti-aliased, then skewed, then with its grain.

    Raises ValueError where the text does not fit the page.
    """
    large = (page.width * OVERSAMPLE, page.height * OVERSAMPLE)
    mask = Image.new("L", large)
    pen = ImageDraw.Draw(mask)
    font = _font(page.face, page.size * OVERSAMPLE)
    for x, y, line in _placed(page):
        pen.text((x * OVERSAMPLE, y * OVERSAMPLE), line, fill=255, font=font, anchor="lm")
    turned = mask.rotate(page.skew, Image.Resampling.BICUBIC)
    cover = np.asarray(turned.resize((page.width, page.height), Image.Resampling.BOX), dtype=np.float64) / 255
    grain = np.random.default_rng(page.grain).normal(0, page.noise, cover.shape) if page.noise else 0.0
    pixels = page.ink + (np.array(page.paper) - page.ink) * (1 - cover[..., None]) + np.expand_dims(grain, -1)
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def _placed(page: DocumentPage) -> list[tuple[float, float, str]]:
    """Where each line stands: x of its left end, y of its middle, in pixels; header and footer are centred."""
    advance = LEADING * page.size
    top = MARGIN + page.y + 1.5 * advance * bool(page.header)
    placed = [(MARGIN + page.x, top + (row + 0.5) * advance, line) for row, line in enumerate(page.lines)]
    for line, y in ((page.header, MARGIN + advance / 2), (page.footer, page.height - MARGIN - advance / 2)):
        if line:
            placed.append(((page.width - measure(line, page.face, page.size)) / 2, y, line))
    for x, _, line in placed:
        if x < 0 or x + measure(line, page.face, page.size) > page.width:
            raise ValueError(
                f"line {line!r} is wider than the page ({page.width} pixels); break it or take a larger page"
            )
    if top + _tall(page) + _furniture(page.size, "", page.footer) > page.height - MARGIN + 1e-6:
        raise ValueError(f"{len(page.lines)} lines do not fit {page.height} pixels; take fewer or a larger page")
    return placed


def characters(page: DocumentPage) -> Iterator[tuple[str, float, float, int, int]]:
    """Each character as it stands on the drawn page: itself, x and y of its middle in pixels, its line and column."""
    turn, cx, cy = math.radians(page.skew), page.width / 2, page.height / 2
    for row, (left, y, line) in enumerate(sorted(_placed(page), key=lambda placed: placed[1])):
        edges = [left + measure(line[:n], page.face, page.size) for n in range(len(line) + 1)]
        for column, (start, end) in enumerate(itertools.pairwise(edges)):
            dx, dy = (start + end) / 2 - cx, y - cy
            x, down = cx + dx * math.cos(turn) + dy * math.sin(turn), cy - dx * math.sin(turn) + dy * math.cos(turn)
            yield line[column], x, down, row, column
