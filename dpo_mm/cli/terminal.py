"""Terminal: errors in one line, tables of names and values, and silence for other libraries.

Texts of datasets and models may contain control characters, which move the cursor or change the window's title. They are
escaped here, so every text that comes from a file is printed by `say` or `printed_text.print_rows`, or passed through `printable`.
"""

from __future__ import annotations

import gc
import io
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpo_mm.files.cache_folder import set_hub_cache
from dpo_mm.printing.printed_text import printable
from dpo_mm.process.interruption import stop_on_signal
from dpo_mm.process.process_rank import process_rank


@contextmanager
def suppress_library_output(*, training: bool = False) -> Iterator[None]:
    """Context manager that imports the large libraries and disables their progress bars and notices.

    Garbage is not collected in the meantime, and modules are excluded from later collections. Each collection would visit
    all of them and find nothing, which takes a tenth of the time to start a training.

    Args:
        training: also import what training needs.
    """
    for name in ("torch.utils._pytree", "bitsandbytes"):  # both speak when diffusers imports torchao and bitsandbytes
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT reads it
    with _no_garbage_collection():
        import datasets
        import diffusers
        import transformers

        if training:
            import dpo_mm.training.run  # noqa: F401

    datasets.disable_progress_bars()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    yield


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:  # otherwise only the garbage of earlier work would stay in memory
            gc.freeze()
        if was_enabled:
            gc.enable()


def say(text: str) -> None:
    """Print a text, with its control characters escaped."""
    print(printable(text), flush=True)


def command_line() -> str:
    """Return the command that runs, quoted for a shell."""
    script = Path(sys.argv[0])
    program = ["python", sys.argv[0]] if script.suffix == ".py" and script.name != "__main__.py" else ["dpo-mm"]
    return shlex.join([*program, *sys.argv[1:]])


def report_command() -> str:
    """Return the command that makes a report, without --overwrite, so that it is the same for the same report."""
    return command_line().replace(" --overwrite", "")


def resuming_command() -> str:
    """Return the command that runs, or "" for one of several processes, whose launcher's command is not known."""
    return "" if process_rank().count > 1 else command_line()


@contextmanager
def run_as_command() -> Iterator[None]:
    """Context manager for a command: an error or an interruption ends the process with one line on standard error.

    The exit status is 2 after an error that the user can fix, 143 after SIGTERM and 130 after Ctrl-C. Then training
    saves a checkpoint first, and mining of responses completes its shard. A second signal ends the process at once.

    It also sets environment variables that are not set: HF_HUB_DISABLE_TELEMETRY, OMP_WAIT_POLICY and, without a writable
    home, HF_HOME. Without OMP_WAIT_POLICY=PASSIVE, threads of torch on a CPU
    that is shared with other work wait in busy loops, which makes a training step many times slower.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    set_hub_cache()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # characters that the terminal's encoding does not have
    try:
        with stop_on_signal(command=resuming_command):
            yield
        return
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("DPO_MM_TRACEBACK"):
            raise
        message = _message(error)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or os.environ.get("DPO_MM_TRACEBACK"):
            raise
        message = f"{_message(error).rstrip('.')}. Set workers: 0, or free memory"
    print(printable(f"error: {message}"), file=sys.stderr)
    sys.exit(2)


def _message(error: BaseException) -> str:
    """Return the message of an error in one line. A data loader's worker process sends its traceback, which ends with it."""
    text = str(error)
    if "in DataLoader worker process" in text and "Traceback" in text:
        text = text.rstrip().rpartition("\n")[2].partition(": ")[2]
    if "No usable temporary directory" in text:
        text += ". Set TMPDIR to a folder that you can write"
    return " ".join(text.split())
