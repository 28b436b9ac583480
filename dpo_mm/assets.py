"""Find bundled assets: tiny models, prompt lists, preference datasets, presets, recipes and pages.

In a checkout they are in folders next to the package (data/, recipes/, demos/). In an installed wheel they are inside it.
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
    "drawings-sd": "models/drawings-sd",
    "shapes-editor": "models/shapes-editor",
    "shapes-faithfulness": "shapes/faithfulness.parquet",
    "shapes-aesthetic": "shapes/aesthetic.parquet",
    "shapes-train": "shapes/prompts-train.txt",
    "shapes-held-out": "shapes/prompts-held-out.txt",
    "shapes-edits-train": "shapes/edits-train.parquet",
    "shapes-edits-held-out": "shapes/edits-held-out.parquet",
    "drawings-faithfulness": "drawings/faithfulness.parquet",
    "drawings-train": "drawings/prompts-train.csv",
    "drawings-held-out": "drawings/prompts-held-out.csv",
}
"""Path of each bundled asset in the data folder, by name."""


def data_folder() -> Path:
    """Return the folder of bundled data."""
    inside = _PACKAGE / "bundled"
    return inside if inside.is_dir() else _PACKAGE.parent / "data"


def presets_folder() -> Path:
    """Return the folder of recipe presets."""
    inside = _PACKAGE / "bundled" / "presets"
    return inside if inside.is_dir() else _PACKAGE.parent / "recipes" / "presets"


def recipes_folder() -> Path:
    """Return the folder of recipe scripts. A wheel only has the script whose judge a preset names."""
    inside = _PACKAGE / "bundled" / "recipes"
    return inside if inside.is_dir() else _PACKAGE.parent / "recipes"


def demos_folder() -> Path:
    """Return the folder of demo pages."""
    inside = _PACKAGE / "bundled" / "demos"
    return inside if inside.is_dir() else _PACKAGE.parent / "demos"


def path_for_others(name: str) -> str:
    """Return the absolute path of a bundled asset or of an existing file or folder, for code that runs in any folder.

    Any other name, such as a hub id, is returned unchanged.
    """
    path = resolve_asset(name)
    return str(Path(path).absolute()) if Path(path).exists() else path


def resolve_asset(name: str) -> str:
    """Return the path of a bundled model, prompt list or dataset. Any other name is returned unchanged.

    An existing file or folder of that name comes first.
    """
    return str(data_folder() / BUNDLED[name]) if name in BUNDLED and not Path(name).exists() else name
