"""When several groups begin and close a round: rules over the states of their schedulers, which change nothing."""

from __future__ import annotations

from collections.abc import Sequence

from hub.scheduler.plan import round_is_ready
from hub.scheduler.state import Phase, State


def may_close(states: Sequence[State]) -> bool:
    """Whether the open round may close: somebody has trained in it, and nobody takes a step or uploads any more.

    A group that has nobody, or only silent edges whose adapters are not to come, holds nobody up.
    """
    return any(_ready(state) for state in states) and all(_ready(state) or idle(state) for state in states)


def _ready(state: State) -> bool:
    return state.phase is Phase.CLOSING and round_is_ready(state)


def idle(state: State) -> bool:
    """Whether no step is under way in a group and none is to come."""
    return state.phase in (Phase.GATHERING, Phase.FORWARD) and not state.active and not state.joined


def elsewhere(states: Sequence[State], group: int) -> int:
    """How many members of the cohort the other groups have; all that are needed where one of these has begun."""
    others = [state for number, state in enumerate(states) if number != group]
    if any(state.active and state.phase is not Phase.GATHERING for state in others):
        return states[group].cohort
    return sum(len(state.active) for state in others)
