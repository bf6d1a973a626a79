"""Row 21: files are whole whenever the process that writes them dies, and what was said to be safe is there."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tools.faults.fault import Fault, Setting
from tools.table import Row, at_most, reported

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tools.imported"])

#: Elements of each tensor that is saved again and again: large enough that most kills find a file half-written.
_ELEMENTS = 400_000
_SAVES = ("hub publishes", "hub checkpoints", "edge snapshots")


# -- row 21: in the process that is to die ---------------------------------------------------------------


def _tensor(number: int) -> Any:
    import torch

    return torch.full((_ELEMENTS,), float(number))


def _publish(folder: Path, number: int) -> Iterator[int]:
    from hub.store.state import HubState
    from messaging.messages import Recipe

    recipe = Recipe(1e-3, 4, 8.0, ("q_proj",), 4, 4, 1, 1.0, 0, 0.0, 0)
    with closing(HubState.open(folder, exclusive=True)) as state:
        while True:
            state.adapters.publish(number, number, {"lora": _tensor(number)}, recipe)
            yield number
            number += 1


def _checkpoint(folder: Path, number: int) -> Iterator[int]:
    from hub.store.checkpoints import Checkpoint
    from hub.store.state import HubState

    with closing(HubState.open(folder, exclusive=True)) as state:
        while True:
            tensors = {"lora": _tensor(number)}
            state.checkpoints.save(Checkpoint(number, 0, number, 0, {"ann": number}, tensors, tensors))
            yield number
            number += 1


def _snapshot(folder: Path, number: int) -> Iterator[int]:
    from edge.snapshots import Snapshot, Standing
    from edge.state import EdgeState

    state = EdgeState(folder)
    with state.training(), closing(state.snapshots()) as snapshots:
        while True:
            standing = Standing(number, 0, 0, number, 7, False, (), -1, "model", "1:1")
            snapshots.put(Snapshot(standing, {"lora": _tensor(number)}, {"lora": _tensor(number)}), 0)
            snapshots.wait()
            yield number
            number += 1


_WRITERS: dict[str, Callable[[Path, int], Iterator[int]]] = dict(
    zip(_SAVES, (_publish, _checkpoint, _snapshot), strict=True)
)


def _save_for_ever(what: str, folder: Path, number: int, said: Path) -> None:
    """Save one after the other from `number` on, and write down each that is said to be safe."""
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for saved in _WRITERS[what](folder, number):
        os.write(descriptor, f"{saved}\n".encode())


# -- row 21: from outside --------------------------------------------------------------------------------


def _read_hub(folder: Path, what: str) -> int:
    """The newest number that can be read; every listed file has to be what was written."""
    from hub.store.series import fault
    from hub.store.state import HubState

    with closing(HubState.open(folder, exclusive=True)) as state:
        store = state.adapters if what == "hub publishes" else state.checkpoints
        for entry in store._series.entries():  # the list itself is what is looked at here
            reason = fault(entry.path, entry.sha256, entry.bytes)
            if reason is not None:
                raise RuntimeError(f"{entry.path} {reason}")
        if what == "hub publishes":
            latest = state.adapters.latest()
            return _uniform(latest.tensors(), latest.version) if latest is not None else 0
        point, warnings = state.checkpoints.load_latest()
        if warnings:
            raise RuntimeError("; ".join(warnings))
        return 0 if point is None else _uniform({**point.adapter, **point.optimizer}, point.hub_step)


def _read_edge(folder: Path) -> int:
    from edge.state import EdgeState

    state = EdgeState(folder)
    with state.training(), closing(state.snapshots()) as snapshots:
        newest = snapshots.newest()
        if newest is None:
            return 0
        snapshot = snapshots.at(newest.steps, newest.round)
        assert snapshot is not None
        return _uniform({**snapshot.adapter, **snapshot.optimizer}, newest.steps)


def _uniform(tensors: dict[str, Any], number: int) -> int:
    if not tensors or not all(bool((value == number).all()) for value in tensors.values()):
        raise RuntimeError(f"what was saved as number {number} holds something else")
    return number


def _strays(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".tmp")]


def _killed_saves(setting: Setting) -> Sequence[Row]:
    rng = random.Random(21)
    torn, lost, half_written, left, saves = 0, 0, 0, 0, 0
    kills = setting.count(200, 10)
    newest = dict.fromkeys(_SAVES, 0)
    for kill in range(kills):
        what = _SAVES[kill % len(_SAVES)]
        folder, said = setting.folder / what.replace(" ", "-"), setting.folder / f"{kill:03}.said"
        _kill_one(what, folder, newest[what] + 1, said, rng.uniform(0.0, 0.05))
        promised = [int(line) for line in said.read_text().split()]
        half_written += bool(_strays(folder))
        try:
            found = _read_edge(folder) if what == "edge snapshots" else _read_hub(folder, what)
        except Exception as error:
            setting.console.print(f"[red]{what}, kill {kill}: {error!r}[/]")
            torn += 1
            found = promised[-1]
        lost += found < promised[-1]
        left += len(_strays(folder))
        saves += len(promised)
        newest[what] = max(found, promised[-1])
    return (
        at_most("21 adapter saves torn by kill -9", torn, 0),
        at_most("21 saves lost that were said to be safe", lost, 0),
        at_most("21 temporary files left after the next start", left, 0),
        reported("21 kills", kills),
        reported("21 kills that left a file half-written", half_written),
        reported("21 saves that ended", saves),
    )


def _kill_one(what: str, folder: Path, number: int, said: Path, after_s: float) -> None:
    """Have a process save, and kill it so long after its first save ended."""
    process = _forks.Process(target=_save_for_ever, args=(what, folder, number, said))
    process.start()
    assert process.pid is not None
    deadline = time.monotonic() + 60.0
    try:
        while not (said.exists() and said.stat().st_size):
            if process.exitcode is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{what}: no save ended")
            time.sleep(0.002)
        time.sleep(after_s)
    finally:
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()


FAULTS = (
    Fault(
        "21",
        "kill -9 while adapters, checkpoints and snapshots are saved",
        ("21 adapter saves torn by kill -9", "21 saves lost that were said to be safe"),
        _killed_saves,
    ),
)
