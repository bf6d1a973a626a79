"""What the hub's screen and `hub status` show, gathered while it works."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from hub.groups import Group
from hub.monitor import EdgeRow, HubSnapshot, ReplicaRow
from hub.monitor.snapshot import GONE, STARTING_AGAIN
from hub.replicas.remote import RemoteEngine
from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.scheduler.state import Phase, State
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
        #: the computation under way in each group: its kind, and when it began
        self._under_way: dict[int, tuple[type, float]] = {}
        self._took: defaultdict[type, deque[float]] = defaultdict(lambda: deque(maxlen=_LATELY))

    def began(self, action: act.Compute, group: int = 0) -> None:
        """A compute action goes to a group's worker."""
        self._under_way[group] = type(action), self._clock()
        if isinstance(action, act.RunForward) and not action.micro:
            self._training.append(len(action.payloads))
        elif isinstance(action, act.RunInfer):
            self._decoding.append(len(action.requests))

    def ended(self, group: int = 0) -> None:
        """What went to a group's worker is done."""
        if group in self._under_way:
            kind, began = self._under_way.pop(group)
            self._took[kind].append(self._clock() - began)

    @property
    def overdue_s(self) -> float:
        """Seconds that the computation under way has taken, once that is unusually long; else 0."""
        return max((self._overdue_s(*under_way) for under_way in self._under_way.values()), default=0.0)

    def _overdue_s(self, kind: type, began: float) -> float:
        taken, usual = self._clock() - began, sorted(self._took[kind])[-2:]
        return taken if taken > max(_OVERDUE_S, _TIMES_LONGER * usual[0] if len(usual) == 2 else 0.0) else 0.0

    def stepped(self, event: ev.StepApplied) -> None:
        """B's optimizer took a step, if anybody was in it."""
        self.steps += bool(event.sessions)

    def snapshot(self, server: Server) -> HubSnapshot:
        """Everything at this moment."""
        now, groups, served = self._clock(), server._groups, server._desk.served
        states, engines = [group.state for group in groups], [group.worker.engine for group in groups.running]
        # Of several groups the one that is least far says where the round is.
        state, joined = min(states, key=_how_far), sum(len(state.active) for state in states)
        traffic = server._transport.traffic
        then, before_in, before_out = self._last
        elapsed = max(now - then, 1e-6)
        self._last = (now, traffic.received, traffic.sent)
        return HubSnapshot(
            model=served.name,
            dtype=served.dtype,
            phase=self._watch.trouble or _phase_text(state.phase, joined, state.cohort),
            first_layer=1,
            last_layer=served.num_layers - 1,
            layers=served.num_layers,
            uptime_s=now - self._started,
            adapter_version=state.version,
            round=state.round,
            rounds=state.rounds or None,
            round_step=state.round_step,
            round_steps=state.round_steps,
            hub_step=sum(state.hub_step for state in states),
            cohort_joined=joined,
            cohort_size=state.cohort,
            edges=_edges(server._sessions, now, quiet_s(len(server._sessions))),
            edges_per_step=_mean(self._training),
            sessions_per_decode=_mean(self._decoding),
            queued=sum(len(state.infers) for state in states),
            streams=sum(engine.streams for engine in engines),
            kv_bytes=sum(engine.budget.used for engine in engines),
            kv_budget_bytes=sum(engine.budget.most for engine in engines),
            evicted=sum(engine.evicted for engine in engines),
            replicas=_replicas(server),
            bytes_in=traffic.received,
            bytes_out=traffic.sent,
            bytes_in_per_s=(traffic.received - before_in) / elapsed,
            bytes_out_per_s=(traffic.sent - before_out) / elapsed,
            log=server._journal.recent(),
        )


def _how_far(state: State) -> tuple[bool, bool, int]:
    """Orders groups by how far they are in the round; one that has nobody comes last."""
    return not state.active, state.phase is not Phase.GATHERING, state.round_step


def _replicas(server: Server) -> tuple[ReplicaRow, ...]:
    """A row for each replica that is a process of its own."""
    rows = []
    for group in server._groups:
        engine, mine = group.worker.engine, [s for s in server._sessions if s.group == group.number]
        if not isinstance(engine, RemoteEngine):
            continue
        rows.append(
            ReplicaRow(
                name=engine.name,
                where=engine.where,
                state=_replica_state(group),
                training=sum(s.train for s in mine),
                generating=sum(not s.train for s in mine),
                hub_step=group.state.hub_step,
                round_step=group.state.round_step,
                streams=engine.streams,
            )
        )
    return tuple(rows)


def _replica_state(group: Group) -> str:
    if group.gone or group.down:
        return GONE if group.gone else STARTING_AGAIN
    return "waiting" if group.state.phase is Phase.GATHERING else _phase_text(group.state.phase, 0, 0)


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
