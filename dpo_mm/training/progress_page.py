"""A page with the curves of a run, which is written while it trains."""

from __future__ import annotations

import html
import logging
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dpo_mm.config import TrainConfig
from dpo_mm.files.checksums import write_with_checksum
from dpo_mm.printing.notebook_html import escaped, table_of_values
from dpo_mm.process.process_rank import process_rank
from dpo_mm.training.samples import SAMPLES_FOLDER, STRIP_FILE

logger = logging.getLogger(__name__)

PAGE = "progress.html"
SECONDS = 60.0
"""Time between two versions. A run that is shorter has no page."""
SHARE = 50
"""The page takes at most one part in this number of the time."""
POLICY = "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'"


class ProgressPageCallback(TrainerCallback):
    """Write PAGE into the output folder once per minute, and at the end if the run was longer than that.

    Args:
        config: settings of the run.
        summary: the run's summary.
    """

    def __init__(self, config: TrainConfig, summary: Mapping[str, str]) -> None:
        self.folder, self.summary = Path(config.output_dir), summary
        self.due = time.monotonic() + SECONDS
        self.is_written = False

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() >= self.due and process_rank().is_first:
            self._write(state, refresh=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_written:
            self._write(state, refresh=False)

    def _write(self, state: Any, *, refresh: bool) -> None:
        started = time.monotonic()
        has_strip = (self.folder / SAMPLES_FOLDER / STRIP_FILE).is_file()
        page = progress_page(
            self.folder.name, state.log_history, self.summary, step=state.global_step, steps=state.max_steps,
            refresh=refresh, strip=f"{SAMPLES_FOLDER}/{STRIP_FILE}" if has_strip else None,
        )  # fmt: skip
        try:
            with write_with_checksum(self.folder / PAGE) as temporary:
                temporary.write_text(page, encoding="utf-8")
            self.is_written = True
        except OSError as error:  # the run is worth more than its page
            logger.warning("%s: %s", self.folder / PAGE, error)
        ended = time.monotonic()
        self.due = ended + max(SECONDS, SHARE * (ended - started))


def progress_page(
    name: str,
    history: Sequence[dict[str, float]],
    summary: Mapping[str, str],
    *,
    step: int,
    steps: int,
    refresh: bool,
    strip: str | None = None,
) -> str:
    """Return the page of a run as HTML: its progress, the strip of its samples, its curves and its plan.

    Args:
        name: of the run.
        history: its log.
        summary: its summary.
        step, steps: steps so far, and all.
        refresh: the page loads itself again every minute.
        strip: path of the strip of samples next to the page.
    """
    from dpo_mm.evaluation.charts import history_charts

    style = resources.files("dpo_mm.evaluation").joinpath("report.html").read_text("utf-8")
    style = style.partition("<style>")[2].partition("</style>")[0]
    head = f'<meta http-equiv="refresh" content="{SECONDS:.0f}">' if refresh else ""
    charts = "".join(f"<div><h3>{escaped(chart.title)}</h3>{chart.svg}</div>" for chart in history_charts(history))
    samples = f'<p><img src="{html.escape(strip)}" alt="samples by step"></p>' if strip else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{head}<title>{escaped(name)}</title>'
        f"<style>{style} main {{ max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }} img {{ max-width: 100%; }}</style></head>"
        f"<body><main><h1>{escaped(name)}</h1><p>Step {step:,} of {steps:,}, written {time.strftime('%Y-%m-%d %H:%M')}</p>"
        f'{samples}<div class="charts">{charts}</div>{table_of_values("Plan", summary)}</main></body></html>\n'
    )
