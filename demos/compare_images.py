"""Base and tuned image generator from the same seed, side by side: `dpo-mm demo images`."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from dpo_mm.data.image_files import decode_image
from dpo_mm.demo_server import SMALL, DemoPage, img, safe, serve
from dpo_mm.evaluation.saved_comparison import OUTCOMES, ImagePair, SavedComparison, load_comparison
from dpo_mm.judges import load_judge, metric_of
from dpo_mm.policies.families import load_image_policy

SHIPPED_MODEL, SHIPPED_ADAPTER = "shapes-sd", "shapes-sd-faithful"
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
SEEDS = 4
"""Seeds of a strip."""
KEPT = 64
"""Pictures kept, so that a strip doesn't draw again what is on the page."""
ENLARGED = 512
"""Pixels that a small picture is enlarged to for the slider, each of its pixels a square."""
LONGEST_PROMPT = 1000
AT_ONCE, AT_ONCE_LARGE = 12, 4
"""Pairs of a finished comparison that the page shows more at a time: small pictures, and others."""
VERDICTS = {"faithfulness": ("not as asked", "as asked")}
"""Judges whose score is 0 or 1, in words."""
EXAMPLES = (
    "three red stars",
    "a green cross above a purple circle",
    "a blue circle and a yellow star",
    "a big orange triangle",
    "two purple squares",
)
CSS = """
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(0, 1fr)); grid-auto-flow: column; gap: 12px; }
.figures figure { margin: 0; min-width: 0; }
.figures img, .figures .blank { width: 100%; height: auto; aspect-ratio: 1; object-fit: contain; border-radius: 10px;
  border: 1px solid var(--border-color-primary); background: var(--background-fill-secondary); display: block; }
.figures .blank { display: grid; place-items: center; color: var(--quiet); }
.figures figcaption { margin-top: .35rem; font-size: .9rem; line-height: 1.4; }
.figures figcaption b { display: block; }
.score { color: var(--quiet); display: block; }
.score.yes { color: #15803d; } .dark .score.yes { color: #4ade80; }
.score.no { color: #b91c1c; } .dark .score.no { color: #f87171; }
.strip .figures { grid-auto-columns: minmax(118px, 1fr); grid-template-columns: none; overflow-x: auto; padding-bottom: 6px; }
.strip h3 { margin: .2rem 0 .5rem; font-size: 1rem; }
.strip .figures + .figures { margin-top: 10px; }
.twins { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 18px; }
.twins article { min-width: 0; border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 12px; }
.twins h3 { font-size: .95rem; margin: 0 0 .5rem; unicode-bidi: isolate; overflow-wrap: anywhere; }
.quiet { color: var(--quiet); font-size: .9rem; margin: .2rem 0 .8rem; }
.status { min-height: 1.4em; color: var(--quiet); font-size: .9rem; }
"""


@dataclass(frozen=True)
class Painter:
    """What draws and judges. draw(prompt, seed, steps, guidance, scale): a picture; scales: of the strip."""

    draw: Callable[[str, int, int, float, float], Image.Image]
    judges: tuple[str, ...]
    scales: tuple[float, ...]
    title: str
    steps: int
    guidance: float
    at_once: bool


def load(model: str, adapter: str | None, judges: Sequence[str], *, precision: str) -> Painter:
    """The painter of a model and its adapter. Raises ValueError as `load_image_policy` and `load_judge`."""
    if adapter is None and model != SHIPPED_MODEL:
        raise ValueError(f"model {model!r} has no tuned side; give it as --adapter FOLDER")
    policy = load_image_policy(model, precision=precision, adapter=adapter or SHIPPED_ADAPTER)
    for judge in judges:
        load_judge(judge)

    @functools.lru_cache(maxsize=KEPT)
    def draw(prompt: str, seed: int, steps: int, guidance: float, scale: float) -> Image.Image:
        return next(policy.sample([prompt], [seed], steps=steps, guidance=guidance, batch_size=1, scale=scale))[0]

    shipped = model == SHIPPED_MODEL
    return Painter(
        draw=draw,
        judges=tuple(judges),
        scales=SCALES if policy.base_denoiser is None else (0.0, 1.0),
        title=f"{model} and {adapter or SHIPPED_ADAPTER}",
        steps=15 if shipped else 30,
        guidance=1.5 if shipped else 7.5,
        at_once=shipped,
    )


def figure(title: str, image: Image.Image | None, prompt: str, judges: Sequence[str]) -> str:
    """A picture with its title and the judges' scores under it; without a picture, its place."""
    if image is None:
        return f'<figure><div class="blank">drawing …</div><figcaption><b>{safe(title)}</b></figcaption></figure>'
    scores = "".join(score(judge, image, prompt) for judge in judges)
    return f"<figure>{img(image, alt=title)}<figcaption><b>{safe(title)}</b>{scores}</figcaption></figure>"


def score(judge: str, image: Image.Image, prompt: str) -> str:
    """What a judge says of a picture, or that it can't read the prompt."""
    try:
        return said(judge, float(load_judge(judge)([image], [prompt])[0]))
    except ValueError as error:
        return f'<span class="score" title="{safe(str(error))}">{safe(metric_of(judge))}: can’t be judged</span>'


def said(judge: str, value: float) -> str:
    """A judge's score in words where it has them, else as a number."""
    if judge in VERDICTS and value in (0.0, 1.0):
        return (
            f'<span class="score {("no", "yes")[int(value)]}">{"✗✓"[int(value)]} {VERDICTS[judge][int(value)]}</span>'
        )
    return f'<span class="score">{safe(metric_of(judge))} {value:.3f}</span>'


def figures(inside: Sequence[str]) -> str:
    return f'<div class="figures">{"".join(inside)}</div>'


def enlarged(image: Image.Image) -> Image.Image:
    """A small picture with each pixel a square, so that the browser doesn't smooth it; others as they are."""
    if max(image.size) > SMALL:
        return image
    times = ENLARGED // max(image.size)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def checked(prompt: str, seed: float | None, steps: float, guidance: float, scale: float) -> tuple[Any, ...]:
    """What `draw` takes, from what the controls hold. Raises gr.Error, in words for the visitor."""
    if not prompt.strip():
        raise gr.Error("Write a prompt first.", print_exception=False)
    if len(prompt) > LONGEST_PROMPT:
        raise gr.Error(f"The prompt is longer than {LONGEST_PROMPT} letters.", print_exception=False)
    if seed is None or not 0 <= seed < 2**31:
        raise gr.Error("The seed must be a whole number from 0 to 2147483647.", print_exception=False)
    return prompt.strip(), int(seed), int(steps), float(guidance), float(scale)


def compare(painter: Painter, *controls: Any) -> Iterator[list[Any]]:
    """(status, both pictures, slider), as they are drawn."""
    prompt, seed, steps, guidance, scale = checked(*controls)
    names = ("base", f"tuned, LoRA scale {scale:g}")
    show = lambda *images: figures([figure(*one, prompt, painter.judges) for one in zip(names, images, strict=True)])
    yield ["Drawing the base …", show(None, None), gr.skip()]
    base = painter.draw(prompt, seed, steps, guidance, 0.0)
    yield ["Drawing the tuned …", show(base, None), gr.skip()]
    tuned = painter.draw(prompt, seed, steps, guidance, scale)
    same = " Both are the same picture." if base.tobytes() == tuned.tobytes() else ""
    yield [f"Both from seed {seed}.{same}", show(base, tuned), (enlarged(base), enlarged(tuned))]


def over_scales(painter: Painter, *controls: Any) -> Iterator[list[str]]:
    """(status, strip): one seed at several LoRA scales, as they are drawn."""
    prompt, seed, steps, guidance, _ = checked(*controls)
    titles = ["base" if not scale else f"scale {scale:g}" for scale in painter.scales]
    images: list[Image.Image | None] = [None] * len(titles)
    for place, scale in enumerate(painter.scales):
        images[place] = painter.draw(prompt, seed, steps, guidance, scale)
        inside = figures([figure(*one, prompt, painter.judges) for one in zip(titles, images, strict=True)])
        status = f"{place + 1} of {len(titles)} LoRA scales drawn, seed {seed}."
        yield [status, f'<div class="strip"><h3>Seed {seed} over LoRA scales</h3>{inside}</div>']


def over_seeds(painter: Painter, *controls: Any) -> Iterator[list[str]]:
    """(status, strip): base above and tuned below, from the next seeds, as they are drawn."""
    prompt, seed, steps, guidance, scale = checked(*controls)
    seeds = [(seed + n) % 2**31 for n in range(SEEDS)]
    drawn: dict[tuple[int, float], Image.Image] = {}
    for place, one in enumerate(seeds):
        for side in (0.0, scale):
            drawn[one, side] = painter.draw(prompt, one, steps, guidance, side)
        rows = [
            figures([figure(f"{name}, seed {n}", drawn.get((n, side)), prompt, painter.judges) for n in seeds])
            for name, side in (("base", 0.0), ("tuned", scale))
        ]
        status = f"{place + 1} of {SEEDS} seeds drawn."
        yield [status, f'<div class="strip"><h3>Over seeds, LoRA scale {scale:g}</h3>{"".join(rows)}</div>']


def twins_html(one: ImagePair) -> str:
    """Base and tuned of one prompt and seed, with the scores that the comparison kept."""
    sides = []
    for place, (title, file) in enumerate((("base", one.base), ("tuned", one.tuned))):
        scores = "".join(said(judge, both[place]) for judge, both in one.scores.items())
        try:
            picture = img(decode_image(file.read_bytes()), alt=title)
        except (ValueError, OSError):
            picture = '<div class="blank">gone</div>'
        sides.append(f"<figure>{picture}<figcaption><b>{title}</b>{scores}</figcaption></figure>")
    return f'<article><h3 dir="auto">{safe(one.prompt)}</h3>{figures(sides)}<div class="score">seed {one.seed}</div></article>'


def gallery_html(finished: SavedComparison, shown: int, judge: str, of: str, outcome: str, order: str) -> str:
    """The pairs that the filters leave, so many of them."""
    found = finished.chosen(judge, of=of, outcome=outcome, by_change=order == "largest change")
    count = (
        f"{min(shown, len(found))} of {len(found)} pairs, {len(finished.pairs)} in all; the judge’s word, seed by seed."
    )
    return f'<p class="quiet">{count}</p><div class="twins">{"".join(map(twins_html, found[:shown]))}</div>'


def add_gallery(finished: SavedComparison) -> None:
    """The part of the page that shows a finished comparison, with filters."""
    small = max(decode_image(finished.pairs[0].base.read_bytes()).size) <= SMALL
    more_by = AT_ONCE if small else AT_ONCE_LARGE
    gr.HTML('<div class="head"><h2>The pictures of the finished comparison</h2></div>')
    with gr.Row():
        first = finished.judges[0] if finished.judges else ""
        names = [(metric_of(judge), judge) for judge in finished.judges]
        filters = [
            gr.Dropdown(names, value=first, label="Judge", min_width=150, elem_id="gallery-judge"),
            gr.Dropdown(["all", *finished.categories()], value="all", label="Category", min_width=150, elem_id="gallery-of"),
            gr.Dropdown(list(OUTCOMES), value="all", label="The tuned one is", min_width=150, elem_id="gallery-outcome"),
            gr.Dropdown(["as drawn", "largest change"], value="as drawn", label="Order", min_width=150, elem_id="gallery-order"),
        ]  # fmt: skip
    shown = gr.State(more_by)
    pictures = gr.HTML(gallery_html(finished, more_by, first, "all", "all", "as drawn"), elem_id="gallery")
    more = gr.Button("Show more", elem_id="gallery-more")
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    show = functools.partial(gallery_html, finished)
    for one in filters:
        one.input(lambda *now: [more_by, show(more_by, *now)], filters, [shown, pictures], **quiet)
    more.click(
        lambda count, *now: [count + more_by, show(count + more_by, *now)],
        [shown, *filters],
        [shown, pictures],
        **quiet,
    )


def controls_of(painter: Painter) -> list[Any]:
    """Prompt, seed, steps, guidance, LoRA scale."""
    prompt = gr.Textbox(
        EXAMPLES[0] if painter.at_once else "",
        label="Prompt",
        max_length=LONGEST_PROMPT,
        max_lines=4,
        elem_id="prompt",
        placeholder="What shall be drawn?",
    )
    with gr.Row():
        return [
            prompt,
            gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1, min_width=140, elem_id="seed"),
            gr.Slider(1, 100, painter.steps, step=1, label="Steps", min_width=140, elem_id="steps"),
            gr.Slider(1, 15, painter.guidance, step=0.5, label="Guidance", min_width=140, elem_id="guidance"),
            gr.Slider(
                0,
                2 if len(painter.scales) > 2 else 1,
                1,
                step=0.05 if len(painter.scales) > 2 else 1,
                label="LoRA scale",
                min_width=140,
                elem_id="scale",
            ),
        ]


def build(painter: Painter, finished: SavedComparison | None = None) -> DemoPage:
    """The page that compares a base with its tuned side. finished: a comparison whose pictures it shows too."""
    with gr.Blocks(title="Base and tuned", analytics_enabled=False) as blocks:
        gr.HTML(
            '<div class="head"><h1>What did preference tuning change?</h1>'
            f"<p>{safe(painter.title)}: the same prompt, the same seed, so every difference is the adapter’s.</p></div>"
        )
        controls = controls_of(painter)
        with gr.Row():
            draw = gr.Button("Draw", variant="primary", elem_id="draw")
            another = gr.Button("Draw another seed", elem_id="another")
        if painter.at_once:
            gr.Examples([[example] for example in EXAMPLES], [controls[0]], label="Try", elem_id="examples")
        status = gr.HTML(elem_id="status", elem_classes="status")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                both = gr.HTML(elem_id="both")
            with gr.Column(scale=1, min_width=260):
                slider = gr.ImageSlider(
                    label="Base | tuned: move the line",
                    type="pil",
                    format="png",
                    interactive=False,
                    buttons=["fullscreen"],
                    max_height=420,
                    elem_id="slider",
                )
        with gr.Row():
            scales = gr.Button("Strip over LoRA scales", elem_id="over-scales")
            seeds = gr.Button("Strip over seeds", elem_id="over-seeds")
        strip = gr.HTML(elem_id="strip")
        if finished is not None:
            add_gallery(finished)
        quiet = {
            "show_progress": "hidden",
            "api_visibility": "private",
            "concurrency_id": "painter",
            "concurrency_limit": 1,
        }
        pair, show = [status, both, slider], functools.partial(compare, painter)
        for event in (draw.click, controls[0].submit):
            event(show, controls, pair, **quiet)
        another.click(
            lambda: secrets.randbelow(2**31), None, controls[1], show_progress="hidden", api_visibility="private"
        ).then(show, controls, pair, **quiet)
        scales.click(functools.partial(over_scales, painter), controls, [status, strip], **quiet)
        seeds.click(functools.partial(over_seeds, painter), controls, [status, strip], **quiet)
        if painter.at_once:
            blocks.load(show, controls, pair, **quiet).then(
                functools.partial(over_scales, painter), controls, [status, strip], **quiet
            )
    return DemoPage(blocks, css=CSS)


def run(
    model: str = SHIPPED_MODEL,
    adapter: str | None = None,
    judges: str | None = None,
    finished: str | None = None,
    *,
    precision: str = "fp32",
    port: int | None = None,
) -> None:
    """Serve the page. judges: names with commas; None: the shipped model's. finished: a comparison's folder, whose model,
    adapter and judges are taken unless others are given. Raises ValueError as `load` and `load_comparison`.
    """
    done = load_comparison(finished) if finished else None
    if done is not None and (model, adapter) == (SHIPPED_MODEL, None):
        model, adapter = done.settings.get("model", model), done.settings.get("adapter", "none")
        adapter = None if adapter == "none" else adapter
        judges = judges if judges is not None else ",".join(done.judges)
    given = judges if judges is not None else "faithfulness,aesthetic" if model == SHIPPED_MODEL else ""
    painter = load(model, adapter, [name for name in given.split(",") if name], precision=precision)
    serve(lambda: build(painter, done), port=port)


if __name__ == "__main__":
    run()
