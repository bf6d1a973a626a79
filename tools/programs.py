"""The product's commands as real processes, each in a folder of its own and ended by its own id.

Importing torch and transformers takes seconds, and these tests start some eighty processes. So most are
forked from a process that has imported them already; `installed=True` runs the script that the user would.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from types import TracebackType
from typing import Any

BIN = Path(sys.executable).parent
#: A command that takes longer hangs.
COMMAND_S = 180.0
#: Longer than any stop, start or reconnection takes on a slow machine with other work.
PATIENCE_S = 180.0

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tools.imported"])


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The last line of stdout, read."""
        return json.loads(self.out.splitlines()[-1])


class Process:
    """A command that was started. Its output goes to files, which are read while it runs."""

    def __init__(
        self, argv: tuple[str, ...], log: Path, installed: bool, env: Mapping[str, str], prepare: Callable[[], None]
    ) -> None:
        self.argv = argv
        self._out, self._err = log.with_suffix(".out"), log.with_suffix(".err")
        if installed:
            with self._out.open("wb") as out, self._err.open("wb") as err:
                command = [str(BIN / argv[0]), *argv[1:]]
                popen = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, **env})
            self.pid, self._code = popen.pid, popen.poll
            self._join: Callable[[], object] = popen.wait
        else:
            fork = _forks.Process(target=_run_forked, args=(argv, str(self._out), str(self._err), dict(env), prepare))
            fork.start()
            assert fork.pid is not None
            self.pid, self._code, self._join = fork.pid, lambda: fork.exitcode, fork.join

    @property
    def out(self) -> str:
        """Its stdout so far."""
        return self._out.read_text() if self._out.exists() else ""

    @property
    def err(self) -> str:
        """Its stderr so far."""
        return self._err.read_text() if self._err.exists() else ""

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._code() is None

    def until(self, condition: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait for something that this process brings about."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            # It may bring it about and end in between.
            assert self.running or condition(), f"{self} ended with {self._code()} before {what}"
            assert time.monotonic() < deadline, f"{self} did not bring about {what} in {timeout_s:g} s"
            time.sleep(0.05)

    def until_says(self, text: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait for a piece of its output."""
        self.until(lambda: text in self.out + self.err, repr(text), timeout_s)

    def signal(self, number: Signals) -> None:
        """Send it a signal, if it still runs."""
        if self.running:
            os.kill(self.pid, number)

    def end(self, number: Signals, within_s: float = COMMAND_S) -> Done:
        """Send it a signal and wait for what it does about it."""
        self.signal(number)
        return self.wait(within_s)

    def wait(self, timeout_s: float = COMMAND_S) -> Done:
        """Wait for its end."""
        deadline = time.monotonic() + timeout_s
        while self.running:
            assert time.monotonic() < deadline, f"{self} still runs after {timeout_s:g} s"
            time.sleep(0.02)
        code = self._code()
        assert code is not None
        return Done(code, self.out, self.err)

    def kill(self) -> None:
        """The end, whatever it does."""
        self.signal(signal.SIGKILL)
        self._join()

    def __str__(self) -> str:
        return f"`{' '.join(self.argv)[:200]}` (stdout: {self.out[-3000:]!r}, stderr: {self.err[-3000:]!r})"


class Programs:
    """Starts commands, with their states and logs in one folder; leaving it ends every one that still runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[Process] = []

    def __enter__(self) -> Programs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._started:
            process.kill()

    def start(
        self,
        *argv: object,
        installed: bool = False,
        env: Mapping[str, str] | None = None,
        prepare: Callable[[], None] = lambda: None,
    ) -> Process:
        """Begin a command; `prepare`, a module's function, runs in the new process before it (only if forked)."""
        log = self.folder / f"{len(self._started):03}-{argv[0]}"
        before = _nothing if prepare.__name__ == "<lambda>" else prepare
        process = Process(tuple(map(str, argv)), log, installed, env or {}, before)
        self._started.append(process)
        return process

    def run(self, *argv: object, code: int = 0, installed: bool = False, within_s: float = COMMAND_S) -> Done:
        """A command from beginning to end; it has to end with `code` and must not show a traceback."""
        process = self.start(*argv, installed=installed)
        done = process.wait(within_s)
        assert done.code == code, f"{process} ended with {done.code}"
        assert "Traceback" not in done.err + done.out, str(process)
        return done

    def serve(self, *options: object, state: Path | None = None, installed: bool = False, **more: Any) -> Hub:
        """A hub that accepts edges."""
        state = state or self.folder / "hub"
        join = state.with_suffix(".join")
        join.unlink(missing_ok=True)
        where = [] if "--listen" in options else ["--listen", "tcp://127.0.0.1:0"]
        begin = time.monotonic()
        process = self.start(
            "hub", "serve", "--state", state, "--join-file", join, "--headless", *where, *options,
            installed=installed, **more,
        )  # fmt: skip
        process.until_says("ready at")
        return Hub(process, state, f"@{join}", time.monotonic() - begin)

    def edge(self, hub: Hub | None, name: str, data: Path, *options: object, **more: Any) -> Process:
        """An edge that trains; `hub` None: it is enrolled already."""
        join = [] if hub is None else [hub.join]
        return self.start(
            "edge", "join", *join, "--state", self.folder / name, "--name", name, "--data", data,
            "--noise", 0, "--batch", 2, "--micro-batches", 2, "--seq", 48, "--headless", *options, **more,
        )  # fmt: skip


@dataclass(frozen=True)
class Hub:
    """A hub that runs: its process, state, and the join string as `@FILE`."""

    process: Process
    state: Path
    join: str
    start_s: float

    @property
    def listen(self) -> tuple[str, str]:
        """Options that make a hub listen at the same ports; they must have been given as such before."""
        at = self.process.argv.index("--listen")
        return ("--listen", self.process.argv[at + 1])

    def status(self) -> dict[str, Any]:
        """What `hub status --json` tells of it, read without a process."""
        from hub import admin

        return admin.status(self.state)

    def until(self, condition: Callable[[dict[str, Any]], object], what: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait until its live status fulfils a condition."""

        def fulfilled() -> object:
            status = self.status()
            # Until it has written its own, there is what the hub before it wrote.
            return status["process"] == self.process.pid and condition(status["live"])

        self.process.until(fulfilled, what, timeout_s)


def free_ports() -> tuple[str, str]:
    """`--listen` with three ports in a row that are free now, for a hub that is to come back at the same ones."""
    # Not where the kernel takes ports for those who connect.
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    most = lowest - 3 if lowest > 21000 else 32000
    while True:
        port = random.randint(20000, most)
        try:
            for offset in range(3):
                socket.create_server(("127.0.0.1", port + offset)).close()
        except OSError:
            continue
        return ("--listen", f"tcp://127.0.0.1:{port}")


def _nothing() -> None:
    pass


def _run_forked(argv: tuple[str, ...], out: str, err: str, env: Mapping[str, str], prepare: Callable[[], None]) -> None:
    """In the forked process: what the installed script does."""
    for path, number in ((out, 1), (err, 2)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.update(env)
    import edge.cli
    import hub.cli

    prepare()
    sys.argv = list(argv)
    {"edge": edge.cli.main, "hub": hub.cli.main}[argv[0]]()
