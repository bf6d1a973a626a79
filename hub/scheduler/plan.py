"""What to compute next: rules that read the state from top to bottom."""

from __future__ import annotations

from hub.scheduler import actions as act
from hub.scheduler.state import Member, Phase, State


def next_compute(state: State) -> act.Compute | None:
    """The action that goes first: freeing memory, then inference and training in turn. Changes nothing."""
    if state.freeing:
        return act.FreeStreams(tuple(state.freeing))
    training = _next_training(state)
    if state.infers and (training is None or not state.inferred_last):
        return act.RunInfer(tuple(state.infers))
    return training


def _next_training(state: State) -> act.Compute | None:
    if state.phase is Phase.FORWARD:
        return _forward(state)
    if state.phase is Phase.BACKWARD:
        return _backward(state)
    if state.phase is Phase.CLOSING:
        return _close(state)
    return None


def _forward(state: State) -> act.RunForward | None:
    active = state.active
    if not active or any(member.smashed is None for member in active):
        return None
    return act.RunForward(tuple((m.session, m.smashed[2]) for m in active if m.smashed is not None))


def _backward(state: State) -> act.RunBackward | None:
    waited = [m for m in _joined(state) if m.inside is not None]
    if any(m.gradient is None and m.active for m in waited):
        return None
    return act.RunBackward({m.session: m.gradient[2] for m in waited if m.gradient is not None})


def _close(state: State) -> act.CloseRound | None:
    wanted = sorted((m for m in state.members.values() if m.contributes), key=lambda m: (m.name, m.session))
    if any(m.upload is None for m in wanted):
        return None
    return act.CloseRound(state.round, state.version + 1, tuple(m.upload for m in wanted))


def _joined(state: State) -> list[Member]:
    return [state.members[session] for session in state.joined if session in state.members]


def begin(state: State, action: act.Compute) -> None:
    """Note that an action is under way, and which requests it will answer."""
    state.busy = True
    match action:
        case act.FreeStreams():
            state.freeing = []
        case act.RunInfer():
            state.inferring = [(session, request) for session, request, _ in state.infers]
            state.infers, state.inferred_last = [], True
        case act.RunForward():
            state.inferred_last = False
            state.joined = tuple(session for session, _ in action.payloads)
            for member in _joined(state):
                assert member.smashed is not None
                state.answering[member.session] = member.smashed[:2]
                member.smashed = None
        case act.RunBackward():
            state.inferred_last = False
            for member in _joined(state):
                # The step is closed now, with or without this member's gradient.
                member.inside = None
                if member.gradient is not None:
                    state.answering[member.session] = member.gradient[:2]
                    member.gradient = None
        case act.CloseRound():
            state.inferred_last = False
