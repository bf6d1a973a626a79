"""The scheduler: hears events, changes its state, answers with actions.

One optimizer step of B takes one step of every active member, micro-batch by micro-batch: all smashed states in, one
joined forward, all gradients in, one joined backward; then the optimizer. A step counts wholly or not at all.
Inference is served between these, in batches of whatever waits.
"""

from __future__ import annotations

from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.scheduler import plan
from hub.scheduler.state import Member, Phase, State, Wide
from hub.scheduler.stepping import Stepping
from messaging.errors import ErrorCode


class Scheduler:
    """`handle(event)` returns the actions that follow from it."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._out: list[act.Action] = []
        self._steps = Stepping(state, self._out)
        if state.rounds and state.round >= state.rounds:
            state.phase = Phase.OVER

    def handle(self, event: ev.Event) -> list[act.Action]:
        """Take note of one event; the actions are to be carried out in order."""
        self._out.clear()
        match event:
            case ev.EdgeJoined():
                self._joined(event)
            case ev.EdgeRestarted():
                self._restarted(event)
            case ev.EdgeLeft():
                self._left(event)
            case ev.EdgeGone():
                self._gone(event)
            case ev.EdgeFellSilent():
                self._silent(event)
            case ev.EdgeCameBack():
                self._back(event)
            case ev.SmashedReceived():
                self._steps.smashed(event)
            case ev.GradientReceived():
                self._steps.gradient(event)
            case ev.InferReceived():
                self._asked(event)
            case ev.StreamClosed():
                self.state.freeing.append((event.session, event.stream))
            case ev.AdapterUploaded():
                self._uploaded(event)
            case ev.RoundAwaited():
                self._awaited(event)
            case ev.ForwardDone():
                self._steps.forward_done(event)
            case ev.BackwardDone():
                self._steps.backward_done(event)
            case ev.StepApplied():
                self._steps.step_applied(event)
                self._when_nobody_is_active()
            case ev.InferDone():
                self._infer_done(event)
            case ev.RoundPublished():
                self._published(event)
            case ev.HousekeepingDone():
                self.state.busy = False
            case ev.DeadlinePassed():
                self.state.deadline_over = self.state.deadline_runs and event.gathering == self.state.gathering
            case ev.CheckpointDue():
                self.state.checkpoint_due = True
            case ev.OthersChanged():
                self.state.elsewhere = event.active
                self._begin_when_gathered()
            case ev.RoundCloses():
                self.state.phase, self.state.closes = Phase.CLOSING, True
            case ev.RoundReopened():
                self._reopened(event)
        self._steps.give_up_who_is_away()
        self._forget_who_left()
        self._dispatch()
        self._steps.watch_deadline()
        return list(self._out)

    # -- who is here -----------------------------------------------------------------------------

    def _joined(self, event: ev.EdgeJoined) -> None:
        if not event.train:
            return
        state = self.state
        state.members[event.session] = Member(event.session, event.name, applied=event.applied)
        gathered = len(state.active) + state.elsewhere
        here = f" ({gathered} of {state.cohort} edges)" if state.phase is Phase.GATHERING else ""
        self._note(f"{event.name} joined{here}")
        self._begin_when_gathered()

    def _restarted(self, event: ev.EdgeRestarted) -> None:
        """What is computed of it goes on; it will ask for the same again, and is answered then."""
        state, session = self.state, event.session
        self._drop_requests(session)
        member = state.members.get(session)
        if member is not None:
            member.left = False
            member.smashed, member.gradients, member.last = {}, {}, 0
            if session in state.answering:
                state.answering[session] = (0, *state.answering[session][1:])

    def _drop_requests(self, session: int) -> None:
        """Forget what a session waits for outside of its step, and free its caches."""
        state = self.state
        state.infers = [item for item in state.infers if item[0] != session]
        state.inferring = [item for item in state.inferring if item[0] != session]
        state.wide = {key: wide for key, wide in state.wide.items() if key[0] != session}
        state.awaiting = [item for item in state.awaiting if item[0] != session]
        state.freeing.append((session, 0))

    def _left(self, event: ev.EdgeLeft) -> None:
        member = self.state.members.get(event.session)
        if member is None or member.left:
            return
        member.left = True
        self._steps.refuse_smashed(member, ErrorCode.NO_SESSION, "this session has left")
        if not event.done:
            member.contributes, member.upload = False, None
        self._note(f"{member.name} {'has taken all its steps' if event.done else 'left'}")
        self._when_nobody_is_active()

    def _gone(self, event: ev.EdgeGone) -> None:
        state, session = self.state, event.session
        self._drop_requests(session)
        state.answering.pop(session, None)
        member = state.members.get(session)
        if member is None:
            return
        if not member.left:
            self._note(f"{member.name} is gone")
        if member.upload is None:
            del state.members[session]
        else:
            # What it has uploaded is whole, and belongs to steps that B's adapter has in it.
            member.left, member.smashed, member.inside = True, {}, None
            member.gradients, member.grads, member.last = {}, {}, 0
        self._when_nobody_is_active()

    def _silent(self, event: ev.EdgeFellSilent) -> None:
        member = self.state.members.get(event.session)
        if member is None or member.silent:
            return
        if member.left:
            # It has taken its steps; after a restart of the hub its adapter is still to come again.
            member.contributes = member.contributes and member.upload is not None
            return
        member.silent = True
        member.contributes = member.upload is not None
        self._note(f"{member.name} is silent: going on without it")
        self._when_nobody_is_active()

    def _back(self, event: ev.EdgeCameBack) -> None:
        member = self.state.members.get(event.session)
        if member is not None and member.silent:
            member.silent = False
            self._note(f"{member.name} is back")
            self._begin_when_gathered()

    def _begin_when_gathered(self) -> None:
        state = self.state
        if state.phase is Phase.GATHERING and state.active and len(state.active) + state.elsewhere >= state.cohort:
            state.phase = Phase.CLOSING if state.round_step >= state.round_steps else Phase.FORWARD

    def _when_nobody_is_active(self) -> None:
        """No step can be taken: close the round for those who wait for it, or gather a cohort again.

        A round that nobody's adapter is in stays open, and silent members are waited for.
        """
        state = self.state
        if state.active or state.joined or state.phase in (Phase.CLOSING, Phase.OVER):
            return
        begun = state.round_step or state.joint
        if begun and (state.awaiting or any(member.contributes for member in state.members.values())):
            state.phase = Phase.CLOSING
            return
        self._answer_awaiting(state.round)
        if all(member.left for member in state.members.values()):
            state.phase = Phase.GATHERING

    def _forget_who_left(self) -> None:
        """Drop members of whom nothing more is wanted."""
        state = self.state
        for member in list(state.members.values()):
            wanted = member.contributes or member.inside is not None or member.session in state.answering
            if member.left and not wanted:
                del state.members[member.session]

    # -- inference ---------------------------------------------------------------------------------

    def _asked(self, event: ev.InferReceived) -> None:
        state = self.state
        state.infers.append((event.session, event.request, event.payload))
        step = max(state.chunk // event.rows, 1)
        if event.columns > step:
            state.wide[event.session, event.request] = Wide(event.columns, step)

    def _infer_done(self, event: ev.InferDone) -> None:
        state = self.state
        state.busy = False
        wanted, state.inferring = set(state.inferring), []
        parted, state.parted = state.parted, None
        answered = wanted & {answer[:2] for answer in event.answers}
        state.wide = {key: wide for key, wide in state.wide.items() if key not in answered}
        if parted is not None and parted[:2] in wanted - answered:
            # The rest of it goes on before other requests of its kind.
            state.infers.insert(0, parted)
        self._out += [act.AnswerInfer(*answer) for answer in event.answers if answer[:2] in wanted]

    # -- rounds ------------------------------------------------------------------------------------

    def _uploaded(self, event: ev.AdapterUploaded) -> None:
        state, member = self.state, self.state.members.get(event.session)
        if member is not None and event.round == state.round and (state.round_step or state.joint):
            member.upload, member.contributes = event.payload, True
            # An edge that was gone and came to another seat uploads again what it uploaded from the first.
            for other in list(state.members.values()):
                if other.name == member.name and other is not member:
                    del state.members[other.session]

    def _awaited(self, event: ev.RoundAwaited) -> None:
        state = self.state
        member = state.members.get(event.session)
        closed = event.round < state.round or state.phase is Phase.OVER
        if member is not None and member.upload is None and (closed or state.phase is Phase.CLOSING):
            # Whoever awaits a round has uploaded what it has for it: there is nothing more to come.
            member.contributes = False
        if closed:
            self._answer_round(event.session, event.request)
        elif state.phase is not Phase.CLOSING and member is not None and member.active:
            # A hub that was restarted in the middle of closing takes one more step first.
            self._steps.refuse(event.session, event.request, ErrorCode.BEHIND, "this round is not closing yet: go on")
        else:
            state.awaiting.append((event.session, event.request, event.round))
            self._when_nobody_is_active()

    def _published(self, event: ev.RoundPublished) -> None:
        state = self.state
        state.busy = False
        state.version = event.version
        state.round += 1
        state.round_step, state.closes = 0, False
        over = bool(state.rounds) and state.round >= state.rounds
        if not state.joint:
            self._note(f"round {state.round} published as adapter version {state.version}")
        for member in state.members.values():
            member.upload, member.contributes = None, False
        state.phase = Phase.OVER if over else Phase.FORWARD
        self._answer_awaiting(state.round - 1)
        if over:
            self._end_training()
        else:
            self._begin_round()
            self._when_nobody_is_active()

    def _reopened(self, event: ev.RoundReopened) -> None:
        state = self.state
        state.closes = False
        if event.steps and state.phase is Phase.CLOSING:
            state.phase = Phase.FORWARD
            for session, request, _ in state.awaiting:
                if session in state.members and state.members[session].active:
                    text = "this round is not closing yet: go on"
                    self._steps.refuse(session, request, ErrorCode.BEHIND, text)
            state.awaiting = [item for item in state.awaiting if item[0] not in {m.session for m in state.active}]

    def _begin_round(self) -> None:
        """A forward that waited for the publication was made with the adapter before it: it is asked for anew."""
        for member in self.state.members.values():
            self._steps.refuse_smashed(member, ErrorCode.BEHIND, "a round was published meanwhile")

    def _end_training(self) -> None:
        for member in self.state.members.values():
            self._steps.refuse_smashed(member, ErrorCode.TRAINING_OVER, "no more rounds")
        self._answer_awaiting(self.state.round)
        if not self.state.joint:
            self._note("training is over: serving generation")

    def _answer_awaiting(self, last: int) -> None:
        """Answer those who wait for round `last` or an earlier one."""
        state = self.state
        for session, request, round_ in state.awaiting:
            if round_ <= last:
                self._answer_round(session, request)
        state.awaiting = [item for item in state.awaiting if item[2] > last]

    def _answer_round(self, session: int, request: int) -> None:
        state = self.state
        self._out.append(act.AnswerRound(session, request, state.version, state.round, state.phase is Phase.OVER))

    # -- what to compute next ----------------------------------------------------------------------

    def _dispatch(self) -> None:
        if self.state.busy or self.state.stopping:
            return
        action = plan.next_compute(self.state)
        if action is not None:
            plan.begin(self.state, action)
            self._out.append(action)

    def _note(self, text: str) -> None:
        self._out.append(act.Note(text))
