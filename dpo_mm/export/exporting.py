"""Export a finished run into a new folder."""

from __future__ import annotations

from pathlib import Path

from dpo_mm.export.cards import export_card
from dpo_mm.export.finished_run import read_run
from dpo_mm.export.formats import FORMATS, check_format
from dpo_mm.files.checksums import complete_files
from dpo_mm.files.content_key import model_files_hash
from dpo_mm.files.outputs import OutputKind, output_folder, write_results
from dpo_mm.training.model_card import CARD

RECORD_FILE = "export.json"
EXPORT = OutputKind(RECORD_FILE, "exported", flag="output")


def export(
    run: str, to: str, output: str, *, published_as: str | None = None, overwrite: bool = False
) -> dict[str, str]:
    """Write a finished run in the format of another program, with a model card.

    Args:
        run: output folder of `train`, or the name of a bundled adapter.
        to: diffusers, kohya, merged or vllm.
        output: folder for the files. A finished export of the same run is not repeated.
        published_as: hub id that the card's code loads. None: the folder.
        overwrite: replace an earlier export into the folder.

    Returns:
        Lines to print, by name.

    Raises:
        ValueError: if the run is not finished, does not go with the format, or the folder is not for this export.
    """
    finished = read_run(run)
    check_format(finished, to)
    folder = Path(output)
    settings = {"run": str(run), "to": to, "content": model_files_hash(finished.folder), "published_as": published_as}
    with output_folder(folder, EXPORT, settings, inputs=[run, finished.model], overwrite=overwrite) as is_done:
        if is_done:
            return {"files": _describe(folder)}
        with write_results(folder) as temporary:
            lines = FORMATS[to](finished, temporary)
            card = export_card(finished, to, published_as or output, hub=bool(published_as))
            (temporary / CARD).write_text(card, encoding="utf-8")
        return {"files": _describe(folder), **lines}


def _describe(folder: Path) -> str:
    """Number and size of the exported files."""
    names = list(complete_files(folder))
    size = sum((folder / name).stat().st_size for name in names)
    return f"{len(names)}, {size / 1e6:,.1f} MB"
