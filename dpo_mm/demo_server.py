"""Serving a page of demos/ on this machine alone: no sharing, no analytics, no file but the page's own.

Gradio is needed here and nowhere else in the package; it comes with the extra `demo`.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dpo_mm.assets import demos_folder

SMALL = 256
"""Pixels; a picture with no longer side is enlarged with its pixels sharp."""
UPLOAD_LIMIT = 1
"""Bytes; a page that takes no file lets none be put on the disk."""
OWN = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
NOT_OURS = ("GRADIO_ALLOWED_PATHS", "GRADIO_SHARE", "GRADIO_SERVER_NAME", "GRADIO_MCP_SERVER")
STYLE = """
footer { display: none !important; }
.gradio-container { max-width: 1080px !important; width: 100% !important; margin: 0 auto !important; }
.gradio-container main { padding: 20px clamp(10px, 3vw, 28px) !important; }
.gradio-container .html-container { padding: 0 !important; }
.gradio-container { --quiet: color-mix(in srgb, var(--body-text-color) 72%, transparent); }
.head h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .15rem; }
.head p { margin: 0; color: var(--quiet); }
:focus-visible { outline: 3px solid var(--color-accent) !important; outline-offset: 2px; }
.small { image-rendering: pixelated; }
.prompt { unicode-bidi: isolate; overflow-wrap: anywhere; max-height: 7.5em; overflow-y: auto; }
"""


@dataclass(frozen=True)
class DemoPage:
    """A page as built: Gradio blocks, and what its style sheet and its head add."""

    blocks: Any
    css: str = ""
    head: str = ""
    upload_limit: int = UPLOAD_LIMIT


def load_page(name: str) -> Any:
    """The module of a page in demos/. Raises ValueError where Gradio or the page is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the pages need Gradio, which is not installed; pip install 'dpo-mm[demo]'")
    file = demos_folder() / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"dpo_mm_demo_{name}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ValueError(f"page {name!r} is not there; expected {file}")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def serve(build: Callable[[], DemoPage], *, port: int | None = None) -> None:
    """Serve a page until it is interrupted, from an empty folder of its own, so that no file of yours is in reach.

    build: called within that folder; whatever it needs from elsewhere must be named by full path.
    port: None takes the first free one from 7860. Raises OSError where the port is taken.
    """
    for name in NOT_OURS:
        os.environ.pop(name, None)
    os.environ.update(OWN)
    with tempfile.TemporaryDirectory(prefix="dpo-mm-demo-") as own:
        before, empty, files = Path.cwd(), Path(own) / "empty", Path(own) / "files"
        empty.mkdir()
        os.environ["GRADIO_TEMP_DIR"] = str(files)
        os.chdir(empty)
        try:
            page = build()
            _, address, _ = page.blocks.launch(
                server_name="0.0.0.0" if os.environ.get("SPACE_ID") else "127.0.0.1",
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                allowed_paths=[],
                max_file_size=page.upload_limit,
                footer_links=[],
                ssr_mode=False,
                mcp_server=False,
                enable_monitoring=False,
                theme=theme(),
                css=STYLE + page.css,
                head=page.head,
            )
            print(f"Open {address} (Ctrl-C ends it)", flush=True)
            page.blocks.block_thread()
        finally:
            os.chdir(before)


def theme() -> Any:
    """Colours and letters of every page; nothing is fetched from elsewhere."""
    import gradio as gr

    letters = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
    return gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="md",
        font=list(letters),
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    )


def safe(text: str) -> str:
    """Text for a page's HTML: inert as markup, as a JavaScript template and as a Handlebars template."""
    escaped = html.escape(text, quote=True)
    return escaped.translate({ord(sign): f"&#{ord(sign)};" for sign in "{}$`@\\"})


def img(image: Image.Image, *, alt: str) -> str:
    """A picture as an HTML element that holds it whole, as PNG: a lossy preview would have people judge compression."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    data = base64.b64encode(buffer.getvalue()).decode()
    small = ' class="small"' if max(image.size) <= SMALL else ""
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img{small} {size} alt="{safe(alt)}" draggable="false" src="data:image/png;base64,{data}">'
