"""Images of a saved comparison on a page, with filters, and the figures and scores of the page that compares images."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from dpo_mm.data.clips import clip_preview
from dpo_mm.data.image_files import decode_image
from dpo_mm.data.row_paths import read_regular_file
from dpo_mm.evaluation.saved_comparison import OUTCOMES, ImagePair, SavedComparison
from dpo_mm.judges import metric_of
from dpo_mm.pages.server import QUIET, SMALL_IMAGE, escape, image_html, source_titles

PAGE_SIZE_SMALL, PAGE_SIZE_LARGE = 12, 4
"""Number of pairs of a saved comparison that are added at a time, for small images and for others."""
SCORE_LABELS = {
    "faithfulness": ("does not match the prompt", "matches the prompt"),
    "edit_followed": ("does not follow the instruction", "follows the instruction"),
    "edit_preserved": ("changes the rest", "preserves the rest"),
}
"""Text for the scores 0 and 1 of a judge."""
MISSING = '<div class="blank">file is missing or broken</div>'


def score_html(judge: str, value: float) -> str:
    """Return a score as text if SCORE_LABELS has one for it, otherwise as a number."""
    if judge in SCORE_LABELS and value in (0.0, 1.0):
        n = int(value)
        return f'<span class="score {("no", "yes")[n]}">{"✗✓"[n]} {SCORE_LABELS[judge][n]}</span>'
    return f'<span class="score">{escape(metric_of(judge))} {value:.3f}</span>'


def figures_html(figures: Sequence[str], *, scrolls: str = "") -> str:
    """Return a row of figures. `scrolls` is the label of a row that is wider than a phone, for the keyboard."""
    attributes = f' tabindex="0" role="group" aria-label="{escape(scrolls)}"' if scrolls else ""
    return f'<div class="figures"{attributes}>{"".join(figures)}</div>'


def file_html(title: str, file: Path | None, scores: str = "", frames: int = 1) -> str:
    """Return an image of a saved comparison, or frames of a clip, with its title and scores."""
    try:
        image = image_html(clip_preview(decode_image(read_regular_file(file)), frames), alt=title) if file else MISSING
    except (ValueError, OSError):
        image = MISSING
    return f"<figure>{image}<figcaption><b>{title}</b>{scores}</figcaption></figure>"


def saved_pair_html(pair: ImagePair) -> str:
    """Return the images of base and tuned for one prompt and seed, with the scores saved by the comparison."""
    sources = [
        file_html(title, file) for title, file in zip(source_titles(len(pair.sources)), pair.sources, strict=True)
    ]
    figures = []
    for n, (title, file) in enumerate((("base", pair.base), ("tuned", pair.tuned))):
        scores = "".join(score_html(judge, values[n]) for judge, values in pair.scores.items())
        figures.append(file_html(title, file, scores, pair.frames))
    rows = [sources, figures] if len(sources) > 1 else [sources + figures]
    rows = [[figure] for figure in figures] if pair.frames > 1 else rows
    return (
        f'<article><h3 dir="auto">{escape(pair.prompt)}</h3>{"".join(map(figures_html, rows))}'
        f'<div class="score">seed {pair.seed}</div></article>'
    )


def gallery_html(
    comparison: SavedComparison, num_shown: int, judge: str, category: str, outcome: str, order: str
) -> str:
    """Return the first pairs that pass the filters, with their number."""
    pairs = comparison.select(judge, category=category, outcome=outcome, by_change=order == "largest change")
    count = (
        f"{min(num_shown, len(pairs))} of {len(pairs)} pairs, {len(comparison.pairs)} in all. "
        "The outcome is the judge’s, seed by seed."
    )
    return f'<p class="quiet">{count}</p><div class="pairs">{"".join(map(saved_pair_html, pairs[:num_shown]))}</div>'


def add_gallery(comparison: SavedComparison) -> None:
    """Add the images of a saved comparison to the page, with filters."""
    import gradio as gr

    is_small = max(decode_image(read_regular_file(comparison.pairs[0].base)).size) <= SMALL_IMAGE
    page_size = PAGE_SIZE_SMALL if is_small else PAGE_SIZE_LARGE
    gr.HTML('<div class="head"><h2>Images of the saved comparison</h2></div>')
    with gr.Row():
        first = comparison.judges[0] if comparison.judges else ""
        names = [(metric_of(judge), judge) for judge in comparison.judges]
        filters = [
            gr.Dropdown(names, value=first, label="Judge", min_width=150, elem_id="gallery-judge"),
            gr.Dropdown(["all", *comparison.categories()], value="all", label="Category", min_width=150, elem_id="gallery-category"),
            gr.Dropdown(list(OUTCOMES), value="all", label="Tuned image is", min_width=150, elem_id="gallery-outcome"),
            gr.Dropdown(["as generated", "largest change"], value="as generated", label="Order", min_width=150, elem_id="gallery-order"),
        ]  # fmt: skip
    num_shown = gr.State(page_size)
    gallery = gr.HTML(gallery_html(comparison, page_size, first, "all", "all", "as generated"), elem_id="gallery")
    more = gr.Button("Show more", elem_id="gallery-more")
    show = functools.partial(gallery_html, comparison)
    for dropdown in filters:
        dropdown.input(lambda *values: [page_size, show(page_size, *values)], filters, [num_shown, gallery], **QUIET)
    more.click(
        lambda count, *values: [count + page_size, show(count + page_size, *values)],
        [num_shown, *filters],
        [num_shown, gallery],
        **QUIET,
    )
