"""Run commands in separate processes that are forked from one that has already imported everything (see fork_server.py).

Each command also has at least one test of `python -m dpo_mm` itself.

    python -m tests.forked ARGUMENTS

stands for `python -m dpo_mm ARGUMENTS` where another program starts the processes.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests import fork_server

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the fork server reads it when it imports


def command() -> None:
    """Run the command line, as `dpo-mm` does."""
    from dpo_mm.cli.main import main

    main()


def script() -> None:
    """Run a script, as `python FILE ...` does. The file is the first argument."""
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


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
        request = fork_server.Request(
            call,
            argv=list(arguments) if call is script else ["dpo-mm", *arguments],
            folder=str(cwd or Path.cwd()),
            environment=dict(os.environ if env is None else env),
            outputs=(str(self._outputs[0]), str(self._outputs[1])),
        )
        self._connection = fork_server.connect()
        self._connection.sendall(pickle.dumps(request))
        self._status: int | None = None
        self.pid = fork_server.receive(self._connection)

    @property
    def stdout(self) -> str:
        return self._outputs[0].read_text()

    @property
    def stderr(self) -> str:
        return self._outputs[1].read_text()

    def poll(self, timeout: float = 0) -> int | None:
        """Return the exit status, or None if the process is still running after `timeout` seconds."""
        if self._status is None and select.select([self._connection], [], [], timeout)[0]:
            self._status = fork_server.receive(self._connection)
            self._connection.close()
        return self._status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        self.poll(60)

    def wait(self, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Wait for the process and return its exit status (negative for a signal) and its output.

        Raises:
            TimeoutExpired: if it is still running after `timeout` seconds. It is killed then.
        """
        status = self.poll(timeout)
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


def relay() -> None:
    """Run a forked command in the place of this process: signals reach it, and its output and exit status are returned."""
    process = Forked(*sys.argv[1:])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: process.send_signal(received))
    done = process.wait()
    print(done.stdout, end="")
    print(done.stderr, end="", file=sys.stderr)
    sys.exit(done.returncode)


if __name__ == "__main__":
    from tests import forked  # the server imports this module by its name

    forked.relay()
