"""Page to label pairs of images in a blind test, by keyboard, for several people at once: `dpo-mm demo label`.

Votes are saved to SQLite as they are cast. `dpo-mm label export` writes them as preference rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import gradio as gr

from dpo_mm.demo_access import person_of
from dpo_mm.demo_address import LOCAL, Serving
from dpo_mm.demo_guard import session_of
from dpo_mm.demo_label import (
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
)
from dpo_mm.demo_server import QUIET, DemoPage, serve
from dpo_mm.labels.agreement import krippendorff_alpha
from dpo_mm.labels.annotators import MAX_NAME_LENGTH, annotator_name
from dpo_mm.labels.export import absolute_source, model_ratings, preset_for, train_command
from dpo_mm.labels.pairs import open_pairs, pair_digest
from dpo_mm.labels.store import VoteStore

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

    def __init__(self, rows: Any, store: VoteStore) -> None:
        self.rows, self.store = rows, store
        self.row_numbers = {pair: number for number, pair in enumerate(rows["id"][:])}

    def updates(self, voter: Voter) -> list[Any]:
        """Return updates of the page: visibility of the name form and of the labelling form, the pair, the progress.

        Raises:
            ValueError, OSError: if the name, the pair or the vote store is not valid.
        """
        if not voter.name:
            return [gr.update(visible=True), gr.update(visible=False), "", ""]
        annotator = annotator_name(voter.name)
        is_taken = self.store.is_taken(annotator, voter.session)
        presented = self.store.next_pair(annotator, voter.session)
        if presented is None:
            body = finished_html(self.store, annotator)
        else:
            row = self.rows[self.row_numbers[presented.pair]]
            self.store.record_digest(row["id"], pair_digest(row))
            body = pair_html(row, presented.id, annotator, swapped=presented.swapped)
        progress = progress_html(self.store, annotator, is_taken=is_taken, is_known=voter.is_known)
        return [gr.update(visible=False), gr.update(visible=True), body, progress]

    def begin(self, annotator: str, request: gr.Request) -> list[Any]:
        """Start with a name. If that fails, the page stays, with the reason in a notice."""
        try:
            return self.updates(Voter.of(request, annotator))
        except (ValueError, OSError) as error:
            gr.Warning(message_of(error, self.store), duration=None)
            return [gr.skip()] * 4

    def load(self, annotator: str, request: gr.Request) -> list[Any]:
        """Open the page with the name that the browser remembers. An error is shown in place of the pair."""
        try:
            return self.updates(Voter.of(request, annotator))
        except (ValueError, OSError) as error:
            alert = f'<div class="alert" role="alert">{message_of(error, self.store)}. Then reload this page.</div>'
            return [gr.update(visible=False), gr.update(visible=True), alert, ""]

    def leave(self, request: gr.Request) -> list[Any]:
        """Forget the name, unless a secret link gave it."""
        return self.begin("", request)

    def choose(self, choice: str, annotator: str, presentation: str, request: gr.Request) -> list[Any]:
        """Save a vote or undo the last one, and show the next pair. If that fails, the pair stays on the page."""
        voter = Voter.of(request, annotator)
        try:
            if voter.name and choice == "undo":
                undone = self.store.undo(voter.name, voter.session)
                note = "" if undone else "There is no vote of this browser to undo."
            else:
                can_vote = voter.name and presentation.isdecimal()
                counted = not can_vote or self.store.cast(voter.name, int(presentation), choice)
                note = "" if counted else "This pair already had your vote, so the second one was not counted."
            if note:
                gr.Info(note, duration=5)
        except (ValueError, OSError) as error:
            gr.Warning(message_of(error, self.store), duration=None)
            return [gr.skip()] * 4
        return self.begin(annotator, request)


def build(rows: Any, store: VoteStore, command: str) -> DemoPage:
    """Build the page.

    Args:
        rows: pairs to label, with undecoded images.
        store: store of the votes.
        command: command line that trains an adapter on the votes, shown for copying.
    """
    page = Labelling(rows, store)

    def choose(choice: str) -> Any:
        def answer(annotator: str, presentation: str, request: gr.Request) -> list[Any]:
            return page.choose(choice, annotator, presentation, request)

        return answer

    with gr.Blocks(title="Label pairs", analytics_enabled=False) as blocks:
        gr.HTML(head_html(of_responses="chosen" in rows.column_names))
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
                add_ratings(store, rows, name)
                leave = add_command(command)
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
        blocks.queue(default_concurrency_limit=8)
    return DemoPage(blocks, css=CSS, head=HEAD)


def add_ratings(store: VoteStore, rows: Any, name: Any) -> None:
    """Add a closed section with the models' ratings. They are computed when it is opened.

    An annotator sees the ratings of the time when the first look was allowed, so they are computed once per annotator.
    """

    @lru_cache(maxsize=16)
    def ratings_at(time: float) -> str:
        return ratings_html(model_ratings(store, rows, at=time), krippendorff_alpha(store.votes(at=time)))

    def show(annotator: str, request: gr.Request) -> str:
        name = Voter.of(request, annotator).name
        try:
            time = store.reveal_ratings(name) if name else None
            if time is not None:
                return ratings_at(time)
            return '<p class="quiet">The ratings are shown when you have labelled all pairs.</p>'
        except (ValueError, OSError) as error:
            message = message_of(error, store)
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


def run(
    pairs: str = "shapes-faithfulness",
    votes: str = "labels.sqlite",
    *,
    serving: Serving = LOCAL,
) -> None:
    """Serve the page.

    Args:
        pairs: pairs to label, as `open_pairs` takes them.
        votes: SQLite file of the votes.

    Raises:
        ValueError: as in `open_pairs` and `VoteStore`.
    """
    rows = open_pairs(pairs)
    store = VoteStore(votes, rows["id"][:], source=absolute_source(pairs), stays_open=True)
    command = train_command(votes, preset_for(rows))
    serve(lambda: build(rows, store, command), serving)


if __name__ == "__main__":
    run()
