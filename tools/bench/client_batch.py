"""Client-batch against one edge at a time: what joining the edges' steps gains, with the hub as what is measured.

One edge at a time: each edge takes its step alone while no other is there, one after the other, so that neither link
nor edges' work overlap with anything. Client-batch: all take the same steps at once, and the hub joins them into one
forward, one backward and one optimizer step. The edges are replayed (`replay.py`), the link is 20 ms there and back,
crossed twice a step.

With edge = a real edge's own seconds of a step, link = 2 x 20 ms and hub_n = the hub's seconds of a step of n edges,
all measured in the same run, the bound of the figure is

    n x (edge + link + hub_1) / (edge + link + hub_n)

hub_1 is what the steps of one edge at a time leave beside edge and link, sockets and scheduler included. hub_n is that
of the engine alone (`hub_part.py`), and never more than n times the engine's for one edge: joining must not cost more
than it saves. So no figure can be above its bound, and what the hub adds to its engine (sockets, encryption,
scheduler, threads, gaps) keeps it below. The paper's figures are those of its own two modes (FedSEA-LLaMA, arXiv
2505.15683) for 2, 4 and 8 clients.
"""

from __future__ import annotations

import random
import statistics
import string
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tools.bench.processes import Worker, cores, once, running_hub, running_workers
from tools.table import Row, at_least

if TYPE_CHECKING:
    from tools.bench.groups import Bench

LINK_S = 0.020
#: edges -> the paper's figure
PAPER = {2: 1.09, 4: 1.27, 8: 1.41}
_WORK = "link of 20 ms, steps of 4 x 128: joined / one edge at a time"
SPEED = {count: f"{count} replayed edges, {_WORK}, speed" for count in PAPER}
SHARE = {count: f"{count} replayed edges, {_WORK}, part of the bound" for count in PAPER}


@dataclass(frozen=True)
class Turn:
    """Seconds of one step: of each edge alone, by the number of edges joined, and so of the engine alone."""

    alone: list[float]
    joined: dict[int, float]
    engine: dict[int, float]


def client_batch(bench: Bench) -> list[Row]:
    """The rows for 2, 4 and 8 edges."""
    folder = bench.folder / "client_batch"
    model = bench.models.small if bench.quick else bench.models.standard
    recording = folder / "recording"
    edge_s = record(folder / "real", model, recording)
    with running_hub(folder, model, "--round-steps", "100000") as hub, running_workers(folder) as (edges,):
        edges.ask("gather", join=f"@{hub.join_file}", folder=str(folder), recording=str(recording), count=max(PAPER),
                  link_s=LINK_S)  # fmt: skip
        engine = Worker(folder / "engine.log", cores()[0])
        try:
            engine.ask("load_hub_part", model=str(model), recording=str(recording))
            # The first turn warms up.
            turns = [_turn(edges, engine) for _ in range(bench.repeats(5) + 1)][1:]
        finally:
            engine.stop()
        edges.ask("disperse")
    return _rows(bench, edge_s, turns)


def _turn(edges: Worker, engine: Worker) -> Turn:
    """One step in every way."""
    alone = edges.ask("in_turn", steps=1)
    joined = {count: edges.ask("joined", count=count, steps=1) for count in PAPER}
    return Turn(alone, joined, {count: engine.ask("hub_part_step", count=count) for count in (1, *PAPER)})


def record(folder: Path, model: Path, out: Path) -> float:
    """Record a real edge at a hub of its own; its seconds of one step."""
    folder.mkdir(parents=True)
    (folder / "data.txt").write_text("".join(random.Random(0).choices(string.ascii_lowercase + " ", k=128 * 4 * 60)))
    with running_hub(folder, model, "--cohort", "1", "--round-steps", "1000") as hub:
        seconds = once(
            folder, "record", join=f"@{hub.join_file}", state=str(folder / "edge"), model=str(model),
            data=str(folder / "data.txt"), steps=7, out=str(out),
        )  # fmt: skip
    return float(seconds["before_s"] + seconds["between_s"])


def _rows(bench: Bench, edge_s: float, turns: list[Turn]) -> list[Row]:
    around = edge_s + 2 * LINK_S
    hub_s = statistics.median(seconds for turn in turns for seconds in turn.alone) - around
    alone = {count: statistics.median(turn.engine[count] for turn in turns) for count in (1, *PAPER)}
    bench.say(
        f"parts of a step: edge {edge_s:.3f} s, link {2 * LINK_S:.3f} s, hub for one edge at a time {hub_s:.3f} s; "
        "its engine alone " + ", ".join(f"{seconds:.3f} s for {count}" for count, seconds in alone.items())
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
    return [*speed, *share]


def bound(count: int, around: float, turn: Turn) -> float:
    """How much faster than one at a time `count` edges could have been in this turn; around: seconds of edge and link.

    The formula at the head of this file, with n x (edge + link + hub_1) as it was measured.
    """
    engine = min(turn.engine[count], count * turn.engine[1])
    return sum(turn.alone[:count]) / (around + engine)
