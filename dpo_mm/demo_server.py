"""Local server for the pages of demos/: only this machine, no sharing, no analytics, and no access to other files.

This is the only module of the package that needs Gradio, which the extra `demo` installs.
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

SMALL_IMAGE = 256
"""Pixels of the longer edge up to which an image is enlarged without smoothing."""
UPLOAD_LIMIT = 1
"""Bytes. A page without uploads stores no file on disk."""
ENVIRONMENT = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
REMOVED_VARIABLES = ("GRADIO_ALLOWED_PATHS", "GRADIO_SHARE", "GRADIO_SERVER_NAME", "GRADIO_MCP_SERVER")
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
    """Page to serve: Gradio blocks, additional CSS, additional HTML for its head, and the upload limit in bytes."""

    blocks: Any
    css: str = ""
    head: str = ""
    upload_limit: int = UPLOAD_LIMIT


def load_page(name: str) -> Any:
    """Import the module of a page in demos/.

    Raises:
        ValueError: if Gradio is not installed, or there is no such page.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the pages need Gradio, which is not installed. Run pip install 'dpo-mm[demo]'")
    file = demos_folder() / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"dpo_mm_demo_{name}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ValueError(f"there is no page {name!r}. Expected {file}")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def serve(build: Callable[[], DemoPage], *, port: int | None = None) -> None:
    """Serve a page from a temporary empty folder until it is interrupted.

    The empty folder keeps your files out of reach of the server.

    Args:
        build: builds the page. It is called in the empty folder, so it must refer to other files by absolute path.
        port: None: the first free port from 7860.

    Raises:
        OSError: if the port is in use.
    """
    for name in REMOVED_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory(prefix="dpo-mm-demo-") as folder:
        original, empty, files = Path.cwd(), Path(folder) / "empty", Path(folder) / "files"
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
            print(f"Open {address} (stop with Ctrl-C)", flush=True)
            try:
                page.blocks.block_thread()
            finally:
                page.blocks.close(verbose=False)
        finally:
            os.chdir(original)


def theme() -> Any:
    """Return the colours and fonts of all pages. They are not downloaded."""
    import gradio as gr

    fonts = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
    return gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="md",
        font=list(fonts),
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    )


def escape(text: str) -> str:
    """Escape text for HTML, so that it is neither markup nor a JavaScript or Handlebars template."""
    escaped = html.escape(text, quote=True)
    return escaped.translate({ord(character): f"&#{ord(character)};" for character in "{}$`@\\"})


def image_html(image: Image.Image, *, alt: str) -> str:
    """Return an HTML element with the image embedded as PNG. A lossy preview would show compression artefacts."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    data = base64.b64encode(buffer.getvalue()).decode()
    small = ' class="small"' if max(image.size) <= SMALL_IMAGE else ""
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img{small} {size} alt="{escape(alt)}" draggable="false" src="data:image/png;base64,{data}">'
