"""Real processes for a bench: a hub on a terminal of its own, edges, each pinned to one core with one thread."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_READY_S = 180.0
_ANSWER_S = 900.0
_STOP_S = 20.0


def cores() -> tuple[int, int]:
    """A core for the hub and one for the edges; the same one where there is no other."""
    usable = sorted(os.sched_getaffinity(0))
    return usable[0], usable[1 % len(usable)]


def _environment() -> dict[str, str]:
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**os.environ, **one, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}


def peak_bytes(pid: int | str = "self") -> int:
    """VmHWM, the peak of the resident size."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


class Terminal:
    """A pseudo-terminal that somebody looks at: what is drawn on it is read and kept in a file."""

    def __init__(self, log: Path) -> None:
        self._far, self.near = pty.openpty()
        self._log = log
        self._thread = threading.Thread(target=self._drain, daemon=True)
        self._thread.start()

    def _drain(self) -> None:
        with self._log.open("wb") as file, suppress(OSError):
            while data := os.read(self._far, 65536):
                file.write(data)
                file.flush()

    def close(self) -> None:
        """Hang up."""
        os.close(self.near)
        self._thread.join(1.0)
        os.close(self._far)


class Hub:
    """A `hub serve` with its live view on."""

    def __init__(self, folder: Path, model: Path, *options: str, dtype: str = "float32") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.join_file = folder / "join"
        self._log = folder / "hub.log"
        self._terminal = Terminal(self._log)
        code = "from hub.cli import main; main()"
        command = [sys.executable, "-c", code, "serve", "--model", str(model), "--listen", "tcp://127.0.0.1:0"]
        command += ["--state", str(folder / "hub"), "--join-file", str(self.join_file), "--dtype", dtype, *options]
        near, core = self._terminal.near, cores()[0]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=_environment(), stdin=subprocess.DEVNULL, stdout=near, stderr=near,
            start_new_session=True, preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )  # fmt: skip

    def wait(self) -> None:
        """Until edges are accepted."""
        deadline = time.monotonic() + _READY_S
        while not self.join_file.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the hub did not start:\n{self._log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End it in order."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._terminal.close()


@contextmanager
def running_hub(folder: Path, model: Path, *options: str, dtype: str = "float32") -> Iterator[Hub]:
    """A hub that is ready, stopped at the end."""
    hub = Hub(folder, model, *options, dtype=dtype)
    try:
        hub.wait()
        yield hub
    finally:
        hub.stop()


class Worker:
    """A process that carries out the functions of `tools.bench.tasks`, one after the other."""

    def __init__(self, log: Path, core: int | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        where = cores()[1] if core is None else core
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "tools.bench.worker"], cwd=ROOT, env=_environment(),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                preexec_fn=lambda: os.sched_setaffinity(0, {where}),
            )  # fmt: skip

    def send(self, task: str, **arguments: Any) -> None:
        """Ask; `receive` waits for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([task, arguments]) + "\n")
        self.process.stdin.flush()

    def receive(self) -> Any:
        """The answer to the task that was sent first."""
        assert self.process.stdout is not None
        timer = threading.Timer(_ANSWER_S, self.process.kill)
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise RuntimeError(f"the measuring process ended:\n{self._log.read_text(errors='replace')[-3000:]}")
        return json.loads(line)

    def ask(self, task: str, **arguments: Any) -> Any:
        """Ask and wait."""
        self.send(task, **arguments)
        return self.receive()

    def stop(self) -> None:
        """End it."""
        if self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def running_workers(folder: Path, count: int = 1) -> Iterator[list[Worker]]:
    """So many workers on the edges' core, ended at the end."""
    workers = [Worker(folder / f"worker-{number}.log") for number in range(count)]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.stop()


def once(folder: Path, task: str, **arguments: Any) -> Any:
    """One task in a fresh process."""
    with running_workers(folder) as (worker,):
        return worker.ask(task, **arguments)


def _processor() -> str:
    """The processor as Linux names it; virtual machines often hide the name, but not family and model."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    found = {key.strip(): value.strip() for key, _, value in lines}
    return f"{found.get('model name', '?')}, family {found.get('cpu family', '?')}, model {found.get('model', '?')}"


def conditions() -> dict[str, object]:
    """What the figures were measured with."""
    import peft
    import torch
    import transformers

    load = [round(value, 2) for value in os.getloadavg()]
    cpus = len(os.sched_getaffinity(0))
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "processor": _processor(),
        "cores": cpus,
        "threads": "one per process; hub on the first core, edges and the unsplit model on the second",
        "load_average_at_start": load,
    }
