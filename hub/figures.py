"""What the hub's screen and `hub status` show, gathered while it works."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from hub.monitor import EdgeRow, HubSnapshot
from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.scheduler.state import Phase
from hub.watch import Watch
from messaging.liveness import quiet_s

if TYPE_CHECKING:
    from hub.server import Server
    from hub.sessions import Session

_RECENT = 50
#: A computation is overdue after this, or after twice what the like of it took lately, a single one left aside.
_OVERDUE_S, _TIMES_LONGER, _LATELY = 10.0, 2.0, 20


class Figures:
    """Counters and recent averages; the loop's thread alone changes them."""

    def __init__(self, clock: Callable[[], float], watch: Watch) -> None:
        self._clock = clock
        self._watch = watch
        self._started = clock()
        self._training: deque[int] = deque(maxlen=_RECENT)
        self._decoding: deque[int] = deque(maxlen=_RECENT)
        self._last = (self._started, 0, 0)
        #: messages that broke the protocol
        self.refused = 0
        #: joined steps since the start
        self.steps = 0
        #: the computation under way: its kind, and when it began
        self._under_way: tuple[type, float] | None = None
        self._took: defaultdict[type, deque[float]] = defaultdict(lambda: deque(maxlen=_LATELY))

    def began(self, action: act.Compute) -> None:
        """A compute action goes to the worker."""
        self._under_way = type(action), self._clock()
        if isinstance(action, act.RunForward) and not action.micro:
            self._training.append(len(action.payloads))
        elif isinstance(action, act.RunInfer):
            self._decoding.append(len(action.requests))

    def ended(self) -> None:
        """What went to the worker is done."""
        if self._under_way is not None:
            kind, began = self._under_way
            self._took[kind].append(self._clock() - began)
        self._under_way = None

    @property
    def overdue_s(self) -> float:
        """Seconds that the computation under way has taken, once that is unusually long; else 0."""
        if self._under_way is None:
            return 0.0
        kind, began = self._under_way
        taken, usual = self._clock() - began, sorted(self._took[kind])[-2:]
        return taken if taken > max(_OVERDUE_S, _TIMES_LONGER * usual[0] if len(usual) == 2 else 0.0) else 0.0

    def stepped(self, event: ev.StepApplied) -> None:
        """B's optimizer took a step, if anybody was in it."""
        self.steps += bool(event.sessions)

    def snapshot(self, server: Server) -> HubSnapshot:
        """Everything at this moment."""
        now, state, served = self._clock(), server._scheduler.state, server._desk.served
        traffic, engine = server._transport.traffic, server._worker.engine
        then, before_in, before_out = self._last
        elapsed = max(now - then, 1e-6)
        self._last = (now, traffic.received, traffic.sent)
        return HubSnapshot(
            model=served.name,
            dtype=served.dtype,
            phase=self._watch.trouble or _phase_text(state.phase, len(state.active), state.cohort),
            first_layer=1,
            last_layer=served.num_layers - 1,
            layers=served.num_layers,
            uptime_s=now - self._started,
            adapter_version=state.version,
            round=state.round,
            rounds=state.rounds or None,
            round_step=state.round_step,
            round_steps=state.round_steps,
            hub_step=state.hub_step,
            cohort_joined=len(state.active),
            cohort_size=state.cohort,
            edges=_edges(server._sessions, now, quiet_s(len(server._sessions))),
            edges_per_step=_mean(self._training),
            sessions_per_decode=_mean(self._decoding),
            queued=len(state.infers),
            streams=engine.streams,
            kv_bytes=engine.budget.used,
            kv_budget_bytes=engine.budget.most,
            evicted=engine.evicted,
            bytes_in=traffic.received,
            bytes_out=traffic.sent,
            bytes_in_per_s=(traffic.received - before_in) / elapsed,
            bytes_out_per_s=(traffic.sent - before_out) / elapsed,
            log=server._journal.recent(),
        )


def _phase_text(phase: Phase, joined: int, cohort: int) -> str:
    if phase is Phase.GATHERING:
        return f"waiting for edges ({joined} of {cohort})"
    return {Phase.OVER: "serving generation", Phase.CLOSING: "closing the round"}.get(phase, "training")


def _edges(sessions: object, now: float, quiet_after_s: float) -> tuple[EdgeRow, ...]:
    rows: dict[str, EdgeRow] = {}
    for session in sorted(sessions, key=lambda s: (s.name, not s.train)):  # type: ignore[call-overload]
        row = _edge(session, now, quiet_after_s)
        if session.name in rows:
            first = rows[session.name]
            row = EdgeRow(**{**vars(first), "sessions": first.sessions + 1})
        rows[session.name] = row
    return tuple(rows.values())


def _edge(session: Session, now: float, quiet_after_s: float) -> EdgeRow:
    ping, quiet = session.ping, now - session.heard_at
    return EdgeRow(
        name=session.name,
        partition="{}:{}".format(*session.partition),
        state="silent" if quiet > quiet_after_s else (ping.state if ping else "joined"),
        tokens_per_s=ping.tokens_per_s if ping else None,
        round_trip_ms=ping.round_trip_ms if ping else None,
        loss=ping.loss if ping else None,
        noise_sigma=ping.noise_sigma if ping else None,
        noise_r=ping.noise_r if ping else None,
        sessions=1,
        silent_s=quiet,
    )


def _mean(values: deque[int]) -> float | None:
    return sum(values) / len(values) if values else None
