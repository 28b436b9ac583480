"""Terminal: errors in one line, tables of names and values, and silence for other libraries.

Texts of datasets and models may contain control characters, which move the cursor or change the window's title. They are
escaped here, so every text that comes from a file is printed by `say` or `print_rows`, or passed through `printable`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dpo_mm.errors import TrainingInterrupted
from dpo_mm.printed_text import printable
from dpo_mm.resumable import exit_cleanly_on_sigterm


@contextmanager
def suppress_library_output() -> Iterator[None]:
    """Context manager that disables the progress bars and notices of other libraries."""
    import datasets
    import diffusers
    import transformers

    datasets.disable_progress_bars()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    yield


def say(text: str) -> None:
    """Print a text, with its control characters escaped."""
    print(printable(text), flush=True)


def print_rows(rows: dict[str, str]) -> None:
    """Print names and values, one per line."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key, value in rows.items():
        table.add_row(printable(key), printable(value))
    Console().print(table, highlight=False, markup=False)


@contextmanager
def run_as_command() -> Iterator[None]:
    """Context manager for a command: an error or an interruption ends the process with one line on standard error.

    The exit status is 2 after an error that the user can fix and 143 after SIGTERM. On SIGTERM, training
    saves a checkpoint first, and mining of responses completes its shard.

    It also sets two environment variables unless they are set. Without OMP_WAIT_POLICY=PASSIVE, threads of torch on a CPU
    that is shared with other work wait in busy loops, which makes a training step many times slower.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    status = 2
    try:
        with exit_cleanly_on_sigterm():
            yield
        return
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("DPO_MM_TRACEBACK"):
            raise
        line = printable(f"error: {' '.join(str(error).split())}")
    except TrainingInterrupted as interruption:
        line, status = str(interruption), 143
    print(line, file=sys.stderr)
    sys.exit(status)
