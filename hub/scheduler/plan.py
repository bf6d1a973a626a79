"""What to compute next: rules that read the state from top to bottom."""

from __future__ import annotations

from hub.scheduler import actions as act
from hub.scheduler.state import Member, Phase, State

#: With fewer sessions than this, all that wait are served in one batch.
_FEW = 4
#: A piece of a prompt is so many times as large while no other session generates.
_ALONE = 4


def next_compute(state: State) -> act.Compute | None:
    """The action that goes first: freeing memory, then inference and training in turn. Changes nothing."""
    if state.freeing:
        return act.FreeStreams(tuple(state.freeing))
    training = _next_training(state)
    if state.infers and (training is None or not state.inferred_last):
        return _inference(state)
    return training


def _inference(state: State) -> act.RunInfer:
    """The narrow requests that wait, and the next columns of the first wide one, in turn.

    Not together: whoever asks during a piece would wait for it, and then for the next one to be answered. All narrow
    ones go between two pieces, as their edges had the time of a piece.
    """
    wide = [item for item in state.infers if item[:2] in state.wide]
    narrow = [item for item in state.infers if item[:2] not in state.wide]
    if not wide:
        return act.RunInfer(_half(state, narrow))
    if narrow and not state.narrow_last:
        return act.RunInfer(tuple(narrow))
    key, how = wide[0][:2], state.wide[wide[0][:2]]
    # A session that generates alone makes nobody wait but who comes just now.
    alone = not narrow and state.inferred_lately() <= {key[0]}
    step = how.step * (_ALONE if alone else 1)
    return act.RunInfer((wide[0],), {key: min(how.have + step, how.columns)})


def _half(state: State, waiting: list[tuple[int, int, object]]) -> tuple[tuple[int, int, object], ...]:
    """Of the requests that wait, those of at most half of the sessions that generate now.

    So there are two batches on their way: while the hub computes one, the edges work on the other. In a single one
    all would wait for the hub, and then the hub for all of them.
    """
    sessions = dict.fromkeys(session for session, _, _ in waiting)
    generating = len(sessions.keys() | state.inferred_lately())
    most = generating if generating < _FEW else -(-generating // 2)
    chosen = set(list(sessions)[:most])
    return tuple(item for item in waiting if item[0] in chosen)


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
    payloads = tuple((m.session, m.smashed[2]) for m in active if m.smashed is not None)
    return act.RunForward(payloads, state.checkpoint_due)


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
            state.inferring = [(session, request) for session, request, _ in action.requests]
            state.infers = [item for item in state.infers if item[:2] not in state.inferring]
            _advance(state, action)
            # Training waits until what was begun is whole: else a prompt would wait for a step at each of its pieces.
            state.inferred_last = not any(0 < wide.have < wide.columns for wide in state.wide.values())
            state.recent = (frozenset(session for session, _ in state.inferring), *state.recent[:1])
        case act.RunForward():
            state.inferred_last = False
            state.checkpoint_due = False
            state.joined = tuple(session for session, _ in action.payloads)
            for member in _joined(state):
                assert member.smashed is not None
                state.answering[member.session] = member.smashed[:2]
                member.smashed = None
        case act.RunBackward():
            state.inferred_last = False
            for member in _joined(state):
                # The step is closed now, with or without this member's gradient.
                inside, member.inside = member.inside, None
                if member.gradient is None and inside is not None:
                    member.hiddens.pop(inside, None)
                if member.gradient is not None:
                    state.answering[member.session] = member.gradient[:2]
                    member.gradient = None
        case act.CloseRound():
            state.inferred_last = False


def _advance(state: State, action: act.RunInfer) -> None:
    """Note how far the wide request of an action comes, if it has one."""
    state.narrow_last = not action.upto
    for key, upto in action.upto.items():
        wide = state.wide[key]
        wide.have = upto
        if upto < wide.columns:
            (state.parted,) = action.requests
