"""What to compute next: rules that read the state from top to bottom."""

from __future__ import annotations

from hub.scheduler import actions as act
from hub.scheduler.state import Member, Phase, State

#: With fewer sessions than this, all that wait are served in one batch.
_FEW = 4
#: A piece of a prompt is so many times as large while no other session generates.
_ALONE = 4


def next_compute(state: State) -> act.Compute | None:
    """The action that goes first: ending a step, freeing memory, inference and training in turn. Changes nothing."""
    training = _next_training(state)
    if isinstance(training, act.ApplyStep):
        # It is short, and the edges wait for what it answers.
        return training
    if state.freeing:
        return act.FreeStreams(tuple(state.freeing))
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
    if state.phase is Phase.STEPPING:
        return _step(state)
    if state.phase is Phase.CLOSING:
        return _close(state)
    return None


def _forward(state: State) -> act.RunForward | None:
    active = state.active
    here = [member for member in active if 0 in member.smashed]
    enough = state.quorum if state.quorum and state.deadline_over else len(active)
    if not here or len(here) < min(enough, len(active)):
        return None
    return act.RunForward(tuple((m.session, m.smashed[0].payload) for m in here), state.checkpoint_due)


def _step(state: State) -> act.RunForward | act.RunBackward | act.ApplyStep | None:
    """The next micro-batch of the joined step: backwards first, which free memory. At its end the optimizer."""
    inside, forward, backward = state.inside, state.forwards, state.backwards
    if all(member.micros <= backward for member in inside):
        return act.ApplyStep(tuple(member.session for member in inside))
    if backward < forward and not lacking_gradient(state):
        given = {m.session: m.gradients[backward].payload for m in inside if m.micros > backward}
        return act.RunBackward(given, backward)
    asked = [member for member in inside if member.micros > forward]
    if asked and not lacking_smashed(state):
        return act.RunForward(tuple((m.session, m.smashed[forward].payload) for m in asked), micro=forward)
    return None


def lacking_smashed(state: State) -> list[Member]:
    """Who has yet to send the smashed states of the joined step's next micro-batch."""
    at = state.forwards
    return [member for member in state.inside if member.micros > at and at not in member.smashed]


def lacking_gradient(state: State) -> list[Member]:
    """Who has yet to send the gradient of the joined step's next micro-batch, once its forward was begun."""
    at = state.backwards
    inside = state.inside if at < state.forwards else []
    return [member for member in inside if member.micros > at and at not in member.gradients]


def given_up(state: State) -> list[Member]:
    """Members of the joined step that the others go on without: only some that are away are still waited for."""
    if state.phase is not Phase.STEPPING:
        return []
    both = (lacking_smashed(state), lacking_gradient(state))
    return [member for lacking in both if not any(m.active for m in lacking) for member in lacking]


def _close(state: State) -> act.CloseRound | None:
    if not round_is_ready(state) or (state.joint and not state.closes):
        return None
    wanted = sorted((m for m in state.members.values() if m.contributes), key=lambda m: (m.name, m.session))
    return act.CloseRound(state.round, state.version + 1, tuple(m.upload for m in wanted))


def round_is_ready(state: State) -> bool:
    """Whether every adapter that is wanted for the round that closes is here."""
    return all(m.upload is not None for m in state.members.values() if m.contributes)


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
            _begin_forward(state, action)
        case act.RunBackward():
            state.inferred_last = False
            state.backwards = action.micro + 1
            for session in action.gradients:
                asked = state.members[session].gradients.pop(action.micro)
                state.answering[session] = (asked.request, asked.step, asked.micro)
        case act.ApplyStep():
            state.applying = action.sessions
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


def _begin_forward(state: State, action: act.RunForward) -> None:
    if action.micro == 0:
        state.phase, state.checkpoint_due = Phase.STEPPING, False
        state.deadline_runs = state.deadline_over = False
        state.joined, state.backwards = tuple(session for session, _ in action.payloads), 0
    state.forwards = action.micro + 1
    for session, _ in action.payloads:
        member = state.members[session]
        asked = member.smashed.pop(action.micro)
        state.answering[session] = (asked.request, asked.step, asked.micro)
        if action.micro == 0:
            member.inside, member.micros, member.grads, member.last = asked.step, asked.micros, {}, 0
