"""Commands in processes of their own that import nothing again: they are forked from one that has imported everything.

That process is multiprocessing's fork server. It only imports, so that a command meets the state of a new interpreter:
no test has patched, seeded or opened anything in it. `python -m dpo_mm` itself is proven by one test or more per command.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import, for all that is forked
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.warm"])


def command() -> None:
    """What `dpo-mm` runs."""
    from dpo_mm.cli.main import main

    main()


def script() -> None:
    """What `python FILE ...` runs; the file is the first argument."""
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


def _begin(
    call: Callable[[], None], argv: list[str], folder: str, environment: dict[str, str], said: tuple[str, str]
) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, place in enumerate(said, start=1):
        opened = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv, sys.path[0] = argv, folder
    call()


class Forked:
    """A running process: `call()` with these arguments after its name, as subprocess.Popen would have it."""

    def __init__(
        self,
        *arguments: str,
        call: Callable[[], None] = command,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._kept = tempfile.TemporaryDirectory(prefix="dpo-mm-forked-")
        self.said = Path(self._kept.name) / "stdout", Path(self._kept.name) / "stderr"
        for place in self.said:
            place.touch()
        argv = list(arguments) if call is script else ["dpo-mm", *arguments]
        given = (call, argv, str(cwd or Path.cwd()), dict(os.environ if env is None else env))
        self._process = CONTEXT.Process(target=_begin, args=(*given, tuple(map(str, self.said))))
        self._process.start()
        self.pid = int(self._process.pid or 0)

    @property
    def stdout(self) -> str:
        return self.said[0].read_text()

    @property
    def stderr(self) -> str:
        return self.said[1].read_text()

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def wait(self, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Its exit status, negative for a signal, and what it said. Raises TimeoutExpired, and kills it, if it hangs."""
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            self.kill()
            raise subprocess.TimeoutExpired(str(self.pid), timeout, self.stdout, self.stderr)
        return subprocess.CompletedProcess([], status, self.stdout, self.stderr)


def run(*arguments: str, check: bool = False, **given: Any) -> subprocess.CompletedProcess[str]:
    """Run to the end. check: a status that is not 0 is an error."""
    done = Forked(*arguments, **given).wait()
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def started_together(
    *arguments: str, count: int = 2, env: Mapping[str, str] | None = None, **given: Any
) -> list[Forked]:
    """Processes of one run, with the environment that torch.distributed.run gives to its workers."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**(os.environ if env is None else env), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    ranks: Sequence[int] = range(count)
    return [Forked(*arguments, env={**shared, "RANK": str(n), "LOCAL_RANK": str(n)}, **given) for n in ranks]


def run_together(*arguments: str, **given: Any) -> list[subprocess.CompletedProcess[str]]:
    """Run processes of one run to their end, well; if one fails, the others, which would wait for it, are killed."""
    processes = started_together(*arguments, **given)
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            for process in processes:
                process.kill()
        time.sleep(0.02)
    ended = [process.wait() for process in processes]
    assert all(done.returncode == 0 for done in ended), "\n".join(done.stderr[-3000:] for done in ended)
    return ended
