"""Base and tuned captioner or reader on one picture, side by side: `dpo-mm demo captions`."""

from __future__ import annotations

import html
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from dpo_mm.data.image_files import decode_image
from dpo_mm.data.questions import Question, read_questions
from dpo_mm.data.schema import Response
from dpo_mm.demo_server import DemoPage, img, safe, serve
from dpo_mm.evaluation.report import text_spans
from dpo_mm.judges import explain
from dpo_mm.policies.families import load_text_policy
from dpo_mm.policies.vlm.generation import stream, token_log_probs

EXAMPLES = 12
LARGEST_UPLOAD = 20_000_000
"""Bytes."""
LONGEST_PROMPT = 1000
STRONGEST = 3.0
"""Nats of log-ratio at which the shading is full."""
PIXELS = 1024
"""The longer side that an uploaded picture is shrunk to."""
CSS = """
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 280px), 1fr)); gap: 14px; }
.answer { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: .7rem .9rem; min-width: 0;
  background: var(--background-fill-primary); }
.answer h3 { margin: 0 0 .4rem; font-size: 1rem; }
.answer .text { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  font-size: .92rem; line-height: 1.55; min-height: 4.6em; }
.answer mark { background: color-mix(in srgb, #dc2626 22%, transparent); color: inherit; border-bottom: 2px solid #dc2626; }
.answer .fold { display: inline-block; border-radius: 6px; padding: 0 .45em; background: color-mix(in srgb, #d97706 25%, transparent);
  font-family: system-ui, sans-serif; font-size: .82rem; }
.answer .note { margin: .5rem 0 0; font-size: .88rem; color: var(--quiet); }
.answer .note.bad { color: #b91c1c; } .dark .answer .note.bad { color: #f87171; }
.answer .note.good { color: #15803d; } .dark .answer .note.good { color: #4ade80; }
.shade { border-radius: 3px; }
.legend { font-size: .85rem; color: var(--quiet); margin: .5rem 0 0; }
.legend span { border-radius: 3px; padding: 0 .4em; color: var(--body-text-color); }
.picture img { width: 100%; max-width: 420px; height: auto; border-radius: 10px; border: 1px solid var(--border-color-primary);
  display: block; margin: 0 auto; }
.examples .grid-container { grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)) !important; }
.examples, .examples .grid-wrap { height: auto !important; max-height: none !important; min-height: 0 !important; }
.examples .grid-wrap { overflow: visible !important; }
.status { min-height: 1.4em; color: var(--quiet); font-size: .9rem; }
"""


@dataclass(frozen=True)
class Subject:
    """Who answers: a policy with its tuned side attached, and pictures to try it on.

    judge: of what is wrong. failing: so many of the first questions are there because the base fails them.
    """

    title: str
    policy: Any
    questions: tuple[Question, ...]
    judge: str
    limit: int
    failing: int = 0


SHIPPED = {
    "Captioner": ("shapes-captioner", "shapes-captioner-tuned", "scenes-held-out", "hallucination_f1_error", 48),
    "Reader": ("page-reader", "page-reader-tuned", "pages-held-out", "degeneration", 200),
}


def load(
    model: str,
    adapter: str,
    questions: str | None,
    judge: str,
    limit: int,
    *,
    precision: str,
    ask_first: bool = False,
) -> Subject:
    """Raises ValueError as `load_text_policy` and `read_questions`; also for a model of pictures.

    ask_first: put some questions before the others that the base fails, as found by asking it.
    """
    policy = load_text_policy(model, precision=precision, adapter=adapter)
    found = read_questions(questions, limit=100) if questions else []
    shuffled = random.Random(0).sample(found, len(found))
    failed = failures(policy, shuffled, judge, limit)[: EXAMPLES // 2] if ask_first else []
    others = [question for question in shuffled if question not in failed]
    return Subject(f"{model} and {adapter}", policy, (*failed, *others)[:EXAMPLES], judge, limit, len(failed))


def failures(policy: Any, questions: Sequence[Question], judge: str, limit: int) -> list[Question]:
    """The questions to whose greedy answer by the base a judge objects."""
    images, prompts = [question.images for question in questions], [question.prompt for question in questions]
    with policy.base_weights():
        answers = policy.generate(images, prompts, max_new_tokens=limit, do_sample=False, batch_size=100)
    return [q for q, answer in zip(questions, answers, strict=True) if explain(judge, answer, q.truth).reason]


@dataclass(frozen=True)
class Asked:
    """What is being asked: a picture, and its truth where it is an example."""

    picture: Image.Image | None = None
    truth: str = ""


def answer_html(title: str, text: str, *, marks: Sequence[tuple[int, int]] = (), note: str = "", tone: str = "") -> str:
    """An answer with what isn't there marked, and long loops folded with their length."""
    shown = []
    for piece in text_spans(text, marks):
        if piece.repeats:
            shown.append(f'<span class="fold" title="{safe(piece.text[:400])}">… {piece.repeats} rounds more</span>')
        else:
            shown.append(f"<mark>{safe(piece.text)}</mark>" if piece.marked else safe(piece.text))
    below = f'<p class="note {tone}">{safe(note)}</p>' if note else ""
    return f'<div class="answer"><h3>{html.escape(title)}</h3><div class="text" dir="auto">{"".join(shown)}</div>{below}</div>'


def judged(title: str, text: str, truth: str, judge: str) -> str:
    """An answer with what is wrong with it, where the truth is known."""
    if not truth:
        return answer_html(title, text, note="The truth is not known for this picture.")
    finding = explain(judge, Response(text, len(text), hit_limit=False), truth)
    if finding.reason:
        return answer_html(title, text, marks=finding.marks, note=finding.reason, tone="bad")
    right = text.strip() == truth.strip()
    return answer_html(title, text, note="Word for word right." if right else f"Nothing found by {judge}.", tone="good")


def shaded_html(title: str, tokens: Sequence[str], ratios: Sequence[float]) -> str:
    """Tokens shaded by log-ratio: green where tuning made them likelier, red where less likely."""
    shown = []
    for token, ratio in zip(tokens, ratios, strict=True):
        strength = min(1.0, math.sqrt(abs(ratio) / STRONGEST))
        colour = "#16a34a" if ratio > 0 else "#dc2626"
        style = f"background:color-mix(in srgb, {colour} {55 * strength:.0f}%, transparent)"
        shown.append(f'<span class="shade" style="{style}" title="{ratio:+.2f} nats">{safe(token)}</span>')
    total = f"{sum(ratios):+.2f} nats in all"
    return (
        f'<div class="answer"><h3>{html.escape(title)}</h3><div class="text" dir="auto">{"".join(shown)}</div>'
        f'<p class="note">{total}</p></div>'
    )


LEGEND = (
    '<p class="legend">How much likelier the tuned model makes each token than the base does: '
    '<span style="background:color-mix(in srgb, #16a34a 55%, transparent)">likelier</span> '
    '<span style="background:color-mix(in srgb, #dc2626 55%, transparent)">less likely</span>. '
    "Hold the pointer over a token for its log-ratio.</p>"
)


def compare(subject: Subject, asked: Asked, prompt: str) -> Iterator[list[str]]:
    """(status, answers, shading), as they are written."""
    if asked.picture is None:
        raise gr.Error("Choose an example or upload a picture first.", print_exception=False)
    if not prompt.strip() or len(prompt) > LONGEST_PROMPT:
        raise gr.Error(f"Write a prompt of at most {LONGEST_PROMPT} letters.", print_exception=False)
    policy, images, answers = subject.policy, [asked.picture], {"Base": "", "Tuned": ""}
    show = lambda: f'<div class="answers">{"".join(answer_html(*one) for one in answers.items())}</div>'
    yield ["The base answers …", show(), ""]
    with policy.base_weights():
        for answers["Base"] in stream(policy, images, prompt, max_new_tokens=subject.limit):
            yield ["The base answers …", show(), ""]
    for answers["Tuned"] in stream(policy, images, prompt, max_new_tokens=subject.limit):
        yield ["The tuned model answers …", show(), ""]
    done = "".join(judged(name, text, asked.truth, subject.judge) for name, text in answers.items())
    shaded = "".join(shading(policy, images, prompt, name, text) for name, text in answers.items())
    truth = f" The truth: {asked.truth}" if asked.truth else ""
    yield [
        safe("Both answered." + truth),
        f'<div class="answers">{done}</div>',
        LEGEND + f'<div class="answers">{shaded}</div>',
    ]


def shading(policy: Any, images: Sequence[Any], prompt: str, name: str, text: str) -> str:
    tokens, tuned = token_log_probs(policy, images, prompt, text)
    with policy.base_weights():
        _, base = token_log_probs(policy, images, prompt, text)
    return shaded_html(f"{name}: where the preference acts", tokens, (tuned - base).tolist())


def uploaded(data: bytes) -> Asked:
    """Raises gr.Error, in words for the visitor, for what is no picture or too large a one."""
    try:
        picture = decode_image(data)
    except ValueError as error:
        raise gr.Error(f"This file can’t be used: {safe(str(error))}.", print_exception=False) from error
    picture.thumbnail((PIXELS, PIXELS))
    return Asked(picture)


def picture_html(asked: Asked) -> str:
    return f'<div class="picture">{img(asked.picture, alt="the picture asked about")}</div>' if asked.picture else ""


def subject_tab(subject: Subject, quiet: dict[str, Any]) -> list[Any]:
    """One subject's part of a page; what asks it about its first example: function, inputs and outputs."""
    first = subject.questions[0] if subject.questions else None
    start = Asked(first.images[0], first.truth) if first else Asked()
    asked = gr.State(start)
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            picture = gr.HTML(picture_html(start))
            upload = gr.UploadButton("Upload a picture", type="binary", file_types=["image"], size="sm")
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(
                str(first.prompt) if first else "Describe the picture.",
                label="Prompt",
                max_length=LONGEST_PROMPT,
                elem_classes="ask-prompt",
            )
            ask = gr.Button("Ask both", variant="primary", elem_classes="ask")
            status = gr.HTML(elem_classes="status")
            answers = gr.HTML(elem_classes="both-answers")
    shaded = gr.HTML(elem_classes="shading")
    outputs = [status, answers, shaded]

    def run(now: Asked, text: str) -> Iterator[list[str]]:
        yield from compare(subject, now, text)

    ask.click(run, [asked, prompt], outputs, **quiet)
    prompt.submit(run, [asked, prompt], outputs, **quiet)

    def use(data: bytes) -> list[Any]:
        found = uploaded(data)
        return [found, picture_html(found), "", "", ""]

    plain = {"show_progress": "hidden", "api_visibility": "private"}
    upload.upload(use, upload, [asked, picture, *outputs], **plain)
    if subject.questions:
        failing = f"; the base fails the first {subject.failing}" if subject.failing else ""
        gr.HTML(f'<p class="legend">Examples to click{failing}.</p>')
        gallery = gr.Gallery(
            [question.images[0] for question in subject.questions],
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
            question = subject.questions[event.index]
            found = Asked(question.images[0], question.truth)
            return [found, picture_html(found), str(question.prompt)]

        gallery.select(choose, None, [asked, picture, prompt], **plain).then(run, [asked, prompt], outputs, **quiet)
    return [run, [asked, prompt], outputs]


def build(subjects: dict[str, Subject]) -> DemoPage:
    """The page that compares what base and tuned say of a picture."""
    titles = "; ".join(subject.title for subject in subjects.values())
    with gr.Blocks(title="Base and tuned answers", analytics_enabled=False) as blocks:
        gr.HTML(
            '<div class="head"><h1>What does it see, before and after?</h1>'
            f"<p>{safe(titles)}: the same picture, the same question, greedy answers.</p></div>"
        )
        quiet = {
            "show_progress": "hidden",
            "api_visibility": "private",
            "concurrency_id": "one",
            "concurrency_limit": 1,
        }
        asks = []
        if len(subjects) == 1:
            asks.append(subject_tab(next(iter(subjects.values())), quiet))
        else:
            for name, subject in subjects.items():
                with gr.Tab(name):
                    asks.append(subject_tab(subject, quiet))
        if all(subject.questions for subject in subjects.values()):
            for function, inputs, outputs in asks:
                blocks.load(function, inputs, outputs, **quiet)
    return DemoPage(blocks, css=CSS, upload_limit=LARGEST_UPLOAD)


def run(
    model: str | None = None,
    adapter: str | None = None,
    questions: str | None = None,
    judge: str = "degeneration",
    *,
    max_new_tokens: int = 256,
    precision: str = "fp32",
    port: int | None = None,
) -> None:
    """Serve the page; without a model that of the shipped captioner and reader. Raises ValueError as `load`."""
    if model is None:
        subjects = {name: load(*what, precision=precision, ask_first=True) for name, what in SHIPPED.items()}
    elif adapter is None:
        raise ValueError(f"model {model!r} has no tuned side; give it as --adapter FOLDER")
    else:
        subjects = {model: load(model, adapter, questions, judge, max_new_tokens, precision=precision)}
    serve(lambda: build(subjects), port=port)


if __name__ == "__main__":
    run()
