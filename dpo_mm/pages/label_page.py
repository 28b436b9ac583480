"""HTML, style and JavaScript of the label page. `demos/label.py` answers its events."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from dpo_mm.data.image_files import decode_image, image_bytes
from dpo_mm.data.lazy_images import source_cells
from dpo_mm.data.schema import prompt_images
from dpo_mm.evaluation.marked_text import differences, text_spans
from dpo_mm.labels.agreement import Alpha
from dpo_mm.labels.export import summary
from dpo_mm.labels.ratings import Rating
from dpo_mm.labels.response_pairs import is_response, response_texts
from dpo_mm.labels.store import VoteStore
from dpo_mm.labels.vote_training import TrainingStatus
from dpo_mm.pages.server import escape, image_html, source_titles
from dpo_mm.printing.printed_text import counted

LAYOUT = re.compile(r"\n.*\n|\S {2,}\S|[|{}<>]", re.DOTALL)
"""Text whose layout matters, such as a page that was read: three lines, columns, or markup. It is shown in monospace."""

CSS = """
.pair { --room: max(180px, calc(100vh - 274px)); }  /* what the rest of the page leaves */
.pair .prompt { font-size: 1.1rem; font-weight: 600; margin: 0 0 .4rem; text-align: center; max-height: 4.6em; overflow: auto; }
body:has(.pair) .head p { display: none; } body:has(.pair) .head h1 { font-size: 1.1rem; }
body:has(.pair) main { padding-top: 0 !important; padding-bottom: 0 !important; }
body:has(.pair) main .column { gap: 10px; }
.pair .images { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; }
.pair .frame { overflow: hidden; border-radius: 10px; border: 1px solid var(--border-color-primary);
  background: var(--background-fill-secondary); cursor: zoom-in; aspect-ratio: 1; max-height: var(--room); width: 100%; display: grid; }
.pair .frame img { width: 100%; height: 100%; object-fit: contain; min-width: 0; min-height: 0; }
.pair.zoomed .frame { cursor: zoom-out; }
.pair.zoomed .frame img { transform: scale(3); transform-origin: var(--x, 50%) var(--y, 50%); }
.pair .reading { display: grid; gap: 14px; }
.pair .sources { display: grid; gap: 8px; align-content: start; }
.pair .sources.several { grid-template-columns: 1fr 1fr; }
.pair .sources .frame { aspect-ratio: auto; }
.pair .sources .frame img { max-height: var(--room); }
.pair .sides { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; min-width: 0; }
.pair .side { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: .5rem .8rem; min-width: 0;
  background: var(--background-fill-primary); }
.pair .side h2 { margin: 0 0 .2rem; font-size: .95rem; }
.pair .side .text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; max-height: calc(var(--room) - 50px); overflow: auto; }
.pair .side .mono { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .88rem; }
.pair .side mark { background: color-mix(in srgb, var(--color-accent) 20%, transparent); color: inherit;
  text-decoration: underline; text-underline-offset: 3px; }
.pair .side .fold { border-radius: 6px; padding: 0 .45em; background: color-mix(in srgb, #d97706 25%, transparent);
  font-family: system-ui, sans-serif; font-size: .82rem; }
@media (min-width: 900px) { .pair .reading.with-image { grid-template-columns: minmax(0, 2fr) minmax(0, 5fr); } }
.pair .unreadable { align-self: center; padding: 1.5rem; text-align: center; color: var(--quiet); }
.finished { text-align: center; padding: 2.5rem 1rem; }
.finished h2 { margin: 0 0 .6rem; }
.finished dl { display: inline-grid; grid-template-columns: auto auto; gap: .3rem 1.2rem; text-align: left; margin: 0; }
.finished dt { color: var(--quiet); }
.finished dd { margin: 0; overflow-wrap: anywhere; }
.progress-line { display: flex; flex-wrap: wrap; align-items: center; gap: .3rem 1rem; font-size: .9rem;
  color: var(--quiet); }
.progress-line progress { flex: 1 1 120px; height: 8px; appearance: none; border: 0; border-radius: 4px; overflow: hidden; }
.progress-line progress::-webkit-progress-bar { background: var(--border-color-primary); }
.progress-line progress::-webkit-progress-value { background: var(--color-accent); }
.progress-line progress::-moz-progress-bar { background: var(--color-accent); }
.progress-line p { margin: 0; } .progress-line b { color: var(--body-text-color); overflow-wrap: anywhere; }
.choices { display: grid !important; grid-template-columns: repeat(6, 1fr); gap: 10px !important; }
@media (max-width: 900px) { .choices { grid-template-columns: repeat(3, 1fr); } }
.choices button { min-width: 0 !important; white-space: nowrap; }
.quiet { color: var(--quiet); font-size: .9rem; }
.ratings, .ratings tr { border: 0 !important; }
.ratings { width: 100%; border-collapse: collapse; font-size: .95rem; }
.gradio-container table.ratings th, .gradio-container table.ratings td { padding: .35rem .5rem !important; text-align: left; border: 0 !important;
  border-bottom: 1px solid var(--border-color-primary) !important; }
.ratings tbody th { font-weight: 600; overflow-wrap: anywhere; }
.ratings .number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.ratings td.span { position: relative; width: 30%; min-width: 70px; }
.ratings .bar, .ratings .dot { position: absolute; top: 50%; height: 6px; margin-top: -3px; border-radius: 3px; background: var(--color-accent); opacity: .35; }
.ratings .dot { width: 10px; height: 10px; margin: -5px 0 0 -5px; border-radius: 50%; opacity: 1; }
.visually-hidden { position: absolute; clip-path: inset(50%); }
.notice, .alert { border: 1px solid var(--border-color-primary); border-left: 4px solid var(--color-accent); border-radius: 6px;
  padding: .5rem .8rem; margin: 0 0 .6rem; font-size: .92rem; color: var(--body-text-color); overflow-wrap: anywhere; }
.alert { margin: 1.5rem 0; font-size: 1rem; }
.more { flex-wrap: wrap; } .more > * { min-width: 220px !important; flex: 1 1 220px !important; } .more > :has(.label-wrap.open) { flex-basis: 100% !important; }
#refresh, body:has(.progress-line.known) #leave { display: none !important; }
.hint { text-align: center; font-size: .85rem; color: var(--quiet); }
"""
HEAD = """
<style>
@media (max-width: 600px) {
  .ratings { font-size: .8rem !important; }
  .ratings .span, .hint, .progress-line span:last-child { display: none !important; }
  .ratings .number { white-space: normal !important; }
  body:has(.pair) .head { position: absolute !important; clip-path: inset(50%) !important; }
  body:has(.pair) main { padding-top: 10px !important; }
  .pair { --room: max(120px, 25dvh) !important; }
  .pair .images, .pair .reading, .pair .sides, .choices { gap: 6px !important; }
  .pair .images .frame, .pair.zoomed .frame { max-height: none !important; position: relative !important; }
  .pair .sides, .pair.zoomed .images { grid-template-columns: 1fr !important; }
  .pair.zoomed .frame img { transform: none !important; max-height: none !important; }
  .pair.zoomed .images .frame::before { content: attr(data-side); position: absolute; top: 6px; left: 6px; padding: 0 .5em;
    border-radius: 6px; background: var(--background-fill-primary); font-size: .85rem; }
  .pair .side { padding: .3rem .6rem !important; }
  .pair .side .text { max-height: calc(25dvh - 36px) !important; }
  body:has(.pair.zoomed) .choices { position: fixed !important; inset: auto 0 0 0; z-index: 2; padding: 6px 10px !important;
    background: var(--body-background-fill); }
  body:has(.pair.zoomed) main { padding-bottom: 120px !important; }
  .choices button { padding: .7rem .2rem !important; font-size: .9rem !important; }
  .more > * { flex-basis: 100% !important; }
}
</style>
<script>
(() => {
  const keys = {ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", b: "both_bad", s: "skip", u: "undo"};
  const pair = () => document.querySelector(".pair");
  const zoom = (event) => {
    if (!event || !event.target.closest) return;
    const frame = event.target.closest(".frame");
    if (!frame) return;
    const box = frame.getBoundingClientRect();
    pair().style.setProperty("--x", 100 * (event.clientX - box.left) / box.width + "%");
    pair().style.setProperty("--y", 100 * (event.clientY - box.top) / box.height + "%");
  };
  const fields = "input, textarea, select, [contenteditable], [role=textbox], [role=tab], [role=slider], .cm-editor, pre, code";
  const within = (node) => (node instanceof Element ? node : node?.parentElement)?.closest?.(fields);
  const isTyping = (event) => event.isComposing || event.composedPath().some((node) => node instanceof Element && node.matches(fields))
    || (!getSelection().isCollapsed && within(getSelection().anchorNode)) || lastClick?.isConnected && lastClick.closest(".cm-editor, pre, code");
  let lastClick = null, sent = null;
  const shown = () => document.querySelector("[data-annotator]")?.dataset.presentation;
  const remember = (event) => { const node = event.composedPath()[0]; lastClick = node instanceof Element ? node : null; };
  document.addEventListener("pointerdown", remember, true);
  document.addEventListener("focusin", remember);
  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey || isTyping(event)) return;
    if (!document.querySelector("[data-annotator]")?.offsetParent) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (key === "z" && pair()) pair().classList.toggle("zoomed");
    if (!(key in keys)) return;
    event.preventDefault();
    if (sent && sent.pair === shown() && Date.now() - sent.time < 1000) return;  // its vote is on the way
    sent = {pair: shown(), time: Date.now()};
    document.getElementById("choose-" + keys[key])?.click();
  });
  window.dpoChannel = new BroadcastChannel("dpo-mm");
  dpoChannel.onmessage = (event) => {
    const data = document.querySelector("[data-annotator]")?.dataset;
    if (data?.annotator === event.data.annotator && data.presentation !== event.data.presentation)
      document.getElementById("refresh")?.click();
  };
  document.addEventListener("mousemove", (event) => { if (pair()) zoom(event); });
  document.addEventListener("click", (event) => {
    if (event.target.closest(".pair .frame")) { zoom(event); pair().classList.toggle("zoomed"); }
  });
})();
</script>
"""
NAME_KEY = "dpo-mm-annotator"
LOAD_NAME = f"() => [localStorage.getItem('{NAME_KEY}') || '']"
SAVE_NAME = f"(name) => {{ localStorage.setItem('{NAME_KEY}', name); return [name]; }}"
FORGET_NAME = f"() => {{ localStorage.removeItem('{NAME_KEY}'); }}"
READ_PAGE = """() => {
  const data = document.querySelector("[data-annotator]")?.dataset ?? {};
  return [data.annotator ?? "", data.presentation ?? ""];
}"""
"""JavaScript that reads annotator and presentation from the page, so that a vote is for the pair on the screen."""
READ_NAME = f"() => ({READ_PAGE})().slice(0, 1)"
ANNOUNCE = """() => {
  const data = document.querySelector("[data-annotator]")?.dataset;
  if (data) dpoChannel.postMessage({annotator: data.annotator, presentation: data.presentation});
}"""
"""JavaScript that tells the browser's other tabs which pair is open now."""


def head_html(*, of_responses: bool) -> str:
    """Return the heading of the page."""
    what, about = ("response", " Differences are marked.") if of_responses else ("image", "")
    return (
        f'<div class="head"><h1>Which {what} is better?</h1><p>Both {what}s were made for the same prompt. The models are '
        f"hidden, and left and right are random.{about}</p></div>"
    )


def pair_html(row: dict[str, Any], presentation: int | str, annotator: str, *, swapped: bool) -> str:
    """Return the prompt and both sides. The HTML does not reveal which model made a side."""
    body = _responses_html(row, swapped=swapped) if is_response(row) else _images_html(row, swapped=swapped)
    return f'<div class="pair" data-annotator="{escape(annotator)}" data-presentation="{presentation}">{body}</div>'


def _images_html(row: dict[str, Any], *, swapped: bool) -> str:
    columns = ("image_b", "image_a") if swapped else ("image_a", "image_b")
    names = ("left image", "right image")
    images = [_image_html(row[column], name) for column, name in zip(columns, names, strict=True)]
    frames = "".join(
        f'<div class="frame" data-side="{side}">{image}</div>'
        for side, image in zip(("Left", "Right"), images, strict=True)
    )
    both = f'<div class="images">{frames}</div>'
    cells = source_cells(row)
    if cells:
        shown = [_image_html(cell, name) for cell, name in zip(cells, source_titles(len(cells)), strict=True)]
        sources = "".join(f'<div class="frame">{image}</div>' for image in shown)
        kind = "sources several" if len(cells) > 1 else "sources"
        both = f'<div class="reading with-image"><div class="{kind}">{sources}</div>{both}</div>'
    return f'<p class="prompt" dir="auto">{escape(row["prompt"])}</p>{both}'


def _responses_html(row: dict[str, Any], *, swapped: bool) -> str:
    """Return the prompt with its images, and both responses with their differences marked."""
    try:
        texts = response_texts(row)
    except ValueError:
        return '<div class="unreadable">This pair can’t be read. Skip it.</div>'
    a, b = (texts.b, texts.a) if swapped else (texts.a, texts.b)
    style = " mono" if any(LAYOUT.search(text) for text in (a, b)) else ""
    sides = "".join(
        f'<section class="side"><h2>{name}</h2><div class="text{style}" dir="auto" tabindex="0" aria-label="{name} response">'
        f"{_marked_html(text, other)}</div></section>"
        for name, text, other in (("Left", a, b), ("Right", b, a))
    )
    frames = "".join(
        f'<div class="frame">{_image_html(cell, f"image {number} of the prompt")}</div>'
        for number, cell in enumerate(prompt_images(row), start=1)
    )
    prompt = f'<p class="prompt" dir="auto">{escape(texts.prompt)}</p>'
    sources = f'<div class="sources">{frames}</div>' if frames else ""
    return f'{prompt}<div class="reading{" with-image" * bool(frames)}">{sources}<div class="sides">{sides}</div></div>'


def _marked_html(text: str, other: str) -> str:
    """Return a response with the words that the other one does not have, and with long loops folded."""
    parts = []
    for span in text_spans(text, differences(text, other).extra):
        if span.repeats:
            parts.append(f'<span class="fold">… {span.repeats} more repeats</span>')
        else:
            parts.append(f"<mark>{escape(span.text)}</mark>" if span.marked else escape(span.text))
    return "".join(parts) or '<span class="quiet">(empty)</span>'


def _image_html(cell: dict[str, Any], name: str) -> str:
    try:
        return image_html(decode_image(image_bytes(cell)), alt=name)
    except (ValueError, OSError):
        return '<div class="unreadable">This image can’t be decoded. Skip the pair.</div>'


def finished_html(store: VoteStore, annotator: str) -> str:
    """Return the summary that is shown when all pairs are labelled, without counts that tell the models apart."""
    shown = {name: fact for name, fact in summary(store.votes()).items() if name != "choices"}
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in shown.items())
    return (
        f'<div class="finished" data-annotator="{escape(annotator)}" data-presentation="">'
        f"<h2>All pairs are labelled. Thank you!</h2><dl>{facts}</dl></div>"
    )


def progress_html(store: VoteStore, annotator: str, *, is_taken: bool, is_known: bool = False) -> str:
    """Return the progress of this annotator and of all annotators, and a notice if another browser uses the name.

    Args:
        is_known: a secret link gave the name, so the annotator cannot choose another.
    """
    progress = store.progress(annotator)
    people = counted(progress.annotators, "person", "people")
    advice = "tell the host of this page" if is_known else "choose another name below"
    notice = (
        f'<p class="notice" role="status">Another browser votes or has voted as <b dir="auto">{escape(annotator)}</b>. The '
        f"votes of both count as one person’s. If that is not you, {advice}.</p>"
    )
    return (
        f'{notice if is_taken else ""}<div class="progress-line{" known" * is_known}"><span><b dir="auto">{escape(annotator)}</b>: '
        f"{progress.own_pairs:,} of {counted(progress.num_pairs, 'pair')}</span>"
        f'<progress value="{progress.own_pairs}" max="{progress.num_pairs}" aria-label="pairs labelled"></progress>'
        f"<span>{counted(progress.votes, 'vote')} by {people} on {counted(progress.covered_pairs, 'pair')}</span></div>"
    )


def message_of(error: Exception, store: VoteStore) -> str:
    """Return an error as HTML text, without the folders of this machine."""
    return escape(str(error).replace(str(store.path), store.path.name))


def training_html(status: TrainingStatus) -> str:
    """Return how far the training on the votes is."""
    places = {"export": "the start", "train": "the start of the training", "sample": "the fresh pairs"}
    at = f"step {status.step:,} of {status.steps:,}" if status.steps else places.get(status.stage, "")
    loss = "" if status.loss is None else f", loss {status.loss:.3f}"
    working = {
        "export": "Exporting the votes.",
        "train": f"Training: {at}{loss}." if status.steps else "Training: the model loads, and the pairs are encoded.",
        "sample": "Trained. Base and tuned model generate fresh pairs.",
    }
    texts = {
        "idle": "Nothing is trained yet. A training takes the votes of all people until then.",
        "running": working.get(status.stage, ""),
        "stopping": "Stopping after the step at hand.",
        "stopped": f"Stopped at {at}{loss}. It can be resumed.",
        "interrupted": f"Interrupted at {at}{loss}. It can be resumed.",
        "failed": f"Failed: {status.message}",
        "ready": "Trained. Fresh pairs of base and tuned are ready to be labelled. Their models are hidden too.",
    }
    bar = f'<progress value="{status.step}" max="{status.steps}" aria-label="steps of training"></progress>'
    text = f'<p class="quiet" role="status">{escape(texts[status.state])}</p>'
    return f'<div class="progress-line">{text}{bar if status.steps else ""}</div>'


def ratings_html(ratings: Sequence[Rating], alpha: Alpha) -> str:
    """Return a table of the models' ratings, and the agreement of people on the choice."""
    low, high = min(rating.low for rating in ratings), max(rating.high for rating in ratings)
    percent = lambda value: 100 * (value - low) / ((high - low) or 1)
    lines = "".join(
        f'<tr><th scope="row" dir="auto">{escape(r.model)}{f" (group {r.group + 1})" if ratings[-1].group else ""}</th><td class="number">{r.rating:.0f}</td><td class="span">'
        f'<span class="bar" style="left:{percent(r.low):.1f}%;width:{percent(r.high) - percent(r.low):.1f}%"></span>'
        f'<span class="dot" style="left:{percent(r.rating):.1f}%"></span></td>'
        f'<td class="number">{r.low:.0f} to {r.high:.0f}</td><td class="number">{r.wins} / {r.ties} / {r.losses}</td></tr>'
        for r in ratings
    )
    alone = " Groups were never compared with each other: each has a separate scale." if ratings[-1].group else ""
    return (
        '<table class="ratings"><thead><tr><th>Model</th><th>Rating</th>'
        '<th class="span"><span class="visually-hidden">95 % interval</span></th><th>95 % interval</th>'
        f"<th>won / tied / lost</th></tr></thead><tbody>{lines}</tbody></table>"
        '<p class="quiet">A difference of 400 points means odds of ten to one. If two intervals overlap widely, more votes '
        f"are needed to tell the models apart.{alone}</p>"
        f'<p class="quiet agreement">Agreement of people (Krippendorff’s alpha): {escape(alpha.text())}. 1 is full agreement, and '
        "0 is that of chance.</p>"
    )
