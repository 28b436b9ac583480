"""A process that has imported everything, and forks commands. All workers of pytest-xdist share one (see forked.py).

    python -m tests.fork_server SOCKET OWNER

It only imports, so a command starts from the state of a new interpreter: no test has patched, seeded or opened anything in it.
A client sends a pickled `Request` to the socket. It receives the process ID, and the exit status when the process has ended.
The server ends when the process with the ID `OWNER` has ended.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing.util
import os
import pickle
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock


@dataclass(frozen=True)
class Request:
    """A function to run, its `sys.argv`, working directory and environment, and the files of stdout and stderr."""

    call: Callable[[], None]
    argv: list[str]
    folder: str
    environment: dict[str, str]
    outputs: tuple[str, str]


def connect() -> socket.socket:
    """Return a connection to the server of this test run. Start the server if it does not run yet.

    Without pytest-xdist, the environment names the run, so that forked processes and their children find its server too.

    Raises:
        RuntimeError: if it does not start.
    """
    run, owner = os.environ.get("PYTEST_XDIST_TESTRUNUID"), os.getppid()
    if run is None:
        run, owner = os.environ.setdefault("DPO_MM_TEST_RUN", str(os.getpid())), os.getpid()
    folder = Path(tempfile.gettempdir()) / f"dpo-mm-tests-{run}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "socket").exists():
            _start(folder, owner)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(folder / "socket"))
    return connection


def _start(folder: Path, owner: int) -> None:
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-m", "tests.fork_server", str(folder / "socket"), str(owner)]
        process = subprocess.Popen(
            command,
            cwd=Path(__file__).parents[1],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    while not (folder / "socket").exists():
        if process.poll() is not None:
            raise RuntimeError("the fork server did not start:\n" + (folder / "log").read_text())
        time.sleep(0.02)


def send(connection: socket.socket, number: int) -> None:
    """Send an integer."""
    connection.sendall(number.to_bytes(8, "little", signed=True))


def receive(connection: socket.socket) -> int:
    """Receive an integer.

    Raises:
        EOFError: if the server has ended.
    """
    data = connection.recv(8, socket.MSG_WAITALL)
    if len(data) < 8:
        raise EOFError("the fork server has ended")
    return int.from_bytes(data, "little", signed=True)


def serve(address: str, owner: int) -> None:
    """Fork a process for each request until the owner has ended."""
    ended, wake = socket.socketpair()
    for end in (ended, wake):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())  # a byte arrives when a process has ended
    running: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address + ".new")
        listener.listen(64)
        os.rename(address + ".new", address)
        while _is_running(owner):
            ready = select.select([listener, ended], [], [], 1)[0]
            if ended in ready:
                ended.recv(4096)
                _report_ended(running)
            if listener in ready:
                connection, _ = listener.accept()
                process = os.fork()
                if process == 0:
                    with _end_of_process():
                        signal.set_wakeup_fd(-1)
                        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                        for other in (listener, ended, wake, *running.values()):
                            other.close()
                        run(_read_request(connection))
                running[process] = connection
                with contextlib.suppress(OSError):  # the client may have ended
                    send(connection, process)
    shutil.rmtree(Path(address).parent, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _report_ended(running: dict[int, socket.socket]) -> None:
    """Send the exit status of each process that has ended."""
    for process in list(running):
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            with running.pop(process) as connection, contextlib.suppress(OSError):
                send(connection, os.waitstatus_to_exitcode(status))


def _read_request(connection: socket.socket) -> Request:
    """Read the request in the forked process, because it imports the module of its function."""
    with connection, connection.makefile("rb") as file:
        request: Request = pickle.load(file)
    return request


def run(request: Request) -> None:
    """Run a request in this process."""
    os.setsid()
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    for number, path in enumerate(request.outputs, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv, sys.path[0] = request.argv, request.folder
    request.call()


@contextlib.contextmanager
def _end_of_process() -> Iterator[None]:
    """Context manager that ends a forked process with the exit status that an interpreter would have."""
    status = 1
    try:
        yield
        status = 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        else:
            status = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        multiprocessing.util._exit_function()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


if __name__ == "__main__":
    importlib.import_module("tests.warm")
    serve(sys.argv[1], int(sys.argv[2]))
