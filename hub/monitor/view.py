"""The hub's screen: the edges, the round, how full the batches are, memory, bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.text import Text

from hub.monitor.snapshot import EdgeRow, HubSnapshot, ReplicaRow, plain_line, progress, total_tokens_per_s
from messaging.console.figures import (
    UNKNOWN,
    byte_rate,
    duration,
    human_bytes,
    loss_text,
    milliseconds,
    number,
    of_total,
)
from messaging.console.live import View
from messaging.console.parts import (
    ACCENT,
    BAD,
    DIM,
    GOOD,
    LABEL,
    STRONG,
    WAIT,
    Column,
    Section,
    frame,
    inner_width,
    log_lines,
    phase_style,
    piece,
    progress_bar,
    row,
    rows_left,
    table,
)

#: Edges ping every five seconds or so: beyond the first something is odd, beyond the second the edge is likely gone.
_QUIET_S = 10.0
_DEAD_S = 20.0
#: Shares of the KV budget from which it is tight, and full.
_TIGHT, _FULL = 0.75, 0.95
#: Lines kept for the log, its divider among them, however many edges there are; but these come first on a tiny screen.
_LOG_LINES = 4
_EDGE_LINES = 4
_REPLICA_LINES = 9


def render(snapshot: HubSnapshot, width: int, height: int) -> Text:
    """The snapshot in at most `height` lines."""
    inner = inner_width(width)
    title = Text.assemble(("FedSEA hub", STRONG), (f"  {snapshot.model}", ACCENT))
    style = phase_style(snapshot.phase)
    status = Text.assemble(("● ", style), (snapshot.phase, style), (f"  up {duration(snapshot.uptime_s)}", DIM))
    sections = [
        Section(_place(snapshot, inner)),
        Section([*_round(snapshot, inner), *_load(snapshot, inner), *_network(snapshot, inner)], "work"),
    ]
    room = rows_left(height, sections) - _EDGE_LINES - 1
    if snapshot.replicas and room > 1:
        lines = _replicas(snapshot.replicas, inner, min(room, _REPLICA_LINES))
        sections.append(Section(lines, f"replicas {len(snapshot.replicas)}"))
    free = rows_left(height, sections)
    room = max(free - _LOG_LINES, min(free, _EDGE_LINES))
    sections.append(Section(_edges(snapshot.edges, inner, room), f"edges {len(snapshot.edges)}"))
    free = rows_left(height, sections)
    if free > 0:
        sections.append(Section(log_lines(snapshot.log, free), "log"))
    return frame(title, status, sections, width)


def _place(snapshot: HubSnapshot, width: int) -> list[Text]:
    hosted = snapshot.last_layer - snapshot.first_layer + 1
    layers = f"layers {snapshot.first_layer} to {snapshot.last_layer} ({hosted} of {snapshot.layers})"
    pieces = [Text(snapshot.dtype), Text(layers), piece("adapter", f"version {snapshot.adapter_version}")]
    endpoints = [Text(endpoint) for endpoint in snapshot.endpoints]
    return row("hosts", pieces, width) + row("listens", endpoints, width)


def _round(snapshot: HubSnapshot, width: int) -> list[Text]:
    bar = progress_bar(snapshot.round_step, snapshot.round_steps, max(8, min(40, width - LABEL - 34)))
    steps = Text(f"{of_total(snapshot.round_step, snapshot.round_steps or None)} steps")
    pieces = [Text(of_total(snapshot.round, snapshot.rounds), STRONG), bar, steps]
    full = snapshot.cohort_joined >= snapshot.cohort_size
    cohort = [
        Text(f"{of_total(snapshot.cohort_joined, snapshot.cohort_size)} edges", GOOD if full else WAIT),
        piece("steps in all", f"{snapshot.hub_step:,}"),
        Text(f"{number(total_tokens_per_s(snapshot))} tokens/s", STRONG),
    ]
    return row("round", pieces, width) + row("cohort", cohort, width)


def _load(snapshot: HubSnapshot, width: int) -> list[Text]:
    batches = [
        Text(f"{_mean(snapshot.edges_per_step)} edges/step"),
        Text(f"{_mean(snapshot.sessions_per_decode)} sessions/decode"),
        piece("queue", f"{snapshot.queued}"),
    ]
    filled = snapshot.kv_bytes / snapshot.kv_budget_bytes if snapshot.kv_budget_bytes else 0.0
    evicted = f", {snapshot.evicted} evicted" if snapshot.evicted else ""
    style = BAD if filled >= _FULL else WAIT if filled >= _TIGHT else ACCENT
    memory = [
        progress_bar(filled, 1.0, max(8, min(20, width - LABEL - 24)), style),
        Text(f"{human_bytes(snapshot.kv_bytes)} of {human_bytes(snapshot.kv_budget_bytes)}{evicted}"),
        piece("streams", f"{snapshot.streams}"),
    ]
    return row("batches", batches, width) + row("KV cache", memory, width)


def _mean(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.1f}"


def _network(snapshot: HubSnapshot, width: int) -> list[Text]:
    pieces = [
        piece("in", f"{human_bytes(snapshot.bytes_in):>8} {byte_rate(snapshot.bytes_in_per_s):>10}"),
        piece("out", f"{human_bytes(snapshot.bytes_out):>8} {byte_rate(snapshot.bytes_out_per_s):>10}"),
    ]
    return row("network", pieces, width)


#: What is told of a replica, the most important first; as many as there is room for.
_REPLICA_FIGURES: tuple[tuple[Column, Callable[[ReplicaRow], Text]], ...] = (
    (Column("replica", 10, words=True), lambda replica: Text(replica.name, STRONG)),
    (Column("state", 17, words=True), lambda replica: Text(replica.state, _replica_style(replica))),
    (Column("train", 5), lambda replica: Text(f"{replica.training}")),
    (Column("generate", 8), lambda replica: Text(f"{replica.generating}")),
    (Column("steps", 7), lambda replica: Text(f"{replica.hub_step:,}")),
    (Column("where", 32, words=True), lambda replica: Text(replica.where)),
)


def _replica_style(replica: ReplicaRow) -> str:
    return BAD if replica.troubled else phase_style(replica.state)


def _replicas(replicas: tuple[ReplicaRow, ...], width: int, lines: int) -> list[Text]:
    """A line for each replica, in at most `lines`; those in trouble come first where not all fit."""
    shown = list(replicas)
    if len(replicas) > lines - 1:
        shown = sorted(replicas, key=lambda replica: not replica.troubled)[: max(0, lines - 2)]
    figures, room = [], width
    for column, text in _REPLICA_FIGURES:
        room -= column.width + 2
        if room < -2:
            break
        figures.append((column, text))
    result = table([column for column, _ in figures], [[text(one) for _, text in figures] for one in shown])
    if len(shown) < len(replicas):
        result.append(Text(f"and {len(replicas) - len(shown)} more", DIM))
    return result


@dataclass(frozen=True)
class _Figure:
    """A column of the edges' table; of those that do not fit together, the highest rank goes first."""

    column: Column
    rank: int
    text: Callable[[EdgeRow], Text]


def _state(edge: EdgeRow) -> Text:
    if edge.silent_s < _QUIET_S:
        return Text(edge.state, phase_style(edge.state))
    since = " ".join(duration(edge.silent_s).split()[:2])
    return Text(f"silent {since}", BAD if edge.silent_s >= _DEAD_S else WAIT)


_FIGURES = (
    _Figure(Column("partition", 9, words=True), 1, lambda edge: Text(edge.partition)),
    _Figure(Column("state", 13, words=True), 0, _state),
    _Figure(Column("tokens/s", 8), 2, lambda edge: Text(number(edge.tokens_per_s))),
    _Figure(Column("trip", 7), 4, lambda edge: Text(milliseconds(edge.round_trip_ms))),
    _Figure(Column("loss", 6), 3, lambda edge: Text(loss_text(edge.loss))),
    _Figure(Column("sigma", 6), 6, lambda edge: Text(number(edge.noise_sigma))),
    _Figure(Column("r", 5), 5, lambda edge: Text(number(edge.noise_r))),
    _Figure(Column("sessions", 8), 7, lambda edge: Text(f"{edge.sessions}")),
)
_NAME_LEAST, _NAME_MOST = 14, 24


def _edges(edges: tuple[EdgeRow, ...], width: int, lines: int) -> list[Text]:
    """The edges' table in at most `lines` lines; those in trouble come first where not all fit."""
    if not edges:
        return [Text("none yet: give them the join string", DIM)]
    shown = list(edges)
    if len(edges) > lines - 1:
        shown = sorted(edges, key=lambda edge: edge.silent_s < _QUIET_S)[: max(0, lines - 2)]
    figures = _fitting(width)
    taken = sum(figure.column.width + 2 for figure in figures)
    name = Column("edge", max(_NAME_LEAST, min(_NAME_MOST, width - taken)), words=True)
    cells = [[Text(edge.name, STRONG), *(figure.text(edge) for figure in figures)] for edge in shown]
    result = table([name, *(figure.column for figure in figures)], cells)
    if len(shown) < len(edges):
        result.append(Text(f"and {len(edges) - len(shown)} more", DIM))
    return result


def _fitting(width: int) -> list[_Figure]:
    """The most important columns that fit beside the name, in the table's order."""
    kept: set[int] = set()
    room = width - _NAME_LEAST
    for figure in sorted(_FIGURES, key=lambda figure: figure.rank):
        room -= figure.column.width + 2
        if room < 0:
            break
        kept.add(figure.rank)
    return [figure for figure in _FIGURES if figure.rank in kept]


VIEW = View(render, plain_line, progress)
