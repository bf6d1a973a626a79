"""The edge's screen: step, loss, speed, where the time goes, bytes, noise."""

from __future__ import annotations

import math

from rich.text import Text

from edge.monitor.snapshot import EdgeSnapshot, TimeSpent, plain_line, progress
from messaging.console.figures import (
    UNKNOWN,
    duration,
    human_bytes,
    loss_text,
    milliseconds,
    number,
    of_total,
    percent,
    shares,
    sparkline,
    split_cells,
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
    Section,
    frame,
    inner_width,
    log_lines,
    phase_style,
    piece,
    progress_bar,
    row,
    rows_left,
)

#: The bar of where the time goes. Glyphs differ as well as colours, for terminals without.
_PLACES = (
    ("A", "█", "cyan"),
    ("link", "▒", "yellow"),
    ("hub wait", "░", "magenta"),
    ("C", "▓", "blue"),
    ("other", "·", DIM),
)


def render(snapshot: EdgeSnapshot, width: int, height: int) -> Text:
    """The snapshot in at most `height` lines."""
    inner = inner_width(width)
    title = Text.assemble(("FedSEA edge", STRONG), (f"  {snapshot.name}", ACCENT))
    style = BAD if snapshot.trouble else phase_style(snapshot.phase)
    status = Text.assemble(("● ", style), (snapshot.trouble or snapshot.phase, style))
    sections = [
        Section(_place(snapshot, inner)),
        Section([*_progress(snapshot, inner), *_loss(snapshot, inner)], "training"),
        Section([*_speed(snapshot, inner), *_noise(snapshot, inner)], "cost"),
    ]
    free = rows_left(height, sections)
    if free > 0:
        sections.append(Section(log_lines(snapshot.log, free), "log"))
    return frame(title, status, sections, width)


def _place(snapshot: EdgeSnapshot, width: int) -> list[Text]:
    pieces = [Text(snapshot.hub)]
    if snapshot.cohort_size:
        full = snapshot.cohort_joined >= snapshot.cohort_size
        joined = of_total(snapshot.cohort_joined, snapshot.cohort_size)
        pieces.append(piece("cohort", joined, GOOD if full else WAIT))
    lines = row("hub", pieces, width)
    if snapshot.model:
        pieces = [Text(snapshot.model), piece("partition", snapshot.partition or UNKNOWN)]
        if snapshot.wire:
            pieces.append(piece("wire", snapshot.wire))
        lines += row("model", pieces, width)
    return lines


def _progress(snapshot: EdgeSnapshot, width: int) -> list[Text]:
    bar = progress_bar(snapshot.round_step, snapshot.round_steps, max(8, min(40, width - LABEL - 34)))
    steps = Text(f"{of_total(snapshot.round_step, snapshot.round_steps or None)} steps")
    pieces = [Text(of_total(snapshot.round, snapshot.rounds), STRONG), bar, steps]
    total = [Text(of_total(snapshot.step, snapshot.steps), STRONG)]
    if snapshot.eta_s is not None:
        total.append(piece("left", duration(snapshot.eta_s)))
    return row("round", pieces, width) + row("step", total, width)


def _loss(snapshot: EdgeSnapshot, width: int) -> list[Text]:
    if snapshot.loss is None:
        return row("loss", [Text(UNKNOWN)], width)
    first, last = loss_text(snapshot.losses[0] if snapshot.losses else snapshot.loss), loss_text(snapshot.loss)
    room = width - LABEL - len(first) - len(last) - 2
    curve = Text.assemble(
        (first, DIM),
        (f" {sparkline(snapshot.losses, room)} ", ACCENT),
        (last, STRONG if math.isfinite(snapshot.loss) else f"{STRONG} {BAD}"),
    )
    return row("loss", [curve], width) + _held_out(snapshot, width)


def _held_out(snapshot: EdgeSnapshot, width: int) -> list[Text]:
    before, last = snapshot.held_out_before, snapshot.held_out_last
    if before is None:
        return []
    pieces = [piece("before", loss_text(before))]
    if last is not None:
        better = last < before
        pieces.append(piece("now", loss_text(last), STRONG))
        pieces.append(Text(f"{last - before:+.3f}", GOOD if better else WAIT))
    return row("held-out", pieces, width)


def _speed(snapshot: EdgeSnapshot, width: int) -> list[Text]:
    speed = [Text(f"{number(snapshot.tokens_per_s)} tokens/s", STRONG)]
    speed.append(piece("round trip", milliseconds(snapshot.round_trip_ms)))
    network = [
        piece("sent", human_bytes(snapshot.bytes_sent)),
        piece("received", human_bytes(snapshot.bytes_received)),
    ]
    return row("speed", speed, width) + _time(snapshot.time_spent, width) + row("network", network, width)


def _time(spent: TimeSpent, width: int) -> list[Text]:
    fractions = shares([spent.blocks_a, spent.link, spent.hub, spent.blocks_c, spent.other])
    if not any(fractions):
        return []
    bar, legend = Text(), []
    cells = split_cells(fractions, width - LABEL)
    for (name, glyph, style), fraction, count in zip(_PLACES, fractions, cells, strict=True):
        bar.append(glyph * count, style)
        legend.append(Text.assemble((f"{glyph} ", style), (f"{name} ", DIM), f"{percent(fraction):>3}"))
    return row("time", [bar], width) + row("", legend, width, tab=1)


def _noise(snapshot: EdgeSnapshot, width: int) -> list[Text]:
    if not snapshot.noise_scale:
        return row("noise", [Text("off: smashed states leave as they are", WAIT)], width)
    pieces = [
        piece("scale", number(snapshot.noise_scale)),
        piece("sigma", number(snapshot.noise_sigma)),
        piece("r", number(snapshot.noise_r)),
    ]
    return row("noise", pieces, width)


VIEW = View(render, plain_line, progress)
