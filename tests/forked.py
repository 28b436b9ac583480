"""Run commands in separate processes that are forked from one that has already imported everything.

That process is multiprocessing's fork server. It only imports, so a command starts from the state of a new interpreter:
no test has patched, seeded or opened anything in it. Each command also has at least one test of `python -m dpo_mm` itself.
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

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import, so it is set before the fork
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.warm"])


def command() -> None:
    """Run the command line, as `dpo-mm` does."""
    from dpo_mm.cli.main import main

    main()


def script() -> None:
    """Run a script, as `python FILE ...` does. The file is the first argument."""
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


def _start(
    call: Callable[[], None], argv: list[str], folder: str, environment: dict[str, str], outputs: tuple[str, str]
) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(outputs, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv, sys.path[0] = argv, folder
    call()


class Forked:
    """A forked process that runs `call()`, with the interface of subprocess.Popen.

    Args:
        arguments: the command-line arguments, without the program's name.
        call: the function to run.
        cwd, env: working directory and environment, as in Popen.
    """

    def __init__(
        self,
        *arguments: str,
        call: Callable[[], None] = command,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dpo-mm-forked-")
        self._outputs = Path(self._folder.name) / "stdout", Path(self._folder.name) / "stderr"
        for path in self._outputs:
            path.touch()
        argv = list(arguments) if call is script else ["dpo-mm", *arguments]
        target_arguments = (call, argv, str(cwd or Path.cwd()), dict(os.environ if env is None else env))
        self._process = CONTEXT.Process(target=_start, args=(*target_arguments, tuple(map(str, self._outputs))))
        self._process.start()
        self.pid = int(self._process.pid or 0)

    @property
    def stdout(self) -> str:
        return self._outputs[0].read_text()

    @property
    def stderr(self) -> str:
        return self._outputs[1].read_text()

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def wait(self, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Wait for the process and return its exit status (negative for a signal) and its output.

        Raises:
            TimeoutExpired: if it is still running after `timeout` seconds. It is killed then.
        """
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            self.kill()
            raise subprocess.TimeoutExpired(str(self.pid), timeout, self.stdout, self.stderr)
        return subprocess.CompletedProcess([], status, self.stdout, self.stderr)


def run(*arguments: str, check: bool = False, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a forked process until it exits. If `check` is true, an exit status other than 0 is an error."""
    done = Forked(*arguments, **options).wait()
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def start_together(
    *arguments: str, count: int = 2, env: Mapping[str, str] | None = None, **options: Any
) -> list[Forked]:
    """Start the processes of one distributed run, with the environment that torch.distributed.run sets for its workers."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**(os.environ if env is None else env), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    ranks: Sequence[int] = range(count)
    return [Forked(*arguments, env={**shared, "RANK": str(n), "LOCAL_RANK": str(n)}, **options) for n in ranks]


def run_together(*arguments: str, **options: Any) -> list[subprocess.CompletedProcess[str]]:
    """Run the processes of one distributed run until they exit.

    If one fails, the others are killed, because they would wait for it. A failure is an error.
    """
    processes = start_together(*arguments, **options)
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            for process in processes:
                process.kill()
        time.sleep(0.02)
    results = [process.wait() for process in processes]
    assert all(result.returncode == 0 for result in results), "\n".join(result.stderr[-3000:] for result in results)
    return results
