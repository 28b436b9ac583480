"""Label pairs of pictures blind, by keyboard, several people at once: `dpo-mm demo label`.

Votes go to SQLite as they are cast; `dpo-mm label export` makes preference rows of them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from dpo_mm.data.image_files import decode_image, image_bytes
from dpo_mm.demo_server import DemoPage, img, safe, serve
from dpo_mm.labels.export import absolute, model_ratings, summary, train_command
from dpo_mm.labels.pairs import digest, open_pairs
from dpo_mm.labels.store import LONGEST_NAME, VoteStore, name_of

BUTTONS = {
    "left": ("Left", "←"),
    "tie": ("Tie", "↓"),
    "right": ("Right", "→"),
    "both_bad": ("Both bad", "B"),
    "skip": ("Skip", "S"),
    "undo": ("Undo", "U"),
}
CSS = """
.pair .prompt { font-size: 1.2rem; font-weight: 600; margin: 0 0 .7rem; text-align: center; }
.pair .sides { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; }
.pair .frame { overflow: hidden; border-radius: 10px; border: 1px solid var(--border-color-primary);
  background: var(--background-fill-secondary); cursor: zoom-in; aspect-ratio: 1; max-height: 62vh; width: 100%; display: grid; }
.pair .frame img { width: 100%; height: 100%; object-fit: contain; min-width: 0; min-height: 0; }
.pair.zoomed .frame { cursor: zoom-out; }
.pair.zoomed .frame img { transform: scale(3); transform-origin: var(--x, 50%) var(--y, 50%); }
.pair .unreadable { align-self: center; padding: 1.5rem; text-align: center; color: var(--quiet); }
.finished { text-align: center; padding: 2.5rem 1rem; }
.finished h2 { margin: 0 0 .6rem; }
.finished dl { display: inline-grid; grid-template-columns: auto auto; gap: .3rem 1.2rem; text-align: left; margin: 0; }
.finished dt { color: var(--quiet); }
.finished dd { margin: 0; overflow-wrap: anywhere; }
.state { display: flex; flex-wrap: wrap; align-items: center; gap: .3rem 1rem; font-size: .9rem;
  color: var(--quiet); }
.state progress { flex: 1 1 120px; height: 8px; appearance: none; border: 0; border-radius: 4px; overflow: hidden; }
.state progress::-webkit-progress-bar { background: var(--border-color-primary); }
.state progress::-webkit-progress-value { background: var(--color-accent); }
.state progress::-moz-progress-bar { background: var(--color-accent); }
.state b { color: var(--body-text-color); overflow-wrap: anywhere; }
.choices { display: grid !important; grid-template-columns: repeat(3, 1fr); gap: 10px !important; }
.choices button { min-width: 0 !important; white-space: nowrap; }
.quiet { color: var(--quiet); font-size: .9rem; }
.arena, .arena tr { border: 0 !important; }
.arena { width: 100%; border-collapse: collapse; font-size: .95rem; }
.arena th, .arena td { padding: .35rem .5rem !important; text-align: left; border: 0 solid var(--border-color-primary) !important;
  border-bottom-width: 1px !important; }
.arena tbody th { font-weight: 600; overflow-wrap: anywhere; }
.arena .number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.arena td.span { position: relative; width: 30%; min-width: 70px; }
.arena .bar, .arena .dot { position: absolute; top: 50%; height: 6px; margin-top: -3px; border-radius: 3px; background: var(--color-accent); opacity: .35; }
.arena .dot { width: 10px; height: 10px; margin: -5px 0 0 -5px; border-radius: 50%; opacity: 1; }
.away { position: absolute; clip-path: inset(50%); }
.hint { text-align: center; font-size: .85rem; color: var(--quiet); }
@media (max-width: 600px) { .arena { font-size: .8rem; } .arena .span { display: none; } .arena .number { white-space: normal; } .hint { display: none; } .pair .sides { gap: 8px; }
  .choices { gap: 8px !important; } .choices button { padding: .7rem .2rem !important; font-size: .9rem !important; } }
"""
HEAD = """
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
  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, textarea, [contenteditable=true], [role=tab]")) return;
    if (!document.querySelector("[data-labeller]")?.offsetParent) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (key === "z" && pair()) pair().classList.toggle("zoomed");
    if (!(key in keys)) return;
    event.preventDefault();
    document.getElementById("choose-" + keys[key])?.click();
  });
  document.addEventListener("mousemove", (event) => { if (pair()) zoom(event); });
  document.addEventListener("click", (event) => {
    if (event.target.closest(".pair .frame")) { zoom(event); pair().classList.toggle("zoomed"); }
  });
})();
</script>
"""
STORED = "dpo-mm-labeller"
RECALL = f"() => [localStorage.getItem('{STORED}') || '']"
REMEMBER = f"(name) => {{ localStorage.setItem('{STORED}', name); return [name]; }}"
FORGET = f"() => {{ localStorage.removeItem('{STORED}'); }}"
ON_THE_PAGE = """() => {
  const seen = document.querySelector("[data-labeller]")?.dataset ?? {};
  return [seen.labeller ?? "", seen.shown ?? ""];
}"""
"""Who labels and what they see, read from the page itself, so that a vote is for the pair that was looked at."""


def pair_html(row: dict[str, Any], shown: int, labeller: str, *, swapped: bool) -> str:
    """The prompt and both pictures, the sides as drawn; nothing tells where a picture comes from."""
    sides = [_picture(row[name], side) for name, side in zip(_sides(swapped), ("left", "right"), strict=True)]
    frames = "".join(f'<div class="frame">{side}</div>' for side in sides)
    return (
        f'<div class="pair" data-labeller="{safe(labeller)}" data-shown="{shown}">'
        f'<p class="prompt" dir="auto">{safe(row["prompt"])}</p><div class="sides">{frames}</div></div>'
    )


def _sides(swapped: bool) -> tuple[str, str]:
    return ("image_b", "image_a") if swapped else ("image_a", "image_b")


def _picture(cell: dict[str, Any], side: str) -> str:
    try:
        return img(decode_image(image_bytes(cell)), alt=f"{side} picture")
    except (ValueError, OSError):
        return '<div class="unreadable">This picture can’t be read. Skip the pair.</div>'


def finished_html(store: VoteStore, labeller: str) -> str:
    facts = "".join(f"<dt>{safe(name)}</dt><dd>{safe(fact)}</dd>" for name, fact in summary(store.votes()).items())
    return (
        f'<div class="finished" data-labeller="{safe(labeller)}" data-shown=""><h2>All pairs are labelled. Thank you!</h2>'
        f"<dl>{facts}</dl></div>"
    )


def state_html(store: VoteStore, labeller: str) -> str:
    now = store.progress(labeller)
    others = f"{now.votes} votes by {now.people} {'person' if now.people == 1 else 'people'} on {now.covered} pairs"
    return (
        f'<div class="state"><span><b dir="auto">{safe(labeller)}</b>: {now.mine} of {now.total} pairs</span>'
        f'<progress value="{now.mine}" max="{now.total}" aria-label="pairs labelled"></progress><span>{others}</span></div>'
    )


def view(store: VoteStore, rows: Any, places: dict[str, int], labeller: str) -> list[Any]:
    """What a labeller sees now: whether to give a name, whether to work; the pair; the state."""
    if not labeller.strip():
        return [gr.update(visible=True), gr.update(visible=False), "", ""]
    try:
        labeller = name_of(labeller)
        shown = store.show(labeller)
        if shown is None:
            body = finished_html(store, labeller)
        else:
            row = rows[places[shown.pair]]
            store.confirm(shown.pair, digest(row))
            body = pair_html(row, shown.id, labeller, swapped=shown.swapped)
    except (ValueError, OSError) as error:
        raise gr.Error(safe(str(error)), print_exception=False) from error
    return [gr.update(visible=False), gr.update(visible=True), body, state_html(store, labeller)]


def arena_html(store: VoteStore, rows: Any) -> str:
    """A table of the models' ratings, or why there is none yet."""
    try:
        rated = model_ratings(store, rows)
    except ValueError as error:
        return f'<p class="quiet">{safe(str(error).capitalize())}.</p>'
    low, high = min(one.low for one in rated), max(one.high for one in rated)
    place = lambda value: 100 * (value - low) / ((high - low) or 1)
    lines = "".join(
        f'<tr><th scope="row" dir="auto">{safe(one.model)}</th><td class="number">{one.rating:.0f}</td>'
        f'<td class="span"><span class="bar" style="left:{place(one.low):.1f}%;width:{place(one.high) - place(one.low):.1f}%">'
        f'</span><span class="dot" style="left:{place(one.rating):.1f}%"></span></td>'
        f'<td class="number">{one.low:.0f} to {one.high:.0f}</td><td class="number">{one.wins} / {one.ties} / {one.losses}</td></tr>'
        for one in rated
    )
    return (
        '<table class="arena"><thead><tr><th>Model</th><th>Rating</th><th class="span"><span class="away">95 % interval</span></th>'
        f"<th>95 % interval</th><th>won / tied / lost</th></tr></thead><tbody>{lines}</tbody></table>"
        '<p class="quiet">400 points more win ten times out of eleven. Intervals that overlap widely decide nothing yet.</p>'
    )


def build(rows: Any, store: VoteStore, command: str) -> DemoPage:
    """The page that labels pairs. command: what makes an adapter of the votes, for the user to copy."""
    places = {name: place for place, name in enumerate(rows["id"])}
    see = partial(view, store, rows, places)

    def choose(choice: str, labeller: str, shown: str) -> list[Any]:
        if labeller and choice == "undo":
            if not store.undo(labeller):
                gr.Info("There is nothing to undo.", duration=3)
        elif labeller and shown.isdecimal():
            store.cast(labeller, int(shown), choice)
        return see(labeller)

    with gr.Blocks(title="Label pairs", analytics_enabled=False) as blocks:
        gr.HTML(
            '<div class="head"><h1>Which picture is better?</h1>'
            "<p>Two pictures for one prompt; where they come from is hidden and the sides are random.</p></div>"
        )
        with gr.Column(visible=False) as intro:
            name = gr.Textbox(
                label="Your name",
                info="Your votes are kept under it. With the same name you go on where you stopped.",
                max_length=LONGEST_NAME,
                autofocus=True,
                elem_id="name",
            )
            begin = gr.Button("Start", variant="primary", elem_id="begin")
        with gr.Column(visible=False) as work:
            state = gr.HTML()
            pair = gr.HTML()
            with gr.Row(elem_classes="choices"):
                buttons = {
                    choice: gr.Button(
                        f"{text}  {key}",
                        variant="primary" if choice in ("left", "right") else "secondary",
                        elem_id=f"choose-{choice}",
                    )
                    for choice, (text, key) in BUTTONS.items()
                }
            gr.HTML(
                '<div class="hint">Keys are on the buttons. Click a picture, or press Z, to look closely at both.</div>'
            )
            with gr.Accordion("How the models stand", open=False) as arena:
                gr.HTML('<p class="quiet">From everybody’s votes. Who knows it may vote otherwise: label first.</p>')
                standings = gr.HTML(elem_id="standings")
                arena.expand(
                    lambda: arena_html(store, rows), None, standings, show_progress="hidden", api_visibility="private"
                )
            with gr.Accordion("From votes to a trained adapter", open=False):
                gr.Code(
                    command,
                    language="shell",
                    interactive=False,
                    show_label=False,
                    wrap_lines=True,
                    show_line_numbers=False,
                    elem_id="command",
                )
                leave = gr.Button("Label under another name", size="sm", elem_id="leave")
        shown = gr.Textbox(visible=False)
        outputs, quiet = [intro, work, pair, state], {"show_progress": "hidden", "api_visibility": "private"}
        for event in (begin.click, name.submit):
            event(see, name, outputs, js=REMEMBER, **quiet)
        for choice, button in buttons.items():
            button.click(partial(choose, choice), [name, shown], outputs, js=ON_THE_PAGE, **quiet)
        leave.click(lambda: see(""), None, outputs, js=FORGET, **quiet)
        blocks.load(see, name, outputs, js=RECALL, **quiet)
        blocks.queue(default_concurrency_limit=8)
    return DemoPage(blocks, css=CSS, head=HEAD)


def run(pairs: str = "shapes-faithfulness", votes: str = "labels.sqlite", *, port: int | None = None) -> None:
    """Serve the page. Raises ValueError as `open_pairs` and `VoteStore`."""
    rows = open_pairs(pairs)
    store = VoteStore(votes, rows["id"], source=absolute(pairs))
    command = train_command(votes, list(rows["prompt"]))
    serve(lambda: build(rows, store, command), port=port)


if __name__ == "__main__":
    run()
