"""Equations rendered by KaTeX in Chromium: what they look like, symbol by symbol.

One Chromium without a window renders all equations of a call, one after the other on one page. The page has no network, and the
LaTeX is an argument of KaTeX, which neither runs nor embeds what it contains.

The page has the layout of olmOCR-bench's: 800 by 400 pixels, 24 pixels per em, the equation in the middle, and no fonts of
KaTeX. So positions depend on the fonts of the machine, as they do there.

Source: github.com/allenai/olmocr (Apache-2.0), olmocr/bench/katex/render.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import re
import shutil
import threading
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from dpo_mm.data.benchmarks.extra_package import import_extra
from dpo_mm.errors import one_line

T = TypeVar("T")
SCRIPT, STYLE = "katex.min.js", "katex.min.css"
PACKAGE = "olmocr"
"""Package that carries KaTeX's files. Its requirements do not fit those of this project, so it is installed without them."""
PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
"""Browsers that are used if Playwright's own is not installed."""
VIEWPORT = {"width": 800, "height": 400}
SECONDS = 10.0
"""Time for one equation. One that takes longer counts as broken."""
START_SECONDS = 60.0
PAGE = """<!DOCTYPE html><html><head><style>
body { display: flex; justify-content: center; align-items: center; height: 100vh; margin: 0 }
#equation { font-size: 24px }
</style></head><body><div id="equation"></div></body></html>"""
RENDER = """latex => {
    const place = document.getElementById("equation");
    place.textContent = "";
    try {
        katex.render(latex, place, {displayMode: true, throwOnError: true});
    } catch (error) {
        return null;
    }
    const leaves = [...place.querySelectorAll("span")].filter(span => !span.children.length && span.textContent.trim());
    return {
        mathml: place.querySelector("math")?.outerHTML ?? "",
        texts: leaves.map(span => {
            const box = span.getBoundingClientRect();
            return [span.textContent, box.x, box.y, box.width, box.height];
        }),
    };
}"""
BLANK = re.compile("[\\s\u200a-\u200d\u2060\ufeff]+")
"""White space and characters without a width."""


class Symbol(NamedTuple):
    """A character of a rendered equation and its centre in pixels."""

    text: str
    x: float
    y: float


class Rendering(NamedTuple):
    """A rendered equation.

    Attributes:
        mathml: its MathML, without white space and its LaTeX.
        symbols: its characters, in the order of the page.
    """

    mathml: str
    symbols: tuple[Symbol, ...]


def find_katex(location: str) -> Path:
    """Return the folder with KaTeX's files: a location, or that of the package olmocr, which is not imported.

    Raises:
        ValueError: if a file is missing. It names the install line.
    """
    spec = None if location else importlib.util.find_spec(PACKAGE)
    packages = (spec.submodule_search_locations if spec else None) or []
    folders = [Path(location).expanduser()] if location else [Path(each) / "bench" / "katex" for each in packages]
    for folder in folders:
        if all((folder / file).is_file() for file in (SCRIPT, STYLE)):
            return folder
    where = f"{location} has no {SCRIPT} and {STYLE}. " if location else ""
    raise ValueError(
        f"{where}Equations are rendered with {SCRIPT} and {STYLE} of KaTeX. Run pip install --no-deps {PACKAGE}, or name the "
        "folder with both files after an @"
    )


class EquationBrowser:
    """Context manager that renders equations. Chromium runs until it is left.

    Raises:
        ValueError: if Playwright or a browser is not installed. It names the install line.
    """

    def __init__(self, katex: Path, *, seconds: float = SECONDS) -> None:
        self._katex, self._seconds = katex, seconds
        self._failure: type[Exception] = Exception
        self._playwright: Any = None
        self._browser: Any = None
        self._page: Any = None

    def __enter__(self) -> EquationBrowser:
        # A loop in its own thread, because notebooks and pages already run one in theirs.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="equations", daemon=True)
        self._thread.start()
        try:
            self._run(self._open())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def render(self, latex: str) -> Rendering | None:
        """Render an equation. None if KaTeX cannot read it, or takes too long."""
        answer = self._run(self._render(latex))
        if answer is None:
            return None
        symbols = tuple(symbol for span in answer["texts"] for symbol in _symbols(*span))
        return Rendering(presentation(answer["mathml"]), symbols)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _stop(self) -> None:
        with contextlib.suppress(Exception):
            self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self) -> None:
        playwright = import_extra("playwright.async_api", "playwright", extra="equations")
        self._failure = playwright.Error
        self._playwright = await playwright.async_playwright().start()
        self._browser = await self._launch()
        context = await self._browser.new_context(
            viewport=VIEWPORT, offline=True, service_workers="block", accept_downloads=False
        )
        await context.route("**/*", lambda route: route.abort())
        self._page = await context.new_page()
        await self._page.set_content(PAGE)
        await self._page.add_style_tag(path=self._katex / STYLE)
        await self._page.add_script_tag(path=self._katex / SCRIPT)
        if not await self._page.evaluate("typeof katex === 'object' && typeof katex.render === 'function'"):
            raise ValueError(f"{self._katex / SCRIPT} is not KaTeX. Copy the file of a KaTeX release")

    async def _launch(self) -> Any:
        launch = self._playwright.chromium.launch
        try:
            return await launch(timeout=1000 * START_SECONDS)
        except self._failure as error:
            path = next((program for name in PROGRAMS if (program := shutil.which(name))), None)
            if path is None:
                raise ValueError(
                    f"Chromium cannot be started ({one_line(error)[:120]}). Run playwright install chromium"
                ) from None
        try:
            return await launch(timeout=1000 * START_SECONDS, executable_path=path)
        except self._failure as error:
            raise ValueError(
                f"{path} cannot be started ({one_line(error)[:120]}). Run playwright install chromium"
            ) from None

    async def _render(self, latex: str) -> Any:
        try:
            return await asyncio.wait_for(self._page.evaluate(RENDER, latex), self._seconds)
        except (TimeoutError, self._failure):  # the page is still busy, or has crashed
            await self._close()
            await self._open()
            return None

    async def _close(self) -> None:
        browser, playwright, self._browser, self._playwright = self._browser, self._playwright, None, None
        if browser:
            await browser.close()
        if playwright:
            await playwright.stop()


def presentation(mathml: str) -> str:
    """Return the part of MathML that is shown, without white space."""
    soup: Any = import_extra("bs4", "beautifulsoup4").BeautifulSoup(mathml, "xml")
    shown = soup.find("semantics") or soup
    return BLANK.sub("", "".join(str(part) for part in shown.contents if getattr(part, "name", None) != "annotation"))


def _symbols(text: str, x: float, y: float, width: float, height: float) -> list[Symbol]:
    """Divide a span's box equally among its characters that are not blank."""
    text = BLANK.sub("", text)
    each = width / max(1, len(text))
    return [Symbol(text[n], x + width * n / len(text) + each / 2, y + height / 2) for n in range(len(text))]
