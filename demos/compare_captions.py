"""Page with responses of base and tuned model about one image: `dpo-mm demo captions`."""

from __future__ import annotations

import html
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from dpo_mm.data.questions import Question, read_questions
from dpo_mm.data.schema import Response
from dpo_mm.evaluation.report import text_spans
from dpo_mm.judges import explain
from dpo_mm.pages.address import LOCAL, Serving
from dpo_mm.pages.server import QUIET, UPLOAD_LIMIT, DemoPage, escape, image_html, serve, uploaded_image
from dpo_mm.policies.families import load_text_policy
from dpo_mm.policies.vlm.generation import response_token_log_probs, stream_response

EXAMPLES = 12
"""Number of examples per model."""
TRIED_TOGETHER = 24
"""Number of questions that the base model answers at once, until it has failed on enough of them."""
MAX_PROMPT_LENGTH = 1000
FULL_SHADE = 3.0
"""Absolute log-ratio of a token, in nats, from which its shade is full."""
CSS = """
.responses { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 280px), 1fr)); gap: 14px; }
.response { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: .7rem .9rem; min-width: 0;
  background: var(--background-fill-primary); }
.response h3 { margin: 0 0 .4rem; font-size: 1rem; }
.response .text { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  font-size: .92rem; line-height: 1.55; min-height: 4.6em; }
.response mark { background: color-mix(in srgb, #dc2626 22%, transparent); color: inherit; border-bottom: 2px solid #dc2626; }
.response .fold { display: inline-block; border-radius: 6px; padding: 0 .45em; background: color-mix(in srgb, #d97706 25%, transparent);
  font-family: system-ui, sans-serif; font-size: .82rem; }
.response .note { margin: .5rem 0 0; font-size: .88rem; color: var(--quiet); }
.response .note.bad { color: #b91c1c; } .dark .response .note.bad { color: #f87171; }
.response .note.good { color: #15803d; } .dark .response .note.good { color: #4ade80; }
.shade { border-radius: 3px; }
.legend { font-size: .85rem; color: var(--quiet); margin: .5rem 0 0; }
.legend span { border-radius: 3px; padding: 0 .4em; color: var(--body-text-color); }
.image img { width: 100%; max-width: 420px; height: auto; border-radius: 10px; border: 1px solid var(--border-color-primary);
  display: block; margin: 0 auto; }
.examples .grid-container { grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)) !important; }
.examples, .examples .grid-wrap { height: auto !important; max-height: none !important; min-height: 0 !important; }
.examples .grid-wrap { overflow: visible !important; }
.status { min-height: 1.4em; color: var(--quiet); font-size: .9rem; }
"""


@dataclass(frozen=True)
class DemoModel:
    """A model with its tuned adapter attached, and examples.

    Args:
        title: name shown on the page.
        policy: text policy. Without its adapter it is the base model.
        questions: examples.
        judge: name of the judge that marks mistakes.
        max_new_tokens: largest number of tokens per response.
        num_failures: number of examples at the start on which the base model makes a mistake.
    """

    title: str
    policy: Any
    questions: tuple[Question, ...]
    judge: str
    max_new_tokens: int
    num_failures: int = 0


BUNDLED = {
    "Captioner": ("shapes-captioner", "shapes-captioner-tuned", "scenes-held-out", "hallucination_f1_error", 48),
    "OCR model": ("page-reader", "page-reader-tuned", "pages-held-out", "degeneration", 200),
}
"""Model, adapter, questions, judge and largest number of tokens of the bundled models."""


def load(
    model: str,
    adapter: str,
    questions: str | None,
    judge: str,
    max_new_tokens: int,
    *,
    precision: str,
    failures_first: bool = False,
) -> DemoModel:
    """Load a model with its adapter and choose examples.

    Args:
        failures_first: run the base model on the questions, and put some that it fails before the others.

    Raises:
        ValueError: if the model, the adapter or the questions cannot be read, or the model is not a text model.
    """
    policy = load_text_policy(model, precision=precision, adapter=adapter)
    available = read_questions(questions, limit=100) if questions else []
    shuffled = random.Random(0).sample(available, len(available))
    failures = base_failures(policy, shuffled, judge, max_new_tokens, count=EXAMPLES // 2) if failures_first else []
    others = [question for question in shuffled if question not in failures]
    examples = (*failures, *others)[:EXAMPLES]
    return DemoModel(f"{model} and {adapter}", policy, examples, judge, max_new_tokens, len(failures))


def base_failures(
    policy: Any, questions: Sequence[Question], judge: str, max_new_tokens: int, *, count: int
) -> list[Question]:
    """Return the first `count` questions for which the judge finds a mistake in the base model's greedy response."""
    failures: list[Question] = []
    for start in range(0, len(questions), TRIED_TOGETHER):
        tried = questions[start : start + TRIED_TOGETHER]
        images, prompts = [question.images for question in tried], [question.prompt for question in tried]
        with policy.base_weights():
            responses = policy.generate(
                images, prompts, max_new_tokens=max_new_tokens, do_sample=False, batch_size=TRIED_TOGETHER
            )
        answered = zip(tried, responses, strict=True)
        failures += [q for q, response in answered if explain(judge, response, q.ground_truth).reason]
        if len(failures) >= count:
            break
    return failures[:count]


@dataclass(frozen=True)
class ShownImage:
    """The image on the page, and its ground truth if it is an example."""

    image: Image.Image | None = None
    ground_truth: str = ""


def response_html(
    title: str, text: str, *, marks: Sequence[tuple[int, int]] = (), note: str = "", tone: str = ""
) -> str:
    """Return a response with marked mistakes, and with repetition loops folded to their number of repeats."""
    parts = []
    for span in text_spans(text, marks):
        if span.repeats:
            parts.append(f'<span class="fold" title="{escape(span.text[:400])}">… {span.repeats} more repeats</span>')
        else:
            parts.append(f"<mark>{escape(span.text)}</mark>" if span.marked else escape(span.text))
    note_html = f'<p class="note {tone}">{escape(note)}</p>' if note else ""
    return (
        f'<div class="response"><h3>{html.escape(title)}</h3><div class="text" dir="auto">{"".join(parts)}</div>'
        f"{note_html}</div>"
    )


def judged_response_html(title: str, text: str, ground_truth: str, judge: str) -> str:
    """Return a response with the mistakes that the judge finds, if the ground truth is known."""
    if not ground_truth:
        return response_html(title, text, note="There is no ground truth for this image.")
    explanation = explain(judge, Response(text, len(text), hit_limit=False), ground_truth)
    if explanation.reason:
        return response_html(title, text, marks=explanation.marks, note=explanation.reason, tone="bad")
    is_exact = text.strip() == ground_truth.strip()
    note = "Identical to the ground truth." if is_exact else f"{judge} finds no mistake."
    return response_html(title, text, note=note, tone="good")


def shaded_html(title: str, tokens: Sequence[str], log_ratios: Sequence[float]) -> str:
    """Return tokens shaded by log-ratio: green if tuning made them likelier, red if less likely."""
    parts = []
    for token, log_ratio in zip(tokens, log_ratios, strict=True):
        strength = min(1.0, math.sqrt(abs(log_ratio) / FULL_SHADE))
        colour = "#16a34a" if log_ratio > 0 else "#dc2626"
        style = f"background:color-mix(in srgb, {colour} {55 * strength:.0f}%, transparent)"
        parts.append(f'<span class="shade" style="{style}" title="{log_ratio:+.2f} nats">{escape(token)}</span>')
    total = f"Sum of the log-ratios: {sum(log_ratios):+.2f} nats"
    return (
        f'<div class="response"><h3>{html.escape(title)}</h3><div class="text" dir="auto">{"".join(parts)}</div>'
        f'<p class="note">{total}</p></div>'
    )


LEGEND = (
    '<p class="legend">Log-probability of each token in the tuned model compared with the base model: '
    '<span style="background:color-mix(in srgb, #16a34a 55%, transparent)">likelier</span> '
    '<span style="background:color-mix(in srgb, #dc2626 55%, transparent)">less likely</span>. '
    "Point at a token to see its log-ratio.</p>"
)


def compare(model: DemoModel, shown: ShownImage, prompt: str) -> Iterator[list[str]]:
    """Yield (status, responses, shaded tokens) as HTML while the responses are generated."""
    if shown.image is None:
        raise gr.Error("Choose an example or upload an image first.", print_exception=False)
    if not prompt.strip() or len(prompt) > MAX_PROMPT_LENGTH:
        raise gr.Error(f"Write a prompt of 1 to {MAX_PROMPT_LENGTH} characters.", print_exception=False)
    policy, images, responses = model.policy, [shown.image], {"Base": "", "Tuned": ""}
    show = lambda: f'<div class="responses">{"".join(response_html(*item) for item in responses.items())}</div>'
    yield ["The base model generates …", show(), ""]
    with policy.base_weights():
        for responses["Base"] in stream_response(policy, images, prompt, max_new_tokens=model.max_new_tokens):
            yield ["The base model generates …", show(), ""]
    for responses["Tuned"] in stream_response(policy, images, prompt, max_new_tokens=model.max_new_tokens):
        yield ["The tuned model generates …", show(), ""]
    judged = "".join(
        judged_response_html(name, text, shown.ground_truth, model.judge) for name, text in responses.items()
    )
    shaded = "".join(log_ratios_html(policy, images, prompt, name, text) for name, text in responses.items())
    ground_truth = f" Ground truth: {shown.ground_truth}" if shown.ground_truth else ""
    yield [
        escape("Done." + ground_truth),
        f'<div class="responses">{judged}</div>',
        LEGEND + f'<div class="responses">{shaded}</div>',
    ]


def log_ratios_html(policy: Any, images: Sequence[Any], prompt: str, name: str, text: str) -> str:
    """Compute the log-ratio of tuned and base for each token of a response, and return the shaded tokens."""
    tokens, tuned = response_token_log_probs(policy, images, prompt, text)
    with policy.base_weights():
        _, base = response_token_log_probs(policy, images, prompt, text)
    return shaded_html(f"{name}: change of each token’s log-probability", tokens, (tuned - base).tolist())


def shown_image_html(shown: ShownImage) -> str:
    return f'<div class="image">{image_html(shown.image, alt="the input image")}</div>' if shown.image else ""


def add_model(model: DemoModel, quiet: dict[str, Any]) -> list[Any]:
    """Add the controls of one model to the page. Return the function, inputs and outputs that run its first example."""
    first = model.questions[0] if model.questions else None
    start = ShownImage(first.images[0], first.ground_truth) if first else ShownImage()
    state = gr.State()  # its initial value would be in the page's configuration
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            image = gr.HTML(shown_image_html(start))
            upload = gr.UploadButton("Upload an image", type="binary", file_types=["image"], size="sm")
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(
                str(first.prompt) if first else "Describe the image.",
                label="Prompt",
                max_length=MAX_PROMPT_LENGTH,
                elem_classes="prompt-input",
            )
            generate = gr.Button("Generate with both", variant="primary", elem_classes="generate")
            status = gr.HTML(elem_classes="status")
            responses = gr.HTML(elem_classes="both-responses")
    shaded = gr.HTML(elem_classes="shading")
    outputs = [status, responses, shaded]

    def run(shown: ShownImage | None, text: str) -> Iterator[list[str]]:
        yield from compare(model, shown or start, text)

    generate.click(run, [state, prompt], outputs, **quiet)
    prompt.submit(run, [state, prompt], outputs, **quiet)

    def use_upload(data: bytes) -> list[Any]:
        shown = ShownImage(uploaded_image(data))
        return [shown, shown_image_html(shown), "", "", ""]

    upload.upload(use_upload, upload, [state, image, *outputs], **QUIET)
    if model.questions:
        failures = f" The base model makes a mistake on the first {model.num_failures}." if model.num_failures else ""
        gr.HTML(f'<p class="legend">Click an example.{failures}</p>')
        gallery = gr.Gallery(
            [question.images[0] for question in model.questions],
            label="Examples",
            show_label=False,
            columns=6,
            height="auto",
            format="png",
            allow_preview=False,
            interactive=False,
            buttons=[],
            elem_classes="examples",
        )

        def choose(event: gr.SelectData) -> list[Any]:
            question = model.questions[event.index]
            shown = ShownImage(question.images[0], question.ground_truth)
            return [shown, shown_image_html(shown), str(question.prompt)]

        gallery.select(choose, None, [state, image, prompt], **QUIET).then(run, [state, prompt], outputs, **quiet)
    return [run, [state, prompt], outputs]


def build(models: dict[str, DemoModel]) -> DemoPage:
    """Build the page that compares responses of base and tuned model."""
    titles = ", ".join(model.title for model in models.values())
    with gr.Blocks(title="Responses of base and tuned model", analytics_enabled=False) as blocks:
        gr.HTML(
            '<div class="head"><h1>Responses of base and tuned model</h1>'
            f"<p>{escape(titles)}. Both get the same image and prompt, and decode greedily.</p></div>"
        )
        quiet = {**QUIET, "concurrency_id": "one", "concurrency_limit": 1}
        first_runs = []
        if len(models) == 1:
            first_runs.append(add_model(next(iter(models.values())), quiet))
        else:
            for name, model in models.items():
                with gr.Tab(name):
                    first_runs.append(add_model(model, quiet))
        if all(model.questions for model in models.values()):
            for function, inputs, outputs in first_runs:
                blocks.load(function, inputs, outputs, **quiet)
    return DemoPage(blocks, css=CSS, upload_limit=UPLOAD_LIMIT)


def run(
    model: str | None = None,
    adapter: str | None = None,
    questions: str | None = None,
    judge: str = "degeneration",
    *,
    max_new_tokens: int = 256,
    precision: str = "fp32",
    serving: Serving = LOCAL,
) -> None:
    """Serve the page, with the bundled captioner and OCR model if no model is given.

    Raises:
        ValueError: if there is a model but no adapter, or as in `load`.
    """
    if model is None:
        models = {name: load(*row, precision=precision, failures_first=True) for name, row in BUNDLED.items()}
    elif adapter is None:
        raise ValueError(f"model {model!r} has no tuned adapter to compare with. Pass it as --adapter FOLDER")
    else:
        models = {model: load(model, adapter, questions, judge, max_new_tokens, precision=precision)}
    serve(lambda: build(models), serving)


if __name__ == "__main__":
    run()
