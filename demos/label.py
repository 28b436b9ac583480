"""Page to label pairs of images in a blind test, by keyboard, for several people at once: `dpo-mm demo label`.

Votes are saved to SQLite as they are cast. `dpo-mm label export` writes them as preference rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr

from dpo_mm.labels.agreement import krippendorff_alpha
from dpo_mm.labels.annotators import MAX_NAME_LENGTH, annotator_name
from dpo_mm.labels.export import model_ratings, preset_for, train_command
from dpo_mm.labels.pair_set import PairSet
from dpo_mm.labels.pairs import pair_digest
from dpo_mm.labels.vote_training import SAMPLES, VOTES, TrainingPlan, VoteTraining
from dpo_mm.pages.access import is_host, person_of
from dpo_mm.pages.address import LOCAL, Serving
from dpo_mm.pages.guard import session_of
from dpo_mm.pages.label_page import (
    ANNOUNCE,
    CSS,
    FORGET_NAME,
    HEAD,
    LOAD_NAME,
    READ_NAME,
    READ_PAGE,
    SAVE_NAME,
    finished_html,
    head_html,
    message_of,
    pair_html,
    progress_html,
    ratings_html,
    training_html,
)
from dpo_mm.pages.server import QUIET, DemoPage, serve

TRAINING_SECONDS = 2
"""Seconds between two looks at the progress of a training."""

BUTTONS = {
    "left": ("Left", "←"),
    "tie": ("Tie", "↓"),
    "right": ("Right", "→"),
    "both_bad": ("Both bad", "B"),
    "skip": ("Skip", "S"),
    "undo": ("Undo", "U"),
}


@dataclass(frozen=True)
class Voter:
    """Who sent a request: the name, the browser's session, and True if a secret link gave the name."""

    name: str
    session: str | None
    is_known: bool

    @classmethod
    def of(cls, request: gr.Request, name: str) -> Voter:
        """Return who sent a request. A name that the browser sends counts only if the page has no people."""
        person = person_of(request.headers)
        return cls(person or name.strip(), session_of(request.headers.get("cookie", "")), person is not None)


class Labelling:
    """Answers to the events of one page."""

    def __init__(self, first: PairSet, training: VoteTraining | None) -> None:
        self.first, self.training = first, training
        self._fresh = lru_cache(maxsize=4)(self._open_fresh)

    def _open_fresh(self, number: int) -> PairSet:
        assert self.training is not None
        folder = self.training.round_folder(number)
        return PairSet.open(str(folder / SAMPLES), folder / VOTES, number=number)

    @property
    def pairs(self) -> PairSet:
        """Pairs that the page offers now."""
        number = self.training.offered() if self.training is not None else 0
        return self._fresh(number) if number else self.first

    def updates(self, voter: Voter) -> list[Any]:
        """Return updates of the page: visibility of the name form and of the labelling form, the pair, the progress.

        Raises:
            ValueError, OSError: if the name, the pair or the vote store is not valid.
        """
        if not voter.name:
            return [gr.update(visible=True), gr.update(visible=False), "", ""]
        annotator, pairs = annotator_name(voter.name), self.pairs
        is_taken = pairs.store.is_taken(annotator, voter.session)
        presented = pairs.store.next_pair(annotator, voter.session)
        if presented is None:
            body = finished_html(pairs.store, annotator)
        else:
            row = pairs.rows[pairs.row_numbers[presented.pair]]
            pairs.store.record_digest(row["id"], pair_digest(row))
            body = pair_html(row, pairs.presentation(presented), annotator, swapped=presented.swapped)
        progress = progress_html(pairs.store, annotator, is_taken=is_taken, is_known=voter.is_known)
        return [gr.update(visible=False), gr.update(visible=True), body, progress]

    def begin(self, annotator: str, request: gr.Request) -> list[Any]:
        """Start with a name. If that fails, the page stays, with the reason in a notice."""
        try:
            return self.updates(Voter.of(request, annotator))
        except (ValueError, OSError) as error:
            gr.Warning(message_of(error, self.first.store), duration=None)
            return [gr.skip()] * 4

    def load(self, annotator: str, request: gr.Request) -> list[Any]:
        """Open the page with the name that the browser remembers. An error is shown in place of the pair."""
        try:
            return self.updates(Voter.of(request, annotator))
        except (ValueError, OSError) as error:
            alert = (
                f'<div class="alert" role="alert">{message_of(error, self.first.store)}. Then reload this page.</div>'
            )
            return [gr.update(visible=False), gr.update(visible=True), alert, ""]

    def leave(self, request: gr.Request) -> list[Any]:
        """Forget the name, unless a secret link gave it."""
        return self.begin("", request)

    def choose(self, choice: str, annotator: str, presentation: str, request: gr.Request) -> list[Any]:
        """Save a vote or undo the last one, and show the next pair. If that fails, the pair stays on the page."""
        voter = Voter.of(request, annotator)
        try:
            pairs = self.pairs
            shown = pairs.presentation_id(presentation)
            if voter.name and choice == "undo":
                undone = pairs.store.undo(voter.name, voter.session)
                note = "" if undone else "There is no vote of this browser to undo."
            elif shown is None:
                note = "Other pairs are labelled now, so this vote was not counted." if presentation else ""
            else:
                counted = not voter.name or pairs.store.cast(voter.name, shown, choice)
                note = "" if counted else "This pair already had your vote, so the second one was not counted."
            if note:
                gr.Info(note, duration=5)
        except (ValueError, OSError) as error:
            gr.Warning(message_of(error, self.first.store), duration=None)
            return [gr.skip()] * 4
        return self.begin(annotator, request)


def build(pairs: PairSet, command: str, training: VoteTraining | None = None) -> DemoPage:
    """Build the page.

    Args:
        pairs: pairs to label, and their votes.
        command: command line that trains an adapter on the votes, shown for copying.
        training: training on the votes, which the host of the page may start.
    """
    page = Labelling(pairs, training)

    def choose(choice: str) -> Any:
        def answer(annotator: str, presentation: str, request: gr.Request) -> list[Any]:
            return page.choose(choice, annotator, presentation, request)

        return answer

    with gr.Blocks(title="Label pairs", analytics_enabled=False) as blocks:
        gr.HTML(head_html(of_responses="chosen" in pairs.rows.column_names))
        with gr.Column(visible=False) as name_form:
            name = gr.Textbox(
                label="Your name",
                info="Your votes are saved under this name. Use the same name to continue later.",
                max_length=MAX_NAME_LENGTH,
                autofocus=True,
                elem_id="name",
            )
            start = gr.Button("Start", variant="primary", elem_id="begin")
        with gr.Column(visible=False) as label_form:
            progress = gr.HTML()
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
            refresh = gr.Button("Refresh", elem_id="refresh")
            gr.HTML('<div class="hint">The buttons show their keys. Click an image or press Z to enlarge.</div>')
            with gr.Row(elem_classes="more"):
                add_ratings(page, name)
                leave = add_command(command)
                controls = add_training(training) if training is not None else None
        presentation = gr.Textbox(visible=False)
        outputs = [name_form, label_form, pair, progress]
        for event in (start.click, name.submit):
            event(page.begin, name, outputs, js=SAVE_NAME, **QUIET)
        for choice, button in buttons.items():
            vote = button.click(choose(choice), [name, presentation], outputs, js=READ_PAGE, **QUIET)
            vote.success(None, None, None, js=ANNOUNCE)
        refresh.click(page.begin, name, outputs, js=READ_NAME, **QUIET)
        leave.click(page.leave, None, outputs, js=FORGET_NAME, **QUIET)
        blocks.load(page.load, name, outputs, js=LOAD_NAME, **QUIET)
        if training is not None and controls is not None:
            connect_training(blocks, page, training, controls, [name, *outputs])
        blocks.queue(default_concurrency_limit=8)
    return DemoPage(blocks, css=CSS, head=HEAD)


def add_ratings(page: Labelling, name: Any) -> None:
    """Add a closed section with the models' ratings. They are computed when it is opened.

    An annotator sees the ratings of the time when the first look was allowed, so they are computed once per annotator.
    """

    @lru_cache(maxsize=16)
    def ratings_at(number: int, time: float) -> str:
        pairs = page.pairs
        return ratings_html(
            model_ratings(pairs.store, pairs.rows, at=time), krippendorff_alpha(pairs.store.votes(at=time))
        )

    def show(annotator: str, request: gr.Request) -> str:
        name = Voter.of(request, annotator).name
        try:
            pairs = page.pairs
            time = pairs.store.reveal_ratings(name) if name else None
            if time is not None:
                return ratings_at(pairs.number, time)
            return '<p class="quiet">The ratings are shown when you have labelled all pairs.</p>'
        except (ValueError, OSError) as error:
            message = message_of(error, page.first.store)
            return f'<p class="quiet">{message[:1].upper() + message[1:]}.</p>'

    with gr.Accordion("Ratings of the models", open=False) as section:
        gr.HTML(
            '<p class="quiet">From the votes of all people. They would bias your votes, so they are shown at the end. '
            "Then your votes can no longer be undone.</p>"
        )
        ratings = gr.HTML(elem_id="ratings")
        section.expand(show, name, ratings, js=READ_NAME, concurrency_limit=1, **QUIET)


def add_command(command: str) -> gr.Button:
    """Add a closed section with the command line that trains on the votes. Return its button that forgets the name."""
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
        return gr.Button("Label under another name", size="sm", elem_id="leave")


@dataclass(frozen=True)
class TrainingControls:
    """Components of the section that trains on the votes. Only the host of the page has it."""

    section: Any
    status: Any
    start: Any
    stop: Any
    offer: Any
    timer: Any

    def outputs(self) -> list[Any]:
        """Return the components in the order of `training_updates`."""
        return [self.section, self.status, self.start, self.stop, self.offer, self.timer]


def add_training(training: VoteTraining) -> TrainingControls:
    """Add a closed section that starts, stops and shows the training. It is hidden until the host opens the page."""
    with gr.Accordion("Train on the votes", open=False, visible=False) as section:
        status = gr.HTML(elem_id="training")
        with gr.Row():
            start = gr.Button("Train", variant="primary", elem_id="train", size="sm")
            stop = gr.Button("Stop", elem_id="stop-training", size="sm")
            offer = gr.Button("Label base and tuned", elem_id="offer", size="sm")
    return TrainingControls(section, status, start, stop, offer, gr.Timer(TRAINING_SECONDS, active=False))


def training_updates(training: VoteTraining, request: gr.Request) -> list[Any]:
    """Return updates of the section. People other than the host do not get it."""
    if not is_host(request.headers):
        return [gr.update(visible=False), "", gr.skip(), gr.skip(), gr.skip(), gr.Timer(active=False)]
    status = training.status()
    is_working, can_resume = status.state in ("running", "stopping"), status.state in ("stopped", "interrupted")
    label = "Resume" if can_resume else "Train again" if status.state in ("failed", "ready") else "Train"
    offer = "Label the first pairs again" if training.offered() else "Label base and tuned"
    return [
        gr.update(visible=True),
        training_html(status),
        gr.update(value=label, interactive=not is_working),
        gr.update(interactive=status.state == "running"),
        gr.update(value=offer, interactive=status.state == "ready"),
        gr.Timer(active=True),
    ]


def connect_training(
    blocks: gr.Blocks, page: Labelling, training: VoteTraining, controls: TrainingControls, form: list[Any]
) -> None:
    """Connect the section's events. Each of them checks again that the host sends it."""

    def show(request: gr.Request) -> list[Any]:
        return training_updates(training, request)

    def attempt(action: Callable[[], object], request: gr.Request) -> list[Any]:
        try:
            if not is_host(request.headers):
                raise ValueError("Only the host of this page can train")
            action()
        except (ValueError, OSError) as error:
            gr.Warning(message_of(error, page.first.store), duration=None)
        return training_updates(training, request)

    def start(request: gr.Request) -> list[Any]:
        return attempt(lambda: training.start(page.first.store), request)

    def stop(request: gr.Request) -> list[Any]:
        return attempt(training.stop, request)

    def offer(request: gr.Request) -> list[Any]:
        return attempt(lambda: training.offer(is_offered=not training.offered()), request)

    outputs, (name, *pair_outputs) = controls.outputs(), form
    blocks.load(show, None, outputs, **QUIET)
    controls.timer.tick(show, None, outputs, **QUIET)
    controls.start.click(start, None, outputs, **QUIET)
    controls.stop.click(stop, None, outputs, **QUIET)
    offered = controls.offer.click(offer, None, outputs, **QUIET)
    offered.then(page.begin, name, pair_outputs, js=READ_NAME, **QUIET)


def run(
    pairs: str = "shapes-faithfulness",
    votes: str = "labels.sqlite",
    *,
    plan: TrainingPlan | None = None,
    train_dir: str | None = None,
    serving: Serving = LOCAL,
) -> None:
    """Serve the page.

    Args:
        pairs: pairs to label, as `open_pairs` takes them.
        votes: SQLite file of the votes.
        plan: what a training on the votes does. None: the page trains nothing.
        train_dir: folder of the trainings. None: next to the votes.

    Raises:
        ValueError: as in `PairSet.open` and `VoteTraining`.
    """
    folder = train_dir or Path(votes).with_name(f"{Path(votes).stem}-training")
    training = VoteTraining(folder, plan) if plan is not None else None
    first = PairSet.open(pairs, votes)
    command = train_command(votes, preset_for(first.rows))
    if training is not None:
        training.resume_interrupted()
    try:
        serve(lambda: build(first, command, training), serving)
    finally:
        if training is not None:
            training.pause()


if __name__ == "__main__":
    run()
