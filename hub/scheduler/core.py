"""The scheduler: hears events, changes its state, answers with actions.

One optimizer step of B takes one step of every active member, micro-batch by micro-batch: all smashed states in, one
joined forward, all gradients in, one joined backward; then the optimizer. A step counts wholly or not at all.
Inference is served between these, in batches of whatever waits.
"""

from __future__ import annotations

from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.scheduler import plan
from hub.scheduler.state import Asked, HiddenGiven, Member, Phase, State, StepTaken
from messaging.errors import ROUND_CLOSES, ErrorCode

#: What a member is told that was too late for the last step of a round which it took steps of.
_CLOSING = (ErrorCode.BEHIND, "the round closes: upload the adapter", ROUND_CLOSES)


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
            case ev.StepApplied():
                self._step_applied(event)
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
        self._give_up_who_is_away()
        self._forget_who_left()
        self._dispatch()
        self._watch_deadline()
        return self._out

    # -- who is here -----------------------------------------------------------------------------

    def _joined(self, event: ev.EdgeJoined) -> None:
        if not event.train:
            return
        state = self.state
        state.members[event.session] = Member(event.session, event.name, applied=event.applied)
        here = f" ({len(state.active)} of {state.cohort} edges)" if state.phase is Phase.GATHERING else ""
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
        state.awaiting = [item for item in state.awaiting if item[0] != session]
        state.freeing.append((session, 0))

    def _left(self, event: ev.EdgeLeft) -> None:
        member = self.state.members.get(event.session)
        if member is None or member.left:
            return
        member.left = True
        self._refuse_smashed(member, ErrorCode.NO_SESSION, "this session has left")
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
        if state.phase is Phase.GATHERING and len(state.active) >= state.cohort:
            state.phase = Phase.CLOSING if state.round_step >= state.round_steps else Phase.FORWARD

    def _when_nobody_is_active(self) -> None:
        """No step can be taken: close the round for those who wait for it, or gather a cohort again.

        A round that nobody's adapter is in stays open, and silent members are waited for.
        """
        state = self.state
        if state.active or state.joined or state.phase in (Phase.CLOSING, Phase.OVER):
            return
        if state.round_step and (state.awaiting or any(member.contributes for member in state.members.values())):
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

    def _watch_deadline(self) -> None:
        """It runs from when the first member's smashed states wait to be joined."""
        state = self.state
        waits = state.phase is Phase.FORWARD and any(0 in member.smashed for member in state.active)
        if waits and state.quorum and not state.deadline_runs:
            state.gathering, state.deadline_runs, state.deadline_over = state.gathering + 1, True, False
            self._out.append(act.StartDeadline(state.gathering))
        elif not waits:
            state.deadline_runs = state.deadline_over = False

    # -- one step of B -----------------------------------------------------------------------------

    def _smashed(self, event: ev.SmashedReceived) -> None:
        member = self._member(event.session, event.request)
        if member is None:
            return
        if self.state.phase is Phase.OVER:
            self._refuse(event.session, event.request, ErrorCode.TRAINING_OVER, "the hub has closed its last round")
            return
        given = member.hiddens.get(event.step, {}).get(event.micro)
        if given is not None and given.answers(event.digest):
            self._answer_forward(member, event.request, event.step, event.micro, given.answer)
            return
        if event.step < member.applied:
            text = f"step {event.step} is applied already: this edge is at step {member.applied}"
            self._refuse(event.session, event.request, ErrorCode.BEHIND, text)
            return
        if self._has_to_upload(member):
            self._refuse(member.session, event.request, *_CLOSING)
        elif event.micro == 0:
            self._begins(member, event)
        else:
            self._goes_on(member, event)

    def _has_to_upload(self, member: Member) -> bool:
        """Whether the round closes, and wants the adapter of a member that was too late to hear of it in a step."""
        return self.state.phase is Phase.CLOSING and member.contributes and member.upload is None

    def _begins(self, member: Member, event: ev.SmashedReceived) -> None:
        """The first micro-batch of a step. What is there of an earlier try is given up, unless it is just computed."""
        under_way = self._forward_under_way(member, event.step, 0)
        if member.inside is not None and not under_way and member.session not in self.state.applying:
            self._withdraw(member)
        self._replace_smashed(member)
        member.smashed[0] = _asked(event)

    def _goes_on(self, member: Member, event: ev.SmashedReceived) -> None:
        """A later micro-batch: it belongs to a step that has begun, or it is of a try that was given up."""
        first = member.smashed.get(0)
        step, micros = (first.step, first.micros) if first is not None else (member.inside, member.micros)
        known = first is None and event.micro in member.hiddens.get(event.step, {})
        if step != event.step or micros != event.micros or known:
            if known and member.session not in self.state.applying:
                self._withdraw(member)
            text = f"step {event.step} is not under way with these bytes: begin with its first micro-batch"
            self._refuse(event.session, event.request, ErrorCode.BEHIND, text)
            return
        self._replaced(member, member.smashed.get(event.micro))
        member.smashed[event.micro] = _asked(event)

    def _gradient(self, event: ev.GradientReceived) -> None:
        member = self._member(event.session, event.request)
        if member is None:
            return
        step, micro, taken = event.step, event.micro, member.taken
        if taken is not None and taken.step == step and micro in taken.answers:
            self._answer_taken(member, event.request, micro)
        elif member.inside != step or micro not in member.hiddens.get(step, {}):
            text = f"step {step} was closed without this edge (silent for longer than the hub's --grace)"
            self._refuse(event.session, event.request, ErrorCode.BEHIND, text)
        elif micro in member.grads:
            self._answer_backward(member, event.request, micro)
        else:
            self._replaced(member, member.gradients.get(micro))
            member.gradients[micro] = Asked(event.request, step, micro, event.payload)

    def _forward_under_way(self, member: Member, step: int, micro: int) -> bool:
        """Whether this forward is computed just now."""
        asked = self.state.answering.get(member.session)
        return asked is not None and asked[1:] == (step, micro) and micro not in member.hiddens.get(step, {})

    def _withdraw(self, member: Member) -> None:
        """Take a member out of the joined step: nothing that it sent for that counts. A new try of it may wait."""
        if 0 not in member.smashed:
            self._replace_smashed(member)
        for asked in member.gradients.values():
            self._replaced(member, asked)
        if member.last:
            self._refuse_replaced(member, member.last, member.inside)
        if member.inside is not None:
            member.hiddens.pop(member.inside, None)
        member.inside, member.gradients, member.grads, member.last = None, {}, {}, 0

    def _give_up_who_is_away(self) -> None:
        if self.state.busy or self.state.stopping:
            return
        for member in plan.given_up(self.state):
            self._withdraw(member)

    def _replace_smashed(self, member: Member) -> None:
        """Refuse the forwards that wait of a try that is given up."""
        for asked in member.smashed.values():
            self._replaced(member, asked)
        member.smashed = {}

    def _answer_forward(self, member: Member, request: int, step: int, micro: int, answer: object) -> None:
        if request:
            self._out.append(act.AnswerForward(member.session, request, step, answer, micro))

    def _answer_backward(self, member: Member, request: int, micro: int) -> None:
        """Send what a backward gave; of the last micro-batch, when the step is applied."""
        assert member.inside is not None
        if micro < member.micros - 1:
            if request:
                answer = member.grads[micro]
                self._out.append(act.AnswerBackward(member.session, request, member.inside, answer, 0, False, micro))
            return
        if member.last:
            self._refuse_replaced(member, member.last, member.inside)
        member.last = request

    def _answer_taken(self, member: Member, request: int, micro: int) -> None:
        taken = member.taken
        assert taken is not None
        last = micro == len(taken.answers) - 1
        hub_step, closes = (taken.hub_step, taken.closes) if last else (0, False)
        if request:
            answer = taken.answers[micro]
            self._out.append(act.AnswerBackward(member.session, request, taken.step, answer, hub_step, closes, micro))

    def _replaced(self, member: Member, before: Asked | None) -> None:
        if before is not None:
            self._refuse_replaced(member, before.request, before.step)

    def _refuse_replaced(self, member: Member, request: int, step: int | None) -> None:
        if request:
            self._refuse(member.session, request, ErrorCode.BEHIND, f"step {step} was begun anew")

    def _member(self, session: int, request: int) -> Member | None:
        member = self.state.members.get(session)
        if member is None or member.left:
            self._refuse(session, request, ErrorCode.NO_SESSION, "this session does not train")
            return None
        return member

    def _forward_done(self, event: ev.ForwardDone) -> None:
        state = self.state
        state.busy = False
        answering, state.answering = state.answering, {}
        for session, (request, step, micro) in answering.items():
            member, answer = state.members[session], event.answers[session]
            if member.inside != step:
                self._refuse_replaced(member, request, step)
                continue
            self._answer_forward(member, request, step, micro, answer)
            if isinstance(answer, Exception):
                self._withdraw(member)
                continue
            given = HiddenGiven(event.digests.get(session, b""), answer)
            if self._taken_over(member, step, micro, given):
                member.hiddens.setdefault(step, {})[micro] = given
            else:
                self._withdraw(member)

    def _taken_over(self, member: Member, step: int, micro: int, given: HiddenGiven) -> bool:
        """Answer the process that asked the same meanwhile. False if the step was begun anew, with other bytes."""
        asked = member.smashed.get(micro)
        if asked is None or asked.step != step:
            return True
        if not given.answers(asked.digest):
            return False
        del member.smashed[micro]
        self._answer_forward(member, asked.request, step, micro, given.answer)
        return True

    def _backward_done(self, event: ev.BackwardDone) -> None:
        state = self.state
        state.busy = False
        answering, state.answering = state.answering, {}
        for session, (request, step, micro) in answering.items():
            member, answer = state.members[session], event.answers[session]
            if member.inside != step:
                self._refuse_replaced(member, request, step)
                continue
            again = member.gradients.pop(micro, None)
            if isinstance(answer, Exception):
                if request:
                    self._out.append(act.AnswerBackward(session, request, step, answer, 0, False, micro))
                self._replaced(member, again)
                self._withdraw(member)
                continue
            member.grads[micro] = answer
            self._answer_backward(member, request, micro)
            if again is not None:
                self._answer_backward(member, again.request, micro)

    def _step_applied(self, event: ev.StepApplied) -> None:
        state = self.state
        state.busy = False
        if event.sessions:
            state.hub_step += 1
            state.round_step += 1
        closes = state.round_step >= state.round_steps
        for session in state.applying:
            member = state.members.get(session)
            if member is not None and member.inside is not None:
                self._applied(member, StepTaken(member.inside, member.grads, state.hub_step, closes))
        state.joined, state.applying = (), ()
        state.phase = Phase.CLOSING if closes else Phase.FORWARD
        for member in state.members.values():
            if self._has_to_upload(member):
                self._refuse_smashed(member, *_CLOSING)
        self._when_nobody_is_active()

    def _applied(self, member: Member, taken: StepTaken) -> None:
        """Note that a member's step is inside B's adapter; answer who waits for that."""
        request, member.last = member.last, 0
        member.inside, member.gradients, member.grads = None, {}, {}
        member.applied, member.taken = taken.step + 1, taken
        member.hiddens = {step: hiddens for step, hiddens in member.hiddens.items() if step >= taken.step}
        member.contributes = member.contributes or member.active
        if member.active:
            # What it uploaded before lacks this step: it uploads again when the round closes.
            member.upload = None
        self._answer_taken(member, request, member.micros - 1)
        if any(asked.step <= taken.step for asked in member.smashed.values()):
            self._replace_smashed(member)

    def _infer_done(self, event: ev.InferDone) -> None:
        state = self.state
        state.busy = False
        wanted, state.inferring = set(state.inferring), []
        self._out += [act.AnswerInfer(*answer) for answer in event.answers if answer[:2] in wanted]

    # -- rounds ------------------------------------------------------------------------------------

    def _uploaded(self, event: ev.AdapterUploaded) -> None:
        state, member = self.state, self.state.members.get(event.session)
        if member is not None and event.round == state.round and state.round_step:
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
            self._refuse(event.session, event.request, ErrorCode.BEHIND, "this round is not closing yet: go on")
        else:
            state.awaiting.append((event.session, event.request, event.round))
            self._when_nobody_is_active()

    def _published(self, event: ev.RoundPublished) -> None:
        state = self.state
        state.busy = False
        state.version = event.version
        state.round += 1
        state.round_step = 0
        over = bool(state.rounds) and state.round >= state.rounds
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

    def _begin_round(self) -> None:
        """A forward that waited for the publication was made with the adapter before it: it is asked for anew."""
        for member in self.state.members.values():
            self._refuse_smashed(member, ErrorCode.BEHIND, "a round was published meanwhile")

    def _end_training(self) -> None:
        for member in self.state.members.values():
            self._refuse_smashed(member, ErrorCode.TRAINING_OVER, "no more rounds")
        self._answer_awaiting(self.state.round)
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

    def _refuse_smashed(self, member: Member, code: ErrorCode, text: str, detail: int = 0) -> None:
        """Refuse the forwards that wait."""
        for asked in member.smashed.values():
            self._refuse(member.session, asked.request, code, text, detail)
        member.smashed = {}

    def _refuse(self, session: int, request: int, code: ErrorCode, text: str, detail: int = 0) -> None:
        self._out.append(act.Refuse(session, request, code, text, detail))

    def _note(self, text: str) -> None:
        self._out.append(act.Note(text))


def _asked(event: ev.SmashedReceived) -> Asked:
    return Asked(event.request, event.step, event.micro, event.payload, event.micros, event.digest)
