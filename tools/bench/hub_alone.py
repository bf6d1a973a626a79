"""The group `hub`: what batching gains at the hub alone, what a session costs, and what a prompt does to others."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from tools.bench.processes import once
from tools.table import Row, at_least, at_most, reported

GAIN = {
    count: f"hub alone, {count} sessions of different lengths, gain / gain of the unsplit blocks from the same batch"
    for count in (4, 8, 16, 32)
}
SPEED = {
    count: f"hub alone, {count} sessions of different lengths, tokens/s / those of the unsplit blocks"
    for count in (1, *GAIN)
}
GROWTH = {
    count: f"hub CPU per token, {count} sessions of different lengths / one session" for count in (4, 8, 16, 32, 64)
}
KEPT = "memory per session / bytes of its keys and values, 8 sessions of 1,000 positions"
_BESIDE = "p95 of the time between two tokens of 3 sessions while another sends prompts of 2,048"
WAIT = f"{_BESIDE} / (2 x undisturbed + p95 of a piece of a prompt)"
WAIT_MS = {
    "alone": "p95 of the time between two tokens of 3 sessions, undisturbed, ms",
    "whole": f"{_BESIDE}, each computed whole, ms",
    "pieces": f"{_BESIDE}, in pieces, ms",
    "piece": "p95 of a forward with a piece of a prompt of 2,048, ms",
}
ROWS = (*SPEED.values(), *GAIN.values(), *GROWTH.values(), KEPT, WAIT, *WAIT_MS.values())


def hub_alone(bench: object) -> Sequence[Row]:
    """One process, one thread, no sockets; all in CPU seconds.

    The gain from a batch of N is N times the seconds of one session's token by those of the batch. The unsplit blocks
    have the faster of transformers' two caches, for the one session and for the batch. The gains' ratio says how
    batching compares and falls when a single session becomes faster; the ratio of tokens/s says who is.
    """
    from tools.bench.groups import Bench

    assert isinstance(bench, Bench)
    folder, model = bench.folder / "hub", str(bench.models.standard)
    repeats, steps = bench.repeats(5), 2 if bench.quick else 8
    figures = once(
        folder, "decoding", model=model, counts=[1, *GAIN], hub_only=list(GROWTH), repeats=repeats, steps=steps
    )
    if figures["apart"] > 1e-4:
        raise RuntimeError(f"the hub's states and the unsplit ones differ by {figures['apart']:g}")
    hub = _medians(figures["hub"])
    caches = [_medians(figures[kind]) for kind in ("static", "dynamic")]
    unsplit = {count: min(cache[count] for cache in caches) for count in (1, *GAIN)}
    for count, seconds in hub.items():
        beside = f", the unsplit blocks {count / unsplit[count]:.1f}" if count in unsplit else ""
        bench.say(f"{count} sessions: the hub {count / seconds:.1f} tokens/s{beside}")
    ratio = once(folder, "kv_memory", model=model, sessions=2 if bench.quick else 8, positions=1000)
    waits = once(folder, "waiting", model=model, tokens=8 if bench.quick else 60, prompts=1 if bench.quick else 3)
    allowed = 2 * waits["alone"] + waits["piece"]
    return [
        *(at_least(row, unsplit[count] / hub[count], 1.0) for count, row in SPEED.items()),
        *(at_least(row, _gain(hub, count) / _gain(unsplit, count), 0.9) for count, row in GAIN.items()),
        *_growth(hub),
        at_most(KEPT, ratio, 1.1),
        at_most(WAIT, waits["pieces"] / allowed, 1.0),
        *(reported(row, waits[name] * 1000) for name, row in WAIT_MS.items()),
    ]


def _gain(seconds: Mapping[int, float], count: int) -> float:
    return count * seconds[1] / seconds[count]


def _growth(seconds: Mapping[int, float]) -> list[Row]:
    """CPU per token by that of one session; each number of sessions has to be below the one before."""
    rows, before = [], 1.0
    for count, row in GROWTH.items():
        figure = 1 / _gain(seconds, count)
        rows.append(at_most(row, figure, round(before, 4)))
        before = figure
    return rows


def _medians(seconds: Mapping[str, list[float]]) -> dict[int, float]:
    """JSON has made the numbers of sessions to strings."""
    return {int(count): statistics.median(values) for count, values in seconds.items()}
