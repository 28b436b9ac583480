"""What ships with the package: tiny base models, prompt lists and preference sets, found by name.

In a checkout they stand in data/ beside the package; in an installed wheel inside it.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent
BUNDLED = {
    "shapes-sd": "models/shapes-sd",
    "shapes-captioner": "models/shapes-captioner",
    "shapes-captioner-tuned": "models/shapes-captioner-tuned",
    "page-reader": "models/page-reader",
    "page-reader-tuned": "models/page-reader-tuned",
    "sums-writer": "models/sums-writer",
    "shapes-sd-faithful": "models/shapes-sd-faithful",
    "shapes-faithfulness": "shapes/faithfulness.parquet",
    "shapes-aesthetic": "shapes/aesthetic.parquet",
    "shapes-train": "shapes/prompts-train.txt",
    "shapes-held-out": "shapes/prompts-held-out.txt",
}


def data_folder() -> Path:
    """The folder of shipped data."""
    inside = _PACKAGE / "bundled"
    return inside if inside.is_dir() else _PACKAGE.parent / "data"


def presets_folder() -> Path:
    """The folder of recipe presets."""
    inside = _PACKAGE / "bundled" / "presets"
    return inside if inside.is_dir() else _PACKAGE.parent / "recipes" / "presets"


def recipes_folder() -> Path:
    """The folder of recipe scripts; a wheel has the one that a preset names a judge of."""
    inside = _PACKAGE / "bundled" / "recipes"
    return inside if inside.is_dir() else _PACKAGE.parent / "recipes"


def demos_folder() -> Path:
    """The folder of pages."""
    inside = _PACKAGE / "bundled" / "demos"
    return inside if inside.is_dir() else _PACKAGE.parent / "demos"


def resolve_asset(name: str) -> str:
    """The path of a shipped model, prompt list or set; any other name is returned as it is."""
    return str(data_folder() / BUNDLED[name]) if name in BUNDLED and not Path(name).exists() else name
