"""Page with images of base and tuned model from the same seed: `dpo-mm demo images`."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from dpo_mm.data.image_files import decode_image, encode_png
from dpo_mm.evaluation.saved_comparison import SavedComparison, bundled_models, load_comparison
from dpo_mm.judges import JUDGES, load_judge, metric_of
from dpo_mm.judges.score_checks import image_scores
from dpo_mm.pages.address import LOCAL, Serving
from dpo_mm.pages.gallery import add_gallery, figures_html, score_html
from dpo_mm.pages.server import (
    QUIET,
    SMALL_IMAGE,
    UPLOAD_LIMIT,
    DemoPage,
    escape,
    image_html,
    serve,
    source_titles,
    uploaded_image,
)
from dpo_mm.policies.families import load_image_policy

BUNDLED_MODEL, BUNDLED_ADAPTER = "shapes-sd", "shapes-sd-faithful"
SAMPLERS = {BUNDLED_MODEL: (15, 1.5), "shapes-editor": (10, 1.0)}
"""Steps and guidance of bundled models."""
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
SEEDS = 4
"""Number of seeds in a strip."""
CACHED_IMAGES = 64
"""Number of images in the cache, so that a strip reuses the images on the page."""
ENLARGED_EDGE = 512
"""Pixels to which a small image is enlarged for the slider, without smoothing."""
MAX_PROMPT_LENGTH = 1000
JUDGES_OF = {BUNDLED_MODEL: ["faithfulness", "aesthetic"], "shapes-editor": ["edit_followed", "edit_preserved"]}
"""Judges of bundled models."""
EXAMPLES = (
    "three red stars",
    "a green cross above a purple circle",
    "a blue circle and a yellow star",
    "a big orange triangle",
    "two purple squares",
)
Sources = tuple[bytes, ...]
"""Image files to edit."""
CSS = """
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(0, 1fr)); grid-auto-flow: column; gap: 12px; }
.figures figure { margin: 0; min-width: 0; }
.figures img, .figures .blank { width: 100%; height: auto; aspect-ratio: 1; object-fit: contain; border-radius: 10px;
  border: 1px solid var(--border-color-primary); background: var(--background-fill-secondary); display: block; }
.figures .blank { display: grid; place-items: center; color: var(--quiet); }
.figures figcaption { margin-top: .35rem; font-size: .9rem; line-height: 1.4; }
.figures figcaption b { display: block; }
#source .figures { grid-template-columns: none; grid-auto-columns: minmax(0, 220px); }
.score { color: var(--quiet); display: block; }
.score.yes { color: #15803d; } .dark .score.yes { color: #4ade80; }
.score.no { color: #b91c1c; } .dark .score.no { color: #f87171; }
.strip .figures { grid-auto-columns: minmax(118px, 1fr); grid-template-columns: none; overflow-x: auto; padding-bottom: 6px; }
.strip h3 { margin: .2rem 0 .5rem; font-size: 1rem; }
.figures + .figures { margin-top: 10px; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 18px; }
.pairs article { min-width: 0; border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 12px; }
.pairs h3 { font-size: .95rem; margin: 0 0 .5rem; unicode-bidi: isolate; overflow-wrap: anywhere; }
.quiet { color: var(--quiet); font-size: .9rem; margin: .2rem 0 .8rem; }
.status { min-height: 1.4em; color: var(--quiet); font-size: .9rem; }
"""


@dataclass(frozen=True)
class DemoModel:
    """A model with its tuned adapter, and the settings of the page.

    Args:
        generate: function of (prompt, seed, steps, guidance, adapter scale, images to edit) that returns an image.
        judges: names of the judges that score the images.
        scales: adapter scales of the strip.
        title: name shown on the page.
        steps, guidance: initial values of the controls.
        generate_on_load: generate an example when the page opens.
        edits: the model edits an uploaded image.
        sources_needed: it does not generate from text alone.
        several_sources: it takes several images.
    """

    generate: Callable[[str, int, int, float, float, Sources], Image.Image]
    judges: tuple[str, ...]
    scales: tuple[float, ...]
    title: str
    steps: int
    guidance: float
    generate_on_load: bool
    edits: bool = False
    sources_needed: bool = False
    several_sources: bool = False


def load(model: str, adapter: str | None, judges: Sequence[str], *, precision: str) -> DemoModel:
    """Load a model with its adapter, and the judges.

    Raises:
        ValueError: if the model has no adapter, or as in `load_image_policy` and `load_judge`.
    """
    if adapter is None and model != BUNDLED_MODEL:
        raise ValueError(f"model {model!r} has no tuned adapter to compare with. Pass it as --adapter FOLDER")
    policy = load_image_policy(model, precision=precision, adapter=adapter or BUNDLED_ADAPTER)
    for judge in judges:
        load_judge(judge)

    @functools.lru_cache(maxsize=CACHED_IMAGES)
    def generate(prompt: str, seed: int, steps: int, guidance: float, scale: float, sources: Sources) -> Image.Image:
        settings: dict[str, Any] = {"steps": steps, "guidance": guidance, "batch_size": 1, "scale": scale}
        images = [[decode_image(source) for source in sources]] if sources else None
        return next(policy.sample([prompt], [seed], **settings, sources=images))[0]

    steps, guidance = SAMPLERS.get(model, (30, 7.5))
    return DemoModel(
        generate=generate,
        judges=tuple(judges),
        scales=SCALES if policy.base_pipe is None else (0.0, 1.0),
        title=f"{model} and {adapter or BUNDLED_ADAPTER}",
        steps=steps,
        guidance=guidance,
        generate_on_load=model == BUNDLED_MODEL,
        edits=policy.is_image_editing or policy.edits_optionally,
        sources_needed=policy.is_image_editing,
        several_sources=policy.takes_several_sources,
    )


def figure_html(
    title: str, image: Image.Image | None, prompt: str, judges: Sequence[str], sources: Sources = ()
) -> str:
    """Return an image with its title and the judges' scores, or a placeholder if there is no image yet."""
    if image is None:
        return f'<figure><div class="blank">generating …</div><figcaption><b>{escape(title)}</b></figcaption></figure>'
    scores = "".join(judge_score_html(judge, image, prompt, sources) for judge in judges)
    return f"<figure>{image_html(image, alt=title)}<figcaption><b>{escape(title)}</b>{scores}</figcaption></figure>"


def judge_score_html(judge: str, image: Image.Image, prompt: str, sources: Sources) -> str:
    """Score an image with a judge. Return the score, or a note if the judge cannot score this prompt."""
    images = [[decode_image(source) for source in sources]] if sources else ()
    try:
        return score_html(judge, float(image_scores(judge, [image], [prompt], images)[0]))
    except ValueError as error:
        return f'<span class="score" title="{escape(str(error))}">{escape(metric_of(judge))}: no score</span>'


def enlarge_small(image: Image.Image) -> Image.Image:
    """Enlarge a small image without smoothing, so that the browser does not smooth it. Larger images are unchanged."""
    if max(image.size) > SMALL_IMAGE:
        return image
    factor = ENLARGED_EDGE // max(image.size)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def check_controls(
    model: DemoModel, prompt: str, seed: float | None, steps: float, guidance: float, scale: float, sources: Sources
) -> tuple[Any, ...]:
    """Convert the values of the controls to the arguments of `DemoModel.generate`.

    Raises:
        gr.Error: if a value is not valid. The page shows the message.
    """
    if not prompt.strip():
        raise gr.Error("Write a prompt first.", print_exception=False)
    if len(prompt) > MAX_PROMPT_LENGTH:
        raise gr.Error(f"The prompt is longer than {MAX_PROMPT_LENGTH} characters.", print_exception=False)
    if seed is None or not 0 <= seed < 2**31:
        raise gr.Error("The seed must be a whole number from 0 to 2147483647.", print_exception=False)
    if model.sources_needed and not sources:
        raise gr.Error("Upload an image first.", print_exception=False)
    return prompt.strip(), int(seed), int(steps), float(guidance), float(scale), tuple(sources)


def compare(model: DemoModel, *controls: Any) -> Iterator[list[Any]]:
    """Yield (status, both images, slider) while the images are generated."""
    prompt, seed, steps, guidance, scale, sources = check_controls(model, *controls)
    titles = ("base", f"tuned, LoRA scale {scale:g}")
    show = lambda *images: figures_html(
        [figure_html(title, image, prompt, model.judges, sources) for title, image in zip(titles, images, strict=True)]
    )
    yield ["Generating with the base model …", show(None, None), gr.skip()]
    base = model.generate(prompt, seed, steps, guidance, 0.0, sources)
    yield ["Generating with the tuned model …", show(base, None), gr.skip()]
    tuned = model.generate(prompt, seed, steps, guidance, scale, sources)
    note = " Both images are identical." if base.tobytes() == tuned.tobytes() else ""
    yield [f"Both from seed {seed}.{note}", show(base, tuned), (enlarge_small(base), enlarge_small(tuned))]


def strip_over_scales(model: DemoModel, *controls: Any) -> Iterator[list[str]]:
    """Yield (status, strip) while the images of one seed at several LoRA scales are generated."""
    prompt, seed, steps, guidance, _, sources = check_controls(model, *controls)
    titles = ["base" if not scale else f"scale {scale:g}" for scale in model.scales]
    images: list[Image.Image | None] = [None] * len(titles)
    for n, scale in enumerate(model.scales):
        images[n] = model.generate(prompt, seed, steps, guidance, scale, sources)
        each = zip(titles, images, strict=True)
        figures = [figure_html(title, image, prompt, model.judges, sources) for title, image in each]
        status = f"{n + 1} of {len(titles)} LoRA scales generated, seed {seed}."
        yield [
            status,
            f'<div class="strip"><h3>Seed {seed}, several LoRA scales</h3>{figures_html(figures, scrolls="LoRA scales")}</div>',
        ]


def strip_over_seeds(model: DemoModel, *controls: Any) -> Iterator[list[str]]:
    """Yield (status, strip) while images of base (above) and tuned (below) are generated from the next seeds."""
    prompt, seed, steps, guidance, scale, sources = check_controls(model, *controls)
    seeds = [(seed + n) % 2**31 for n in range(SEEDS)]
    images: dict[tuple[int, float], Image.Image] = {}
    for n, next_seed in enumerate(seeds):
        for row_scale in (0.0, scale):
            images[next_seed, row_scale] = model.generate(prompt, next_seed, steps, guidance, row_scale, sources)
        rows = [
            figures_html(
                [
                    figure_html(f"{name}, seed {s}", images.get((s, row_scale)), prompt, model.judges, sources)
                    for s in seeds
                ],
                scrolls=f"{name}, several seeds",
            )
            for name, row_scale in (("base", 0.0), ("tuned", scale))
        ]
        status = f"{n + 1} of {SEEDS} seeds generated."
        yield [status, f'<div class="strip"><h3>Several seeds, LoRA scale {scale:g}</h3>{"".join(rows)}</div>']


def add_controls(model: DemoModel) -> list[Any]:
    """Add the controls to the page: prompt, seed, steps, guidance scale, LoRA scale and the image to edit."""
    sources = gr.State(())
    if model.edits:
        shown = gr.HTML(elem_id="source")
        several = model.several_sources
        label = "Add an image to edit" if several else "Upload an image to edit"
        with gr.Row():
            upload = gr.UploadButton(label, type="binary", file_types=["image"], elem_id="upload")
            if several:
                remove = gr.Button("Remove all images", elem_id="remove")
                remove.click(lambda: [(), ""], None, [sources, shown], **QUIET)
        add = functools.partial(use_upload, several=several)
        upload.upload(add, [upload, sources], [sources, shown], **QUIET)
    prompt = gr.Textbox(
        EXAMPLES[0] if model.generate_on_load else "",
        label="Prompt",
        max_length=MAX_PROMPT_LENGTH,
        max_lines=4,
        elem_id="prompt",
        placeholder="Describe the edit" if model.edits else "Describe an image",
    )
    with gr.Row():
        return [
            prompt,
            gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1, min_width=140, elem_id="seed"),
            gr.Slider(1, 100, model.steps, step=1, label="Steps", min_width=140, elem_id="steps"),
            gr.Slider(1, 15, model.guidance, step=0.5, label="Guidance", min_width=140, elem_id="guidance"),
            gr.Slider(
                0,
                2 if len(model.scales) > 2 else 1,
                1,
                step=0.05 if len(model.scales) > 2 else 1,
                label="LoRA scale",
                min_width=140,
                elem_id="scale",
            ),
            sources,
        ]


def use_upload(data: bytes, sources: Sources, *, several: bool) -> list[Any]:
    """Return the images to edit as PNG, and their HTML. An upload is added to them, or replaces the only one.

    Raises:
        gr.Error: as `uploaded_image`.
    """
    sources = (*(sources if several else ()), encode_png(uploaded_image(data)))
    images = zip(map(decode_image, sources), source_titles(len(sources)), strict=True)
    figures = [
        f"<figure>{image_html(image, alt=title)}<figcaption>{title}</figcaption></figure>" for image, title in images
    ]
    return [sources, figures_html(figures)]


def build(model: DemoModel, comparison: SavedComparison | None = None) -> DemoPage:
    """Build the page that compares images of base and tuned model.

    Args:
        comparison: a saved comparison whose images the page also shows.
    """
    same = f"image{'s' * model.several_sources}, prompt and seed" if model.edits else "prompt and seed"
    with gr.Blocks(title="Images of base and tuned model", analytics_enabled=False) as blocks:
        gr.HTML(
            '<div class="head"><h1>Images of base and tuned model</h1>'
            f"<p>{escape(model.title)}. Both get the same {same}, so only the adapter makes a difference.</p>"
            "</div>"
        )
        controls = add_controls(model)
        with gr.Row():
            generate = gr.Button("Generate", variant="primary", elem_id="generate")
            another = gr.Button("Generate from another seed", elem_id="another")
        if model.generate_on_load:
            gr.Examples([[example] for example in EXAMPLES], [controls[0]], label="Examples", elem_id="examples")
        status = gr.HTML(elem_id="status", elem_classes="status")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                both = gr.HTML(elem_id="both")
            with gr.Column(scale=1, min_width=260):
                slider = gr.ImageSlider(
                    label="Base | tuned (drag the line)",
                    type="pil",
                    format="png",
                    interactive=False,
                    buttons=["fullscreen"],
                    max_height=420,
                    elem_id="slider",
                )
        with gr.Row():
            scales = gr.Button("Compare LoRA scales", elem_id="over-scales")
            seeds = gr.Button("Compare seeds", elem_id="over-seeds")
        strip = gr.HTML(elem_id="strip")
        if comparison is not None:
            add_gallery(comparison)
        quiet = {**QUIET, "concurrency_id": "model", "concurrency_limit": 1}
        pair, show = [status, both, slider], functools.partial(compare, model)
        for event in (generate.click, controls[0].submit):
            event(show, controls, pair, **quiet)
        another.click(lambda: secrets.randbelow(2**31), None, controls[1], **QUIET).then(show, controls, pair, **quiet)
        scales.click(functools.partial(strip_over_scales, model), controls, [status, strip], **quiet)
        seeds.click(functools.partial(strip_over_seeds, model), controls, [status, strip], **quiet)
        if model.generate_on_load:
            blocks.load(show, controls, pair, **quiet).then(
                functools.partial(strip_over_scales, model), controls, [status, strip], **quiet
            )
    return DemoPage(blocks, css=CSS, upload_limit=UPLOAD_LIMIT if model.edits else 0)


def run(
    model: str = BUNDLED_MODEL,
    adapter: str | None = None,
    judges: str | None = None,
    comparison: str | None = None,
    *,
    precision: str = "fp32",
    serving: Serving = LOCAL,
) -> None:
    """Serve the page.

    Args:
        judges: names separated by commas. None: those of the bundled model.
        comparison: folder of a saved comparison. Its model, adapter and judges are used if they are bundled or built in,
            unless others are given.

    Raises:
        ValueError: as in `load`, `load_comparison` and `bundled_models`.
    """
    names = judges.split(",") if judges is not None else None
    saved = load_comparison(comparison, judges=names) if comparison else None
    if saved is not None and (model, adapter) == (BUNDLED_MODEL, None):
        model, adapter = bundled_models(saved, str(comparison), default=BUNDLED_MODEL)
        names = names if names is not None else [judge for judge in saved.judges if judge in JUDGES]
    if names is None:
        names = JUDGES_OF.get(model, [])
    demo_model = load(model, adapter, [name for name in names if name], precision=precision)
    serve(lambda: build(demo_model, saved), serving)


if __name__ == "__main__":
    run()
