"""Server for the pages of demos/: this machine, or people with a link, no analytics, and no access to other files.

This is the only module of the package that needs Gradio, which the extra `demo` installs.
"""

from __future__ import annotations

import base64
import errno
import html
import importlib.util
import io
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image, ImageCms

from dpo_mm.assets import demos_folder
from dpo_mm.data.image_files import decode_image
from dpo_mm.pages.address import LOCAL, Serving, hosts_of, open_access
from dpo_mm.pages.guard import Guard, remove_old_files

FIRST_PORT = 7860
FOLDER_PREFIX, FOLDER_SECONDS = "dpo-mm-demo-", 60
"""Start of the names of temporary folders, and the age in seconds from which an unused one is removed."""
SWEEP_SECONDS = 60
"""Seconds between deletions of old files."""
MAX_SESSIONS, MAX_WAITING = 200, 100
"""Numbers of visitors whose state is stored, and of waiting events."""
QUEUE_SECONDS = 0.02
"""Seconds between two looks at an empty queue. With Gradio's 0.001, an unused page keeps the CPU busy."""
UPLOAD_LIMIT = 20_000_000
"""Largest uploaded file, in bytes."""
MAX_EDGE = 1024
"""Pixels to which the longer edge of an uploaded image is reduced."""
SMALL_IMAGE = 256
"""Pixels of the longer edge up to which an image is enlarged without smoothing."""
PHONE_STYLE = """<style>@media (max-width: 600px) {
.gradio-container > .main { padding: 0 !important; } .gradio-container main { padding: 10px !important; }
}</style>
"""
"""Style in the head of all pages. Gradio limits media queries of its argument `css` to what is inside its container."""
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""Arguments of an event that shows no progress and is not in the API."""
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
.dark { --color-accent: #a5b4fc; }
.cm-content span { color: inherit !important; }
.small { image-rendering: pixelated; }
.prompt { unicode-bidi: isolate; overflow-wrap: anywhere; max-height: 7.5em; overflow-y: auto; }
"""


@dataclass(frozen=True)
class DemoPage:
    """Page to serve: Gradio blocks, additional CSS and HTML for its head, and the upload limit in bytes (0: no uploads)."""

    blocks: Any
    css: str = ""
    head: str = ""
    upload_limit: int = 0


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


def serve(build: Callable[[], DemoPage], serving: Serving = LOCAL) -> None:
    """Serve a page from a temporary empty folder until it is interrupted.

    The empty folder keeps your files out of reach of the server. `Guard` refuses requests of other sites.

    Args:
        build: builds the page. It is called in the empty folder, so it must refer to other files by absolute path.
        serving: where and to whom.

    Raises:
        ValueError: as in `Serving.check` and `make_keys`.
        OSError: if the port is in use, or the host is not of this machine.
    """
    serving.check()
    for name in REMOVED_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(ENVIRONMENT)
    original, is_hosted = Path.cwd(), bool(os.environ.get("SPACE_ID") or os.environ.get("SPACE_HOST"))
    with page_folder() as folder, bind(serving.port, "0.0.0.0" if is_hosted else serving.host) as listener:
        empty, files = folder / "empty", folder / "files"
        number = listener.getsockname()[1]
        access, messages = open_access(serving, number)
        empty.mkdir()
        files.mkdir()
        os.environ["GRADIO_TEMP_DIR"] = str(files)
        os.chdir(empty)
        try:
            page = build()
            guard = Guard(
                application(page),
                hosts=frozenset(hosts_of(serving, number) | {os.environ.get("SPACE_HOST", "").lower()} - {""}),
                upload_limit=page.upload_limit,
                folder=files,
                frames=serving.allow_host,
                is_hosted=is_hosted,
                access=access,
            )
            with running(guard, listener) as thread:
                print("\n".join(messages), flush=True)
                while thread.is_alive():
                    thread.join(SWEEP_SECONDS)
                    remove_old_files(files, guard.built_files)
        finally:
            os.chdir(original)


def application(page: DemoPage) -> Any:
    """Return the ASGI application of a page. It stores little per visitor, and shows visitors no errors of the code."""
    import fastapi
    import gradio as gr

    blocks = page.blocks
    for component in blocks.blocks.values():
        if isinstance(component, gr.State):
            component.delete_callback = Forget()
    blocks.state_session_capacity = MAX_SESSIONS
    blocks._queue.pending_messages_per_session.max_size = MAX_SESSIONS
    blocks._queue.max_size = MAX_WAITING
    blocks._queue.sleep_when_free = QUEUE_SECONDS
    app = gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        path="/",
        show_error=False,
        allowed_paths=[],
        max_file_size=page.upload_limit or 1,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=theme(),
        css=STYLE + page.css,
        head=PHONE_STYLE + page.head,
    )
    blocks.is_running = True  # without it, Gradio stops the heartbeats of a page
    return app


class Forget:
    """Callback of a deleted state. Gradio prints it into the page's configuration, and a function would show an address."""

    def __call__(self, value: Any) -> None:
        return None

    def __repr__(self) -> str:
        return "forget"


@contextmanager
def running(app: Any, listener: socket.socket) -> Iterator[threading.Thread]:
    """Context manager that runs an ASGI application in a thread, and stops it at the end."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            time.sleep(0.01)
        yield thread
    finally:
        server.should_exit = True
        thread.join(5)


def bind(port: int | None, host: str) -> socket.socket:
    """Return a socket bound to a port, or to the first free port from FIRST_PORT.

    Raises:
        ValueError: if the host is not of this machine.
        OSError: if the port is in use, or no port is free.
    """
    for number in range(FIRST_PORT, FIRST_PORT + 100) if port is None else (port,):
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, number))
            listener.listen()
        except OSError as error:
            listener.close()
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise ValueError(
                    f"--host {host} is not an address of this machine. Choose another, or 0.0.0.0"
                ) from error
            if port is not None:
                reason = f"port {port} cannot be used ({error.strerror}). Choose another --port"
                raise OSError(error.errno, reason) from error
        else:
            return listener
    raise OSError(f"no port from {FIRST_PORT} to {FIRST_PORT + 99} is free. Choose one with --port")


@contextmanager
def page_folder() -> Iterator[Path]:
    """Context manager that gives a temporary folder for a page, and removes those that killed pages have left."""
    root = Path(tempfile.gettempdir())
    for folder in root.glob(f"{FOLDER_PREFIX}*"):
        try:
            stat = folder.lstat()
            is_own = not folder.is_symlink() and (not hasattr(os, "getuid") or stat.st_uid == os.getuid())
            if is_own and time.time() - stat.st_mtime > FOLDER_SECONDS:
                with FileLock(folder / "lock", timeout=0):
                    shutil.rmtree(folder, ignore_errors=True)
        except (OSError, Timeout):
            continue  # another page uses it, or another process removed it
    with tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX) as name, FileLock(Path(name) / "lock"):
        yield Path(name)


def theme() -> Any:
    """Return the colours and fonts of all pages. They are not downloaded."""
    import gradio as gr

    fonts = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
    base = gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="md",
        font=list(fonts),
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    )
    return base.set(  # Gradio's own colours have contrasts of 2.6 and 4.5 to one
        body_text_color_subdued="*neutral_600",
        block_info_text_color="*neutral_600",
        color_accent="*primary_600",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_700",
    )


def escape(text: str) -> str:
    """Escape text for HTML, so that it is neither markup nor a JavaScript or Handlebars template."""
    escaped = html.escape(text, quote=True)
    return escaped.translate({ord(character): f"&#{ord(character)};" for character in "{}$`@\\"})


def image_html(image: Image.Image, *, alt: str) -> str:
    """Return an HTML element with the image embedded as PNG. A lossy preview would show compression artefacts.

    The PNG has the pixels in sRGB and nothing else of the file: no profile, text, resolution or EXIF, which would tell
    apart the images of two models.
    """
    buffer = io.BytesIO()
    plain_srgb(image).save(buffer, "PNG", compress_level=3)
    data = base64.b64encode(buffer.getvalue()).decode()
    small = ' class="small"' if max(image.size) <= SMALL_IMAGE else ""
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img{small} {size} alt="{escape(alt)}" draggable="false" src="data:image/png;base64,{data}">'


def source_titles(count: int) -> list[str]:
    """Return the titles of images to edit."""
    return ["image to edit"] if count == 1 else [f"image {n} to edit" for n in range(1, count + 1)]


def uploaded_image(data: bytes) -> Image.Image:
    """Decode an uploaded image and reduce its size.

    Raises:
        gradio.Error: if the file is not an image or is too large. The page shows the message.
    """
    import gradio as gr

    try:
        image = decode_image(data)
    except ValueError as error:
        raise gr.Error(f"This file can’t be used: {escape(str(error))}.", print_exception=False) from error
    image.thumbnail((MAX_EDGE, MAX_EDGE))
    return image


def plain_srgb(image: Image.Image) -> Image.Image:
    """Convert an RGB image from its colour profile to sRGB, without any other information of the file."""
    pixels = Image.new("RGB", image.size)
    pixels.paste(image)
    profile = image.info.get("icc_profile")
    if not profile:
        return pixels
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(pixels, source, ImageCms.createProfile("sRGB")) or pixels
    except (ImageCms.PyCMSError, OSError, TypeError):
        return pixels  # a damaged profile, or one of another colour space than RGB
    converted.info.clear()
    return converted
