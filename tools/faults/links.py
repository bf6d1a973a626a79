"""Bad links: half-open ones, a hub that stands still, a thin line. Rows 3 to 6 of the table."""

from __future__ import annotations

import math
import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.text import Text

from messaging.joining import JoinString, read_join
from tools.faults.asker import Answer, Asker, Plan
from tools.faults.cutting import CuttingRelay
from tools.faults.fault import Fault, Setting
from tools.faults.network import Network, enter, missing
from tools.pocket.text import private_notes
from tools.programs import Hub, Process, Programs
from tools.table import Row, Skipped, at_least, at_most, reported

#: In a quick run all intervals of liveness are so much shorter, and so are the targets, but for some slack: its cores
#: may be shared.
_SCALE, _SLACK_S = 0.2, 15.0
_HANG, _DUMP = "FAULTS_HANG", "FAULTS_DUMP"


def _shorten() -> None:
    import hub.figures
    import hub.server
    import messaging.liveness as liveness
    import messaging.sockets as sockets

    liveness._SHORTEST_S *= _SCALE
    liveness._LATE_S *= _SCALE
    liveness.interval_s = lambda edges: liveness._SHORTEST_S
    sockets._HEARTBEAT_MS = int(sockets._HEARTBEAT_MS * _SCALE)
    sockets._DEAD_LINK_MS = int(sockets._DEAD_LINK_MS * _SCALE)
    sockets._KEEPALIVE_S = int(sockets._KEEPALIVE_S * _SCALE)
    sockets._KEEPALIVE_AGAIN_S = int(sockets._KEEPALIVE_AGAIN_S * _SCALE)
    hub.figures._OVERDUE_S *= _SCALE
    hub.server._TICK_S *= _SCALE


def _enter_quick() -> None:
    enter()
    _shorten()


def _serve(programs: Programs, network: Network, prepare: Callable[[], None]) -> Hub:
    listen = f"tcp://{network.address('hub')}:0"
    return programs.serve("--listen", listen, "--cohort", 1, env=network.env("hub"), prepare=prepare)


# -- 3, 4: half-open links ---------------------------------------------------------------------------

_IDLE = tuple(
    f"3 half-open idle link: {what}" for what in ("edge knows (s)", "hub knows (s)", "reply after healing (s)")
)
_LEFT = "3 half-open links: connections that the hub still holds at the end of the outage"
_BUSY = tuple(
    f"4 half-open link, unsent data: {what}" for what in ("edge knows (s)", "hub knows (s)", "reply after healing (s)")
)


def _half_open(setting: Setting) -> Sequence[Row | Skipped]:
    """One outage for two edges at once: one that only pings, and one with data under way."""
    if (why := missing()) is not None:
        return [Skipped(row, why) for row in (*_IDLE, *_BUSY, _LEFT)]
    outages = (26.0 * _SCALE,) if setting.quick else (23.0, 26.3, 31.1)
    prepare = _enter_quick if setting.quick else enter
    plans = (Plan("idle"), Plan("busy", every_s=0.05, nbytes=200_000))
    with ExitStack() as owned:
        network = owned.enter_context(Network("hub", "edge"))
        programs = owned.enter_context(Programs(setting.folder))
        hub = _serve(programs, network, prepare)
        idle, busy = (
            owned.enter_context(Asker(setting.folder, hub.join, plan, network.env("edge"), prepare)) for plan in plans
        )
        idle.when("connected")
        busy.answer_after(0.0)
        more_s = setting.limit(0.0, 10.0)
        found = [_outage(network, hub, idle, busy, seconds, more_s) for seconds in outages]
    scale, slack = (_SCALE, _SLACK_S) if setting.quick else (1.0, 0.0)
    unit = " s (intervals scaled by 0.2)" if setting.quick else " s"
    rows = [at_most(_LEFT, max(left for _, left in found), 0)]
    for edge, (names, limit) in enumerate(((_IDLE, 21.0), (_BUSY, 17.0))):
        worst = [max(figures) for figures in zip(*(each[edge] for each, _ in found), strict=True)]
        for name, figure, most in zip(names, worst, (limit * scale, limit * scale, 1.0), strict=True):
            rows.append(at_most(name, figure, most + slack, unit))
    return rows


def _outage(
    network: Network, hub: Hub, idle: Asker, busy: Asker, seconds: float, more_s: float
) -> tuple[list[list[float]], int]:
    """Cut, wait, heal: for each edge when it knew, when the hub knew of it, and how soon it was answered again.

    And how many connections the hub had just before the healing, which comes up to `more_s` later if it has some.
    """
    # Not right after a ping: somewhere between two.
    time.sleep(1.0)
    hub.process.until(lambda: _heard(hub, "busy") and _heard(hub, "idle"), "that both edges are heard")
    network.cut("edge")
    cut = time.monotonic()
    before = hub.process.out
    known = {name: _hub_says(hub, f"{name} silent for", before, cut, seconds + _SLACK_S) for name in ("busy", "idle")}
    time.sleep(max(0.0, cut + seconds - time.monotonic()))
    while (left := network.connections("hub")) and time.monotonic() < cut + seconds + more_s:
        time.sleep(0.2)
    healed = time.monotonic()
    network.heal("edge")
    busy.answer_after(healed)
    back = idle.when("answers again", healed)
    answered = min(answer.answered for answer in busy.answers if answer.answered > healed)
    for name in ("idle", "busy"):
        _hub_says(hub, f"{name} is back after", before, healed, 40.0)
    times = [
        [_knew(idle, cut) - cut, known["idle"], back - healed],
        [_knew(busy, cut) - cut, known["busy"], answered - healed],
    ]
    return times, left


def _heard(hub: Hub, name: str) -> bool:
    """Whether the hub's log does not say that an edge is silent just now."""
    return hub.process.out.count(f"{name} silent for") == hub.process.out.count(f"{name} is back after")


def _knew(asker: Asker, cut: float) -> float:
    """When it first said that something is wrong."""
    return min(at for at, line in asker.said if at > cut and ("silent for" in line or "is lost" in line))


def _hub_says(hub: Hub, text: str, before: str, since: float, most_s: float) -> float:
    """Seconds from `since` until the hub's log says something once more than it did `before`."""
    hub.process.until(lambda: hub.process.out.count(text) > before.count(text), repr(text), most_s)
    return time.monotonic() - since


# -- 5: a hub that stands still ------------------------------------------------------------------------

_STOPPED, _STUCK = "5 SIGSTOP of the hub: the edge says so (s)", "5 hub's compute hangs: the edge says so (s)"
_RESUMED = "5 SIGSTOP of the hub: reply after SIGCONT (s)"


def _stands_still(setting: Setting) -> Sequence[Row | Skipped]:
    """A training edge, by its log and by its screen; first the whole hub stands still, then its computation."""
    scale, slack = (_SCALE, _SLACK_S) if setting.quick else (1.0, 0.0)
    limit, unit = 21.0 * scale + slack, " s" + (" (intervals scaled by 0.2)" if setting.quick else "")
    hang, dump = setting.folder / "hang", setting.folder / "edge.json"
    env = {_HANG: str(hang), _DUMP: str(dump)}
    with Programs(setting.folder) as programs:
        hub = programs.serve("--cohort", 1, env=env, prepare=_hangs_quick if setting.quick else _hangs)
        data = setting.folder / "notes.txt"
        data.write_text("\n".join(private_notes("clinic", 0, 40)))
        edge = programs.edge(hub, "ward", data, env=env, prepare=_dumps_quick if setting.quick else _dumps)
        hub.until(lambda live: live["hub_step"] >= 2, "two steps")
        hub.process.signal(signal.SIGSTOP)
        stopped = _until_told(edge, dump, "hub silent for")
        # Long enough for the edge to dial afresh, more than once.
        time.sleep(setting.count(35, 5))
        hub.process.signal(signal.SIGCONT)
        resumed = _until(edge, lambda: "answers again" in edge.out)
        step = int(hub.status()["live"]["hub_step"])
        hub.until(lambda live: live["hub_step"] >= step + 2, "two more steps")
        hang.touch()
        stuck = _until_told(edge, dump, "hub busy with one computation for")
        hang.unlink()
        edge.until_says("computation goes on")
    return [
        at_most(_STOPPED, stopped, limit, unit),
        at_most(_RESUMED, resumed, setting.limit(6.0, 30.0), " s"),
        at_most(_STUCK, stuck, limit, unit),
    ]


def _hangs() -> None:
    """The hub's computation stands still as long as a file is there."""
    import hub.engine as engine

    plain, flag = engine.Engine.step_forward, Path(os.environ[_HANG])

    def hanging(self: engine.Engine, *arguments: object) -> object:
        while flag.exists():
            time.sleep(0.05)
        return plain(self, *arguments)  # type: ignore[arg-type]

    engine.Engine.step_forward = hanging  # type: ignore[method-assign, assignment]


def _hangs_quick() -> None:
    _hangs()
    _shorten()


def _dumps() -> None:
    """The edge writes what its screen shows to a file."""
    from functools import partial

    import edge.join

    edge.join.LiveView = partial(edge.join.LiveView, dump=Path(os.environ[_DUMP]))  # type: ignore[misc, assignment]


def _dumps_quick() -> None:
    _dumps()
    _shorten()


def _until_told(edge: Process, dump: Path, text: str) -> float:
    """Seconds until the log and the drawn screen both say something."""
    began = time.monotonic()
    already = edge.out.count(text)

    def told() -> bool:
        return edge.out.count(text) > already and text in _screen(dump)

    _until(edge, told)
    return time.monotonic() - began


def _until(edge: Process, condition: Callable[[], object]) -> float:
    began = time.monotonic()
    edge.until(condition, "what was expected")
    return time.monotonic() - began


def _screen(dump: Path) -> str:
    """The edge's screen as it would be drawn now."""
    from edge.monitor import VIEW
    from edge.monitor.snapshot import from_fields
    from messaging.console.dump import read_snapshot

    screen = VIEW.render(from_fields(read_snapshot(dump)), 80, 24)
    assert isinstance(screen, Text)
    return screen.plain


# -- 6: 16 MB over a thin line ---------------------------------------------------------------------------

_ARRIVES = "6 16 MB at 10 Mbit/s: arrives (s)"
_LOST = "6 16 MB at 10 Mbit/s: disconnects"
_OTHERS = "6 16 MB at 10 Mbit/s: others' decoding steps, p95 with it by p95 without"
_SAME_LINE = "6 16 MB at 10 Mbit/s: decoding steps over the same line, p95 (s)"
_MEGABITS = 10


def _thin_line(setting: Setting) -> Sequence[Row | Skipped]:
    """One edge sends a large message over a thin line; another decodes meanwhile over a good one."""
    if (why := missing()) is not None:
        return [Skipped(row, why) for row in (_ARRIVES, _LOST, _OTHERS, _SAME_LINE)]
    nbytes = setting.count(16_000_000, 2_000_000)
    with ExitStack() as owned:
        network = owned.enter_context(Network("hub", "thin", "good"))
        network.shape("thin", _MEGABITS)
        programs = owned.enter_context(Programs(setting.folder))
        hub = _serve(programs, network, enter)

        def asker(host: str, plan: Plan) -> Asker:
            return owned.enter_context(Asker(setting.folder, hub.join, plan, network.env(host), enter))

        decoding = asker("good", Plan("decoding", every_s=0.01, nbytes=8 * 768))
        decoding.answer_after(0.0)
        beside = asker("thin", Plan("beside", every_s=0.1, nbytes=768))
        beside.answer_after(0.0)
        large = asker("thin", Plan("large", every_s=nbytes * 8 / _MEGABITS / 1e6, nbytes=nbytes, count=1, fits=False))
        large.when("connected")
        answer = large.answer_after(0.0, 90.0)
        answers, lost = decoding.answers, [line for _, line in large.said if "is lost" in line]
        same_line = [a for a in beside.answers if answer.asked <= a.asked and a.answered <= answer.answered]
    with_it = [a for a in answers if answer.asked <= a.asked and a.answered <= answer.answered]
    span = answer.answered - answer.asked
    without = [a for a in answers if answer.asked - span <= a.asked and a.answered <= answer.asked]
    ratio = _p95(with_it) / _p95(without)
    return [
        at_most(_ARRIVES, answer.took_s, setting.limit(16, 30), " s"),
        at_most(_LOST, len(lost), 0),
        at_most(_OTHERS, ratio, 1.5) if not setting.quick else reported(_OTHERS, ratio),
        reported(_SAME_LINE, _p95(same_line)),
    ]


def _p95(answers: Sequence[Answer]) -> float:
    """Of fewer than two, which a quick run may have: what there is, or no number."""
    took = [answer.took_s for answer in answers]
    return statistics.quantiles(took, n=20)[-1] if len(took) > 1 else next(iter(took), math.nan)


# -- a link that is reset again and again -------------------------------------------------------------------

_SAME = "resets: training over them: adapter tensors that differ in a bit"
_RESETS = "resets: connections reset meanwhile"


def _resets(setting: Setting) -> Sequence[Row | Skipped]:
    """The same training twice, once through a relay that resets connections at random places."""
    steps = setting.count(60, 6)
    with Programs(setting.folder) as programs:
        data = setting.folder / "notes.txt"
        data.write_text("\n".join(private_notes("clinic", 0, 40)))
        calm, cuts = _trained(programs, "calm", data, steps, None)
        disturbed, cuts = _trained(programs, "disturbed", data, steps, random.Random(4))
    return [
        at_most(_SAME, sum(calm.get(name) != disturbed.get(name) for name in calm | disturbed), 0),
        at_least(_RESETS, cuts, setting.count(20, 2)),
    ]


def _trained(
    programs: Programs, name: str, data: Path, steps: int, rng: random.Random | None
) -> tuple[dict[str, bytes], int]:
    """The adapter that one round of so many steps published, by tensor; and how many connections were reset."""
    from safetensors.torch import load_file

    hub = programs.serve(*("--cohort", 1, "--rounds", 1, "--round-steps", steps), state=programs.folder / f"hub-{name}")
    with ExitStack() as owned:
        relay = None
        if rng is not None:
            ticket = read_join(hub.join)
            relay = owned.enter_context(CuttingRelay(ticket.hub, rng.randrange(1 << 30), 500_000))
            here = programs.folder / "relay.join"
            here.write_text(JoinString(relay.address, ticket.token).encode())
            hub = replace(hub, join=f"@{here}")
        edge = programs.edge(hub, name, data)
        done = edge.wait(300.0)
        assert done.code == 0, str(edge)
    hub.process.end(signal.SIGTERM)
    published = load_file(hub.state / "adapters" / "v1.safetensors")
    return {name: value.numpy().tobytes() for name, value in published.items()}, relay.cuts if relay is not None else 0


FAULTS = (
    Fault("3+4", "half-open links, idle and with unsent data", (*_IDLE, *_BUSY, _LEFT), _half_open),
    Fault("5", "a hub that stands still, and one whose computation does", (_STOPPED, _RESUMED, _STUCK), _stands_still),
    Fault("6", "16 MB at 10 Mbit/s", (_ARRIVES, _LOST, _OTHERS, _SAME_LINE), _thin_line),
    Fault("resets", "a link that is reset again and again", (_SAME, _RESETS), _resets),
)
