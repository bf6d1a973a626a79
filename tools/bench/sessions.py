"""The group `sessions`: several edges decode at once through one hub, end to end, and what bounds them.

All edge processes share one core, the hub has the other. So no more tokens a second can come out than

    bound(N) = min(1 / edge_s, N / hub_s(N))

edge_s: CPU seconds of an edge process for one of its tokens, alone; hub_s(N): CPU seconds of the hub's engine for one
token of each of N sessions in one batch, without sockets. Both are measured in the same run as the tokens/s.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.bench.processes import Worker, once, running_hub, running_workers
from tools.table import Row, at_least, reported

SESSIONS = {count: f"{count} sessions at once, tokens/s of one session" for count in (2, 4, 8)}
BOUND = {count: f"{count} edges decoding at once, tokens/s / the bound from edge and hub alone" for count in (4, 8)}
BOUNDS = {count: f"the bound from edge and hub alone, {count} edges, tokens/s" for count in BOUND}
ROWS = (*SESSIONS.values(), *BOUND.values(), *BOUNDS.values())
_TOKENS = 64


def sessions(bench: object) -> Sequence[Row]:
    """One hub, several edge processes that decode at once on one core."""
    from tools.bench.groups import Bench, connect

    assert isinstance(bench, Bench)
    folder, model = bench.folder / "sessions", bench.models.standard
    speeds: dict[int, list[float]] = {count: [] for count in (1, *SESSIONS)}
    with running_hub(folder, model) as hub, running_workers(folder, max(SESSIONS)) as workers:
        for number, worker in enumerate(workers):
            connect(worker, hub, folder / f"edge-{number}", model)
        edge_s = statistics.median(workers[0].ask("decode_cpu", tokens=_TOKENS) for _ in range(bench.repeats(5) + 1))
        for turn in range(bench.repeats(5) + 1):
            for count in speeds:
                speed = _tokens_per_s(workers[:count])
                if turn:
                    speeds[count].append(speed)
    medians = {count: statistics.median(values) for count, values in speeds.items()}
    for count, value in medians.items():
        bench.say(f"{count} sessions: {value:.1f} tokens/s")
    bounds = _bounds(folder, model, edge_s, bench.repeats(5), bench.say)
    figures = {count: medians[count] / medians[1] for count in SESSIONS}
    return [
        *(at_least(SESSIONS[n], f, 2.0) if n == 4 else reported(SESSIONS[n], f) for n, f in figures.items()),
        *(at_least(row, medians[count] / bounds[count], 0.9) for count, row in BOUND.items()),
        *(reported(row, bounds[count]) for count, row in BOUNDS.items()),
    ]


def _bounds(folder: Path, model: Path, edge_s: float, repeats: int, say: object) -> Mapping[int, float]:
    assert callable(say)
    counts = [1, *BOUND]
    hub_s = once(folder, "decoding", model=str(model), counts=[], hub_only=counts, repeats=repeats, steps=8)["hub"]
    batch = {count: statistics.median(hub_s[str(count)]) for count in counts}
    say(
        f"a token: edge {edge_s * 1000:.1f} ms, hub "
        + ", ".join(f"{s * 1000:.1f} ms for {n}" for n, s in batch.items())
    )
    return {count: min(1 / edge_s, count / batch[count]) for count in BOUND}


def _tokens_per_s(workers: Sequence[Worker]) -> float:
    started = time.perf_counter()
    for worker in workers:
        worker.send("decode", who="split", tokens=_TOKENS)
    for worker in workers:
        worker.receive()
    return _TOKENS * len(workers) / (time.perf_counter() - started)
