"""The scheduler: hears events, changes its state, answers with actions.

One optimizer step of B takes one step of every active member: all smashed states in, one joined forward, all
gradients in, one joined backward. Inference is served between these, in batches of whatever waits.
"""

from __future__ import annotations

from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.scheduler.state import Member, Phase, State
from messaging.errors import ErrorCode


class Scheduler:
    """`handle(event)` returns the actions that follow from it."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._out: list[act.Action] = []
        if state.rounds and state.round >= state.rounds:
            state.phase = Phase.OVER

    def handle(self, event: ev.Event) -> list[act.Action]:
        """Take note of one event; the actions are to be carried out in order."""
        self._out = []
        match event:
            case ev.EdgeJoined():
                self._joined(event)
            case ev.EdgeLeft():
                self._left(event)
            case ev.EdgeGone():
                self._gone(event)
            case ev.EdgeFellSilent():
                self._silent(event)
            case ev.EdgeCameBack():
                self._back(event)
            case ev.SmashedReceived():
                self._smashed(event)
            case ev.GradientReceived():
                self._gradient(event)
            case ev.InferReceived():
                self.state.infers.append((event.session, event.request, event.payload))
            case ev.StreamClosed():
                self.state.freeing.append((event.session, event.stream))
            case ev.AdapterUploaded():
                self._uploaded(event)
            case ev.RoundAwaited():
                self._awaited(event)
            case ev.ForwardDone():
                self._forward_done(event)
            case ev.BackwardDone():
                self._backward_done(event)
            case ev.InferDone():
                self.state.busy = False
                self._out += [act.AnswerInfer(*answer) for answer in event.answers]
            case ev.RoundPublished():
                self._published(event)
            case ev.HousekeepingDone():
                self.state.busy = False
        self._dispatch()
        return self._out

    # -- who is here -----------------------------------------------------------------------------

    def _joined(self, event: ev.EdgeJoined) -> None:
        if not event.train:
            return
        state = self.state
        state.members[event.session] = Member(event.session, event.name, applied=event.applied)
        if state.phase is Phase.GATHERING:
            here = len(state.active)
            self._note(f"{event.name} joined ({here} of {state.cohort} edges)")
            if here >= state.cohort:
                state.phase = Phase.FORWARD
        else:
            self._note(f"{event.name} joined")

    def _left(self, event: ev.EdgeLeft) -> None:
        member = self.state.members.get(event.session)
        if member is None or member.left:
            return
        member.left = True
        member.smashed = None
        if not event.done:
            member.contributes = False
        self._note(f"{member.name} {'has taken all its steps' if event.done else 'left'}")
        self._close_if_nobody_is_left()

    def _gone(self, event: ev.EdgeGone) -> None:
        member = self.state.members.pop(event.session, None)
        self.state.infers = [item for item in self.state.infers if item[0] != event.session]
        self.state.awaiting = [item for item in self.state.awaiting if item[0] != event.session]
        self.state.freeing.append((event.session, 0))
        if member is not None and not member.left:
            self._note(f"{member.name} is gone")
            self._close_if_nobody_is_left()

    def _silent(self, event: ev.EdgeFellSilent) -> None:
        member = self.state.members.get(event.session)
        if member is None or member.silent or member.left:
            return
        member.silent = True
        member.contributes = False
        self._note(f"{member.name} is silent: going on without it")
        self._close_if_nobody_is_left()

    def _back(self, event: ev.EdgeCameBack) -> None:
        member = self.state.members.get(event.session)
        if member is not None and member.silent:
            member.silent = False
            self._note(f"{member.name} is back")

    def _close_if_nobody_is_left(self) -> None:
        state = self.state
        if state.phase in (Phase.GATHERING, Phase.OVER) or state.active:
            return
        if state.round_step and not state.joined:
            state.phase = Phase.CLOSING
        elif not state.round_step and not state.joined:
            state.phase = Phase.GATHERING

    # -- one step of B -----------------------------------------------------------------------------

    def _smashed(self, event: ev.SmashedReceived) -> None:
        member = self._member(event.session, event.request)
        if member is None:
            return
        if self.state.phase is Phase.OVER:
            self._refuse(event.session, event.request, ErrorCode.TRAINING_OVER, "the hub has closed its last round")
            return
        member.smashed = (event.request, event.step, event.payload)

    def _gradient(self, event: ev.GradientReceived) -> None:
        member = self._member(event.session, event.request)
        if member is None:
            return
        if member.inside != event.step or event.session not in self.state.joined:
            text = f"step {event.step} was closed without this edge (silent for longer than the hub's --grace)"
            self._refuse(event.session, event.request, ErrorCode.BEHIND, text)
            return
        member.gradient = (event.request, event.step, event.payload)

    def _member(self, session: int, request: int) -> Member | None:
        member = self.state.members.get(session)
        if member is None or member.left:
            self._refuse(session, request, ErrorCode.NO_SESSION, "this session does not train")
            return None
        return member

    def _forward_done(self, event: ev.ForwardDone) -> None:
        state = self.state
        state.busy = False
        state.phase = Phase.BACKWARD
        inside = []
        for session, (request, step) in state.answering.items():
            answer = event.answers[session]
            if isinstance(answer, Exception):
                state.joined = tuple(s for s in state.joined if s != session)
            elif session in state.members:
                inside.append(session)
                state.members[session].inside = step
            self._out.append(act.AnswerForward(session, request, step, answer))
        state.joined = tuple(inside)
        state.answering = {}

    def _backward_done(self, event: ev.BackwardDone) -> None:
        state = self.state
        state.busy = False
        state.hub_step += 1
        state.round_step += 1
        closes = state.round_step >= state.round_steps
        for session, (request, step) in state.answering.items():
            member = state.members.get(session)
            if member is not None:
                member.applied, member.contributes = step + 1, not member.silent
            self._out.append(act.AnswerBackward(session, request, step, event.answers[session], state.hub_step, closes))
        for member in state.members.values():
            member.inside = None
        state.answering, state.joined = {}, ()
        state.phase = Phase.CLOSING if closes else Phase.FORWARD
        self._close_if_nobody_is_left()

    # -- rounds ------------------------------------------------------------------------------------

    def _uploaded(self, event: ev.AdapterUploaded) -> None:
        member = self.state.members.get(event.session)
        if member is not None and event.round == self.state.round:
            member.upload = event.payload

    def _awaited(self, event: ev.RoundAwaited) -> None:
        state = self.state
        if event.round < state.round or state.phase is Phase.OVER:
            self._answer_round(event.session, event.request)
        else:
            state.awaiting.append((event.session, event.request, event.round))

    def _published(self, event: ev.RoundPublished) -> None:
        state = self.state
        state.busy = False
        state.version = event.version
        state.round += 1
        state.round_step = 0
        over = bool(state.rounds) and state.round >= state.rounds
        self._note(f"round {state.round} published as adapter version {state.version}")
        for member in list(state.members.values()):
            member.upload, member.contributes = None, False
            if member.left:
                del state.members[member.session]
        state.phase = Phase.OVER if over else (Phase.FORWARD if state.active else Phase.GATHERING)
        for session, request, _ in state.awaiting:
            self._answer_round(session, request)
        state.awaiting = []
        if over:
            for member in state.active:
                if member.smashed is not None:
                    self._refuse(member.session, member.smashed[0], ErrorCode.TRAINING_OVER, "no more rounds")
                    member.smashed = None
            self._note("training is over: serving generation")

    def _answer_round(self, session: int, request: int) -> None:
        state = self.state
        self._out.append(act.AnswerRound(session, request, state.version, state.round, state.phase is Phase.OVER))

    # -- what to compute next ----------------------------------------------------------------------

    def _dispatch(self) -> None:
        state = self.state
        if state.busy or state.stopping:
            return
        training = self._next_training()
        if state.freeing:
            action: act.Compute | None = act.FreeStreams(tuple(state.freeing))
            state.freeing = []
        elif state.infers and (training is None or not state.inferred_last):
            action = act.RunInfer(tuple(state.infers))
            state.infers, state.inferred_last = [], True
        else:
            action = training
            state.inferred_last = False
            if action is not None:
                self._begin(action)
        if action is not None:
            state.busy = True
            self._out.append(action)

    def _next_training(self) -> act.Compute | None:
        """The training action that can begin now. Changes nothing."""
        state = self.state
        if state.phase is Phase.FORWARD:
            active = state.active
            if active and all(member.smashed is not None for member in active):
                return act.RunForward(tuple((m.session, m.smashed[2]) for m in active if m.smashed is not None))
        if state.phase is Phase.BACKWARD:
            waited = [state.members[s] for s in state.joined if s in state.members]
            if all(m.gradient is not None or not m.active for m in waited):
                return act.RunBackward({m.session: m.gradient[2] for m in waited if m.gradient is not None})
        if state.phase is Phase.CLOSING:
            wanted = [m for m in state.members.values() if m.contributes]
            if all(m.upload is not None for m in wanted):
                ordered = sorted(wanted, key=lambda m: (m.name, m.session))
                return act.CloseRound(state.round, state.version + 1, tuple(m.upload for m in ordered))
        return None

    def _begin(self, action: act.Compute) -> None:
        """Note which requests the training action will answer."""
        state = self.state
        if isinstance(action, act.RunForward):
            for session, _ in action.payloads:
                member = state.members[session]
                assert member.smashed is not None
                state.answering[session] = member.smashed[:2]
                member.smashed = None
            state.joined = tuple(session for session, _ in action.payloads)
        elif isinstance(action, act.RunBackward):
            for session in action.gradients:
                member = state.members[session]
                assert member.gradient is not None
                state.answering[session] = member.gradient[:2]
                member.gradient = None

    def _refuse(self, session: int, request: int, code: ErrorCode, text: str) -> None:
        self._out.append(act.Refuse(session, request, code, text))

    def _note(self, text: str) -> None:
        self._out.append(act.Note(text))
