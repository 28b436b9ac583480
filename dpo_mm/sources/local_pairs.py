"""Datasets as people have them: a dataset in another format is imported into the cache when it is used.

The cache has one folder per content: the dataset's tables and captions by their bytes, and its images and Parquet files by name,
size and time.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_mm import __version__
from dpo_mm.assets import BUNDLED, resolve_asset
from dpo_mm.data.schema import load_pairs
from dpo_mm.files.cache_folder import cache_folder, create_cache
from dpo_mm.files.content_key import content_hash
from dpo_mm.files.outputs import refuse_input
from dpo_mm.sources import SOURCES
from dpo_mm.sources.detect import SPLIT, Detected, detect_source
from dpo_mm.sources.importing import ImportResult, import_set, media_folder, origin_of
from dpo_mm.sources.input_files import files_of_rows
from dpo_mm.sources.parquet_writer import ChangedImportError

if TYPE_CHECKING:
    from datasets import Dataset


class LocalPairs(NamedTuple):
    """A dataset that the loader opens.

    Args:
        path: its path.
        kind: images or responses. "" if it was not imported.
        about: what it was taken for, and what was left out of it. "" if it was not imported.
    """

    path: str
    kind: str = ""
    about: str = ""

    def require(self, kind: str, name: str) -> str:
        """Return the path. Raise ValueError if the dataset has pairs of the other kind."""
        if self.kind and self.kind != kind:
            raise ValueError(
                f"{name}: has {self.kind} ({self.about}), and the model needs {kind}. Give pairs of {kind}, or another model"
            )
        return self.path


def local_pairs(path: str, *, columns: Mapping[str, str] | None = None, media_dir: str | None = None) -> LocalPairs:
    """Return a dataset in the row schema: the dataset itself, or its import in the cache.

    The import is what `dpo-mm import` writes. It resumes, and is made once for the same content.

    Args:
        path: a dataset in the row schema, or one that `detect_source` knows.
        columns: names of columns that the source knows, by the dataset's own names.
        media_dir: folder of the images that rows name. None: the dataset's folder.

    Raises:
        ValueError: if the dataset fits no source or several, or cannot be imported.
    """
    is_bundled = path in BUNDLED and not Path(path).exists()
    found = None if is_bundled else detect_source(path, columns=columns)
    if found is None:
        given = [name for name, value in (("columns", columns), ("media_dir", media_dir)) if value]
        if given:
            raise ValueError(
                f"{path}: has the columns of preference pairs already, so {given[0]} has no effect. Remove it"
            )
        return LocalPairs(resolve_asset(path))
    result = _import_once(path, found, columns or {}, media_dir)
    left_out = [f"{count:,} left out because {reason}" for reason, count in result.left_out.items()]
    what = f"{'row' if SOURCES[found.source].one_sided else 'pair'}{'s' * (result.rows != 1)}"
    about = ", ".join([found.words, f"{result.rows:,} {what}", *left_out])
    return LocalPairs(str(result.folder), SOURCES[found.source].kind, about)


def load_image_pairs(path: str, *, columns: Mapping[str, str] | None = None, media_dir: str | None = None) -> Dataset:
    """Load pairs of images as `load_pairs` does, from any dataset that `local_pairs` takes."""
    local = local_pairs(path, columns=columns, media_dir=media_dir)
    return load_pairs(local.require("images", path), dataset_name=path)


def _import_once(path: str, found: Detected, columns: Mapping[str, str], media_dir: str | None) -> ImportResult:
    """Import a dataset into the cache, unless it is there. Other processes that need it wait."""
    from filelock import FileLock

    path = str(Path(path).absolute()) if Path(path).exists() else path  # else a hub id
    media_dir = media_dir and str(Path(media_dir).absolute())
    origin = origin_of(found.source, path, split=SPLIT)
    media = media_folder(origin, media_dir)
    files = files_of_rows(origin, media) or {path: _revision(path)}
    key = content_hash([path, found.source, dict(columns), media_dir, __version__, files])
    folder = cache_folder() / "imports" / key
    refuse_input(folder, [path, media_dir], "Set DPO_MM_CACHE to a folder outside of it", is_folder=True)
    create_cache(folder.parent)
    with FileLock(folder.with_name(f"{key}.lock")):
        options: dict[str, Any] = {"split": SPLIT, "columns": columns, "media_dir": media_dir, "input_hash": key}
        try:
            return import_set(found.source, path, str(folder), **options)
        except ChangedImportError:
            shutil.rmtree(folder)
            return import_set(found.source, path, str(folder), **options)


def _revision(path: str) -> str:
    """Commit of a dataset on the hub."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(path).sha)
    except Exception as error:
        raise ValueError(f"{path}: neither a folder nor reachable on the hub ({type(error).__name__})") from error
