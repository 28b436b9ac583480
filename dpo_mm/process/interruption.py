"""SIGTERM and Ctrl-C: work stops at a safe point, and a message names what is saved and the command that resumes.

A signal raises TrainingInterrupted, which ends the process with 143 (SIGTERM) or 130 (Ctrl-C). In `complete_part` it only
sets a request, so that a training step or a shard is completed first. A second signal ends the process at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from dpo_mm.errors import TrainingInterrupted
from dpo_mm.printing.printed_text import printable
from dpo_mm.process.process_rank import process_rank

SIGNALS = (signal.SIGTERM, signal.SIGINT)
REPEAT_S = 10.0
"""Seconds in which a launcher of several processes may pass on a signal that the processes have received themselves."""


class StopRequest:
    """Signal that has arrived, and whether it raises an exception or waits for the end of a part.

    Attributes:
        number: of the signal, or 0.
        parts: blocks of `complete_part` that are open.
    """

    def __init__(self) -> None:
        self.number, self.parts = 0, 0
        self.handlers: dict[int, Any] = {}
        self._time = 0.0

    @property
    def requested(self) -> bool:
        """True if the process is to stop."""
        return self.number != 0

    def install(self) -> bool:
        """Handle the signals, unless they are ignored (nohup). Return False if they are handled already."""
        if self.handlers or threading.current_thread() is not threading.main_thread():
            return False
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.handlers[number] = signal.signal(number, self._receive)
        return bool(self.handlers)

    def restore(self) -> None:
        """Restore the handlers from before `install`."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self.number, self.handlers = 0, {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Request a stop. The next signal has its default effect, unless a launcher may send it twice."""
        launched = process_rank().count > 1
        if self.number:
            if not launched or time.monotonic() - self._time > REPEAT_S:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.number, self._time = number, time.monotonic()
        if not launched:
            for each in self.handlers:
                signal.signal(each, signal.SIG_DFL)
        self.raise_if_requested()

    def raise_if_requested(self) -> None:
        """Raise TrainingInterrupted if a signal has arrived and no part is open."""
        if self.number and not self.parts:
            raise TrainingInterrupted(self.number)


_process = StopRequest()
"""The request of this process. Signals belong to the process, and so does this."""


@contextlib.contextmanager
def stop_on_signal(
    saved: Callable[[], str] | None = None, *, command: Callable[[], str] | None = None
) -> Iterator[None]:
    """Context manager in which SIGTERM and Ctrl-C raise TrainingInterrupted. The outermost one prints its message.

    It has no effect outside the main thread.

    Args:
        saved: describes what the block has saved so far, as a sentence without its full stop, or returns "".
        command: command line that resumes the work, if it is known.
    """
    outermost = _process.install()
    try:
        yield
        if threading.current_thread() is threading.main_thread():
            _process.raise_if_requested()
    except TrainingInterrupted as interruption:
        if saved is not None and not interruption.saved:
            interruption.saved = saved()
        if command is not None and not interruption.command:
            interruption.command = command()
        if outermost:
            print(printable(str(interruption)), file=sys.stderr)
        raise
    finally:
        if outermost:
            _process.restore()


@contextlib.contextmanager
def complete_part(saved: Callable[[], str] | None = None) -> Iterator[StopRequest]:
    """Context manager that completes its block before SIGTERM or Ctrl-C raises TrainingInterrupted.

    Args:
        saved: as in `stop_on_signal`.

    Returns:
        The request. A block of several parts ends early if it is `requested`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield StopRequest()
        return
    with stop_on_signal(saved):
        _process.parts += 1
        try:
            yield _process
        finally:
            _process.parts -= 1
