"""Two replicas of B beside one, each a Ray process of one thread: how many more steps a second.

Four edges are replayed (`replay.py`), in 2 micro-batches as `edge join` takes such steps by default, so that the hub is
what is measured. With one replica it joins the steps of all four; with two, each replica joins those of two edges, on a
core of its own. No step can then take less than

    lead + hub_2

with lead = what a real edge has to do between the hub's last answer of a step and its first request of the next one,
and hub_2 = the seconds of the hub's engine for a joined step of two edges (`hub_part.py`), with both cores at it. What
shares the cores with the replicas, the hub's own process, Ray's and the replayed edges, is what comes on top. All are
measured in the same run.
"""

from __future__ import annotations

import os
import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tools.bench.client_batch import MICROS, record
from tools.bench.processes import Hub, Worker, cores, running_hub, running_workers
from tools.bench.replay import Recording
from tools.table import Row, Skipped, at_least, reported

if TYPE_CHECKING:
    from tools.bench.groups import Bench

EDGES = 4
_WORK = f"{EDGES} replayed edges, steps of 4 x 128, one thread each"
SPEED = f"two Ray replicas / one, {_WORK}, steps/s"
SHARE = f"two Ray replicas, {_WORK}, part of what their engines could do"


@dataclass(frozen=True)
class Turn:
    """Seconds of a step of every edge: with one replica, with two; and of two engines alone, half of the edges each."""

    one: float
    two: float
    engines: float


def replicas(bench: Bench) -> list[Row | Skipped]:
    """The rows; on a machine with a single core there is nothing to compare."""
    if cores()[0] == cores()[1]:
        return [Skipped(row, "two replicas need two cores") for row in (SPEED, SHARE)]
    folder = bench.folder / "replicas"
    model = bench.models.small if bench.quick else bench.models.standard
    recording = record(folder / "real", model, MICROS)
    with ExitStack() as owned:
        crowds = {}
        for count in (1, 2):
            place = folder / f"replicas-{count}"
            hub = owned.enter_context(running_hub(place, model, "--round-steps", "100000", "--replicas", str(count)))
            _spread(hub, count)
            (crowds[count],) = owned.enter_context(running_workers(place))
            crowds[count].ask("gather", join=f"@{hub.join_file}", folder=str(place),
                              recordings={"parts": str(recording)}, count=EDGES, link_s=0.0)  # fmt: skip
        engines = [Worker(folder / f"engine-{core}.log", core) for core in cores()]
        for engine in engines:
            owned.callback(engine.stop)
            engine.ask("load_hub_part", model=str(model), recording=str(recording))
        # The first turn warms up.
        turns = [_turn(crowds, engines, 2 if bench.quick else 3) for _ in range(bench.repeats(4) + 1)][1:]
        for crowd in crowds.values():
            crowd.ask("disperse")
    return _rows(bench, Recording.read(recording).lead_s, turns)


def _turn(crowds: dict[int, Worker], engines: list[Worker], steps: int) -> Turn:
    one, two = (crowds[count].ask("joined", name="parts", count=EDGES, steps=steps) / steps for count in (1, 2))
    for engine in engines:
        engine.send("hub_part_step", count=EDGES // 2)
    return Turn(one, two, max(engine.receive() for engine in engines))


def _rows(bench: Bench, lead_s: float, turns: list[Turn]) -> list[Row | Skipped]:
    one, two, engines = (statistics.median(getattr(turn, name) for turn in turns) for name in ("one", "two", "engines"))
    bench.say(
        f"a step of {EDGES} edges: {one:.3f} s with one replica, {two:.3f} s with two; an engine on each core alone, "
        f"for {EDGES // 2} edges, {engines:.3f} s; an edge's own part between two steps {lead_s:.3f} s"
    )
    speed = statistics.median(turn.one / turn.two for turn in turns)
    share = statistics.median((lead_s + turn.engines) / turn.two for turn in turns)
    return [at_least(SPEED, speed, 1.6), reported(SHARE, share)]


def _spread(hub: Hub, count: int) -> None:
    """Pin each replica to a core; the hub's process and Ray's to what one replica leaves, or to both cores."""
    first, second = cores()
    children = psutil.Process(hub.process.pid).children(recursive=True)
    engines = [child for child in children if "Replica" in " ".join(child.cmdline()[:1])]
    if len(engines) != count:
        raise RuntimeError(
            f"{len(engines)} of {count} replicas are there: {[child.cmdline()[:1] for child in children]}"
        )
    rest = {second} if count == 1 else {first, second}
    for process in (psutil.Process(hub.process.pid), *children):
        _pin(process.pid, rest)
    for process, core in zip(engines, (first, second), strict=False):
        _pin(process.pid, {core})


def _pin(pid: int, where: set[int]) -> None:
    """All threads of a process, those that it begins later too."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), where)
