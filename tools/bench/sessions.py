"""The group `sessions`: several edges decode at once through one hub, end to end, and what bounds them.

All edge processes share one core, the hub has the other. With

    edge_s(N)  CPU seconds of an edge process for one of its tokens, while N of them share the core (and its caches)
    hub_s(n)   CPU seconds of the hub's engine for one token of each of n sessions in one batch, without sockets

no more tokens a second can come out than the edges' core gives, 1 / edge_s(N), nor than the hub's does. A session is
never in two batches that follow each other at once: its edge has to work in between. So a hub that is always busy has
half of the sessions in a batch on average; one that waits for all of them waits for the edges' core, too:

    bound(N) = min(1 / edge_s(N), max(N/2 / hub_s(N/2), N / (hub_s(N) + N edge_s(N))))

All is measured in turns in one run, hub_s on the hub's core while the other one is idle, for contexts as long as the
edges' are on average; figures are medians of what the turns say. What the cores take from each other when both work
(memory, caches) is thus no part of the bound.

Edges stand for machines of their own, so where the system allows it their core takes them first come, first served
(SCHED_FIFO): else one that is nearly done would share it with others that have just begun, and the hub would wait for
it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tools.bench.processes import Worker, cores, running_hub, running_workers
from tools.table import Row, at_least, reported

if TYPE_CHECKING:
    from tools.bench.groups import Bench

SESSIONS = {count: f"{count} sessions at once, tokens/s of one session" for count in (2, 4, 8)}
BOUND = {count: f"{count} edges decoding at once, tokens/s / the bound from edge and hub alone" for count in (4, 8)}
BOUNDS = {count: f"the bound from edge and hub alone, {count} edges, tokens/s" for count in BOUND}
ROWS = (*SESSIONS.values(), *BOUND.values(), *BOUNDS.values())
_PROMPT, _TOKENS = 32, 64
_HUB_STEPS = 8


@dataclass(frozen=True)
class Turn:
    """Tokens a second and an edge's seconds for a token, by the number of edges; the hub's seconds by sessions."""

    speed: Mapping[int, float]
    edge_s: Mapping[int, float]
    hub_s: Mapping[int, float]

    def bound(self, count: int) -> float:
        """Tokens a second of so many edges, at most."""
        return bound(count, self.edge_s[count], self.hub_s)


def sessions(bench: Bench) -> Sequence[Row]:
    """One hub, several edge processes that decode at once on one core."""
    from tools.bench.groups import connect

    folder, model = bench.folder / "sessions", bench.models.standard
    with running_hub(folder, model) as hub, running_workers(folder, max(SESSIONS)) as edges:
        for number, edge in enumerate(edges):
            connect(edge, hub, folder / f"edge-{number}", model)
        in_order = [edge.ask("first_come_first_served") for edge in edges]
        how = "first come, first served" if all(in_order) else "in slices of time: the system allows nothing else"
        bench.say(f"the edges have their core {how}")
        engine = Worker(folder / "engine.log", cores()[0])
        try:
            # As long as those of the edges are on average.
            length = _PROMPT + (_TOKENS - _HUB_STEPS) // 2
            engine.ask("load_hub_side", model=str(model), sessions=max(SESSIONS), length=length)
            turns = [_turn(edges, engine) for _ in range(bench.repeats(5) + 1)][1:]
        finally:
            engine.stop()
    return _rows(turns, bench.say)


def _turn(edges: Sequence[Worker], engine: Worker) -> Turn:
    decoded = {count: _decode(edges[:count]) for count in (1, *SESSIONS)}
    hub_s = {count: float(engine.ask("hub_decode", count=count, steps=_HUB_STEPS)) for count in decoded}
    return Turn({n: speed for n, (speed, _) in decoded.items()}, {n: cpu for n, (_, cpu) in decoded.items()}, hub_s)


def _rows(turns: Sequence[Turn], say: Callable[[str], None]) -> list[Row]:
    for count in turns[0].speed:
        names = ("speed", "edge_s", "hub_s")
        speed, edge_s, hub_s = (statistics.median(getattr(turn, name)[count] for turn in turns) for name in names)
        say(
            f"{count} sessions: {speed:.1f} tokens/s; of the edges' core {edge_s * 1000:.1f} ms a token; "
            f"a batch at the hub {hub_s * 1000:.1f} ms"
        )
    figures = {n: statistics.median(turn.speed[n] / turn.speed[1] for turn in turns) for n in SESSIONS}
    shares = {n: statistics.median(turn.speed[n] / turn.bound(n) for turn in turns) for n in BOUND}
    return [
        *(at_least(SESSIONS[n], f, 2.0) if n == 4 else reported(SESSIONS[n], f) for n, f in figures.items()),
        *(at_least(BOUND[n], share, 0.9) for n, share in shares.items()),
        *(reported(row, statistics.median(turn.bound(n) for turn in turns)) for n, row in BOUNDS.items()),
    ]


def bound(count: int, edge_s: float, hub_s: Mapping[int, float]) -> float:
    """Tokens a second; see the head of this file."""
    always_busy = count / 2 / hub_s[count // 2]
    all_at_once = count / (hub_s[count] + count * edge_s)
    return min(1 / edge_s, max(always_busy, all_at_once))


def _decode(edges: Sequence[Worker]) -> tuple[float, float]:
    """All decode at once: tokens a second, and CPU seconds of the edges for each."""
    started = time.perf_counter()
    for edge in edges:
        edge.send("decode_cpu", tokens=_TOKENS, prompt=_PROMPT)
    cpu = sum(edge.receive() for edge in edges)
    return _TOKENS * len(edges) / (time.perf_counter() - started), cpu / len(edges)
