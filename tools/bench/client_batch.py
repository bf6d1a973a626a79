"""Client-batch against one edge at a time: what joining the edges' steps gains, with the hub as what is measured.

One edge at a time, as in the paper's sequential mode: each edge takes its step alone while no other is there, its whole
batch at once, so that neither link nor edges' work overlap with anything. Client-batch: all take the same steps
together as `edge join` takes them by default, in 2 micro-batches; the hub joins each micro-batch of all edges into one
forward and one backward, and works on one while the edges work on others. The edges are replayed (`replay.py`), the
link is 20 ms there and back. What micro-batches gain for one edge at a time is reported beside it.

Between the hub's last answer of a step and the first request of the next one lie the link, there and back, and the
edge's `lead`: backward of A, optimizer, Blocks A of the first micro-batch. With hub_n = the seconds of the hub's engine
for a joined step of n edges (`hub_part.py`), and alone = those of an edge's step one at a time, all measured in the
same run, the bound of the figure is

    n x alone / (lead + link + hub_n)

hub_n counts for no more than n times the engine's for one edge: joining must not cost more than it saves. What the hub
adds to its engine (sockets, encryption, scheduler, threads, gaps) keeps the figure below. The paper's figures are those
of its own two modes (FedSEA-LLaMA, arXiv 2505.15683) for 2, 4 and 8 clients.
"""

from __future__ import annotations

import random
import statistics
import string
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tools.bench.processes import Worker, cores, once, running_hub, running_workers
from tools.bench.replay import Recording
from tools.table import Row, at_least, reported

if TYPE_CHECKING:
    from tools.bench.groups import Bench

LINK_S = 0.020
MICROS = 2
#: edges -> the paper's figure
PAPER = {2: 1.09, 4: 1.27, 8: 1.41}
_WORK = "link of 20 ms, steps of 4 x 128: joined / one edge at a time"
SPEED = {count: f"{count} replayed edges, {_WORK}, speed" for count in PAPER}
SHARE = {count: f"{count} replayed edges, {_WORK}, part of the bound" for count in PAPER}
IN_PARTS = f"one replayed edge at a time, link of 20 ms, steps of 4 x 128: in {MICROS} micro-batches / at once, speed"
ROWS = (*SPEED.values(), *SHARE.values(), IN_PARTS)


@dataclass(frozen=True)
class Turn:
    """Seconds of one step: of each edge alone, at once and in micro-batches; by the number of edges: joined, engine."""

    alone: list[float]
    parts: list[float]
    joined: dict[int, float]
    engine: dict[int, float]


def client_batch(bench: Bench) -> list[Row]:
    """The rows for 2, 4 and 8 edges."""
    folder = bench.folder / "client_batch"
    model = bench.models.small if bench.quick else bench.models.standard
    recordings = {name: record(folder / name, model, micros) for name, micros in (("whole", 1), ("parts", MICROS))}
    with running_hub(folder, model, "--round-steps", "100000") as hub, running_workers(folder) as (edges,):
        paths = {name: str(path) for name, path in recordings.items()}
        edges.ask("gather", join=f"@{hub.join_file}", folder=str(folder), recordings=paths, count=max(PAPER),
                  link_s=LINK_S)  # fmt: skip
        engine = Worker(folder / "engine.log", cores()[0])
        try:
            engine.ask("load_hub_part", model=str(model), recording=paths["parts"])
            # The first turn warms up.
            turns = [_turn(edges, engine) for _ in range(bench.repeats(5) + 1)][1:]
        finally:
            engine.stop()
        edges.ask("disperse")
    return _rows(bench, Recording.read(recordings["parts"]), turns)


def _turn(edges: Worker, engine: Worker) -> Turn:
    """One step in every way."""
    alone = edges.ask("in_turn", name="whole", count=max(PAPER), steps=1)
    parts = edges.ask("in_turn", name="parts", count=2, steps=1)
    joined = {count: edges.ask("joined", name="parts", count=count, steps=1) for count in PAPER}
    return Turn(alone, parts, joined, {count: engine.ask("hub_part_step", count=count) for count in (1, *PAPER)})


def record(folder: Path, model: Path, micros: int) -> Path:
    """Record a real edge, at a hub of its own, that takes its steps in `micros` micro-batches; the recording's file."""
    folder.mkdir(parents=True)
    (folder / "data.txt").write_text("".join(random.Random(0).choices(string.ascii_lowercase + " ", k=128 * 4 * 60)))
    with running_hub(folder, model, "--cohort", "1", "--round-steps", "1000") as hub:
        once(
            folder, "record", join=f"@{hub.join_file}", state=str(folder / "edge"), model=str(model),
            data=str(folder / "data.txt"), steps=7, out=str(folder / "recording"), micros=micros,
        )  # fmt: skip
    return folder / "recording"


def _rows(bench: Bench, recording: Recording, turns: list[Turn]) -> list[Row]:
    around = recording.lead_s + LINK_S
    alone, parts = (statistics.median(s for turn in turns for s in getattr(turn, name)) for name in ("alone", "parts"))
    engine = {count: statistics.median(turn.engine[count] for turn in turns) for count in (1, *PAPER)}
    bench.say(
        f"a step of one edge at a time {alone:.3f} s, in micro-batches {parts:.3f} s; the edge's own work in it "
        f"{recording.edge_s:.3f} s, of which between two steps {recording.lead_s:.3f} s; the hub's engine alone "
        + ", ".join(f"{seconds:.3f} s for {count}" for count, seconds in engine.items())
    )
    speed, share = [], []
    for count, paper in PAPER.items():
        figures = [sum(turn.alone[:count]) / turn.joined[count] for turn in turns]
        bounds = [bound(count, around, turn) for turn in turns]
        figure, most = statistics.median(figures), statistics.median(bounds)
        bench.say(f"{count} edges: joined {figure:.2f} times as fast as one at a time, bound {most:.2f}, paper {paper}")
        speed.append(at_least(SPEED[count], figure, paper))
        part = statistics.median(one / other for one, other in zip(figures, bounds, strict=True))
        share.append(at_least(SHARE[count], part, 0.9))
    return [*speed, *share, reported(IN_PARTS, alone / parts)]


def bound(count: int, around: float, turn: Turn) -> float:
    """How much faster than one at a time `count` edges could have been in this turn; around: seconds of lead and link.

    The formula at the head of this file.
    """
    engine = min(turn.engine[count], count * turn.engine[1])
    return sum(turn.alone[:count]) / (around + engine)
