"""Who is silent, who is back, and whom the cohort waits for: told once in the log, and on the screen as it lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from hub.scheduler.plan import lacking_gradient, lacking_smashed
from hub.scheduler.state import Phase, State
from hub.sessions import Session
from messaging.console import Journal
from messaging.console.figures import duration
from messaging.liveness import edge_silent_s

#: How long the others wait until it is said for whom.
_WAITED_S = 5.0
_MOST_NAMES = 3


class Watch:
    """Looks at sessions and cohort every now and then; the loop's thread alone does."""

    def __init__(self, journal: Journal, clock: Callable[[], float]) -> None:
        self._journal = journal
        self._clock = clock
        #: when each session that is silent was last heard, and its name
        self._silent: dict[int, tuple[float, str]] = {}
        #: in each group: the step and phase in which some wait for others, since when, and for whom
        self._waits: dict[int, tuple[object, float, tuple[str, ...]]] = {}
        self._busy_s = 0.0
        self._busy_told = False

    def look(self, sessions: Iterable[Session], states: Sequence[State], busy_s: float) -> None:
        """What has changed since the last look, in each group's state.

        `busy_s`: how long an overdue computation has taken, 0 for none.
        """
        now, here = self._clock(), list(sessions)
        limit = edge_silent_s(len(here))
        for session in here:
            self._look_at(session, now, limit)
        for number in self._silent.keys() - {session.number for session in here}:
            del self._silent[number]
        for group, state in enumerate(states):
            self._look_at_cohort(group, state, now)
        self._look_at_compute(busy_s)

    @property
    def trouble(self) -> str:
        """What holds the cohort up, for the screen; empty when nothing does."""
        if self._busy_s:
            return f"busy with one computation for {duration(self._busy_s)}"
        since, names = min(((since, names) for _, since, names in self._waits.values() if names), default=(0.0, ()))
        waited = self._clock() - since
        if not names or waited < _WAITED_S:
            return ""
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        return f"waiting for {', '.join(names[:_MOST_NAMES])}{more} since {duration(waited)}"

    def _look_at(self, session: Session, now: float, limit: float) -> None:
        quiet = now - session.heard_at
        before = self._silent.get(session.number)
        if quiet > limit:
            if before is None:
                self._silent[session.number] = (session.heard_at, session.name)
                self._journal.log(f"{session.name} silent for {duration(quiet)}")
        elif before is not None:
            del self._silent[session.number]
            self._journal.log(f"{session.name} is back after {duration(session.heard_at - before[0])}")

    def _look_at_cohort(self, group: int, state: State, now: float) -> None:
        where = (state.phase, state.hub_step, state.round)
        names = laggards(state)
        before = self._waits.get(group, (None, now, ()))
        self._waits[group] = (where, before[1] if before[0] == where and before[2] else now, names)

    def _look_at_compute(self, busy_s: float) -> None:
        if busy_s and not self._busy_told:
            self._journal.log(f"the computation under way takes unusually long: {duration(busy_s)} so far")
        elif self._busy_told and not busy_s:
            self._journal.log(f"the computation is done after {duration(self._busy_s)} or more")
        self._busy_s, self._busy_told = busy_s, bool(busy_s)


def laggards(state: State) -> tuple[str, ...]:
    """The members that others of the cohort wait for now, by name; empty while nobody waits, or the hub computes."""
    if state.busy:
        return ()
    active = state.active
    match state.phase:
        case Phase.FORWARD:
            here, asked = [m for m in active if 0 in m.smashed], active
        case Phase.STEPPING:
            lacking = {m.session for m in (*lacking_gradient(state), *lacking_smashed(state))}
            asked = [m for m in active if m.inside is not None]
            here = [m for m in asked if m.session not in lacking]
        case Phase.CLOSING:
            asked = [m for m in state.members.values() if m.contributes]
            here = [m for m in asked if m.upload is not None]
        case _:
            return ()
    ready = {member.session for member in here}
    return tuple(sorted(m.name for m in asked if m.session not in ready)) if ready else ()
