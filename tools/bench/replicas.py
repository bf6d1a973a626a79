"""Two replicas of B beside one, each a Ray process of one thread: how many more steps a second.

Four edges are replayed (`replay.py`), so that the hub is what is measured. With one replica it joins the steps of all
four; with two, each replica joins those of two edges, on a core of its own. What shares the cores with them, the hub's
own process, Ray's and the replayed edges, is all that keeps the figure below

    (edge + hub_4) / (edge + hub_2)

with edge = a real edge's own seconds of a step and hub_n = the seconds of the hub's engine for a joined step of n
edges (`hub_part.py`), all measured in the same run.
"""

from __future__ import annotations

import os
import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tools.bench.client_batch import record
from tools.bench.processes import Hub, Worker, cores, running_hub, running_workers
from tools.table import Row, Skipped, at_least, reported

if TYPE_CHECKING:
    from tools.bench.groups import Bench

EDGES = 4
_WORK = f"two Ray replicas / one, {EDGES} replayed edges, steps of 4 x 128, one thread each"
SPEED, SHARE = f"{_WORK}, steps/s", f"{_WORK}, part of the bound"


@dataclass(frozen=True)
class Turn:
    """Seconds of a step of every edge: with one replica, with two; and of the engine alone for 2 and for 4 edges."""

    one: float
    two: float
    engine: dict[int, float]


def replicas(bench: Bench) -> list[Row | Skipped]:
    """The rows; on a machine with a single core there is nothing to compare."""
    if cores()[0] == cores()[1]:
        return [Skipped(row, "two replicas need two cores") for row in (SPEED, SHARE)]
    folder = bench.folder / "replicas"
    model = bench.models.small if bench.quick else bench.models.standard
    recording = folder / "recording"
    edge_s = record(folder / "real", model, recording)
    with ExitStack() as owned:
        crowds = {}
        for count in (1, 2):
            place = folder / f"replicas-{count}"
            hub = owned.enter_context(running_hub(place, model, "--round-steps", "100000", "--replicas", str(count)))
            _spread(hub, count)
            (crowds[count],) = owned.enter_context(running_workers(place))
            crowds[count].ask("gather", join=f"@{hub.join_file}", folder=str(place), recording=str(recording),
                              count=EDGES, link_s=0.0)  # fmt: skip
        engine = Worker(folder / "engine.log", cores()[0])
        owned.callback(engine.stop)
        engine.ask("load_hub_part", model=str(model), recording=str(recording))
        # The first turn warms up.
        turns = [_turn(crowds, engine, 2 if bench.quick else 3) for _ in range(bench.repeats(4) + 1)][1:]
        for crowd in crowds.values():
            crowd.ask("disperse")
    return _rows(bench, edge_s, turns)


def _turn(crowds: dict[int, Worker], engine: Worker, steps: int) -> Turn:
    one, two = (crowds[count].ask("joined", count=EDGES, steps=steps) / steps for count in (1, 2))
    return Turn(one, two, {count: engine.ask("hub_part_step", count=count) for count in (EDGES // 2, EDGES)})


def _rows(bench: Bench, edge_s: float, turns: list[Turn]) -> list[Row | Skipped]:
    figures = [turn.one / turn.two for turn in turns]
    bounds = [(edge_s + turn.engine[EDGES]) / (edge_s + turn.engine[EDGES // 2]) for turn in turns]
    one, two = (statistics.median(getattr(turn, name) for turn in turns) for name in ("one", "two"))
    bench.say(
        f"a step of {EDGES} edges: {one:.3f} s with one replica, {two:.3f} s with two; an edge's own part "
        f"{edge_s:.3f} s; bound {statistics.median(bounds):.2f}"
    )
    share = statistics.median(figure / bound for figure, bound in zip(figures, bounds, strict=True))
    return [at_least(SPEED, statistics.median(figures), 1.6), reported(SHARE, share)]


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
