"""One step of B: what becomes of forwards and backwards, micro-batch by micro-batch, and of who drops out of it."""

from __future__ import annotations

from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.scheduler import plan
from hub.scheduler.state import Asked, HiddenGiven, Member, Phase, State, StepTaken
from messaging.errors import ROUND_CLOSES, ErrorCode

#: What a member is told that was too late for the last step of a round which it took steps of.
_CLOSING = (ErrorCode.BEHIND, "the round closes: upload the adapter", ROUND_CLOSES)


class Stepping:
    """Takes note of what steps are made of, in the scheduler's `state`; its answers go to the end of `out`."""

    def __init__(self, state: State, out: list[act.Action]) -> None:
        self.state = state
        self._out = out

    def smashed(self, event: ev.SmashedReceived) -> None:
        """A forward is asked for: answered from the record, noted, or refused."""
        member = self._member(event.session, event.request)
        if member is None:
            return
        if self.state.phase is Phase.OVER:
            self.refuse(event.session, event.request, ErrorCode.TRAINING_OVER, "the hub has closed its last round")
            return
        given = member.hiddens.get(event.step, {}).get(event.micro)
        if given is not None and given.answers(event.digest):
            self._answer_forward(member, event.request, event.step, event.micro, given.answer)
            return
        if event.step < member.applied:
            text = f"step {event.step} is applied already: this edge is at step {member.applied}"
            self.refuse(event.session, event.request, ErrorCode.BEHIND, text)
            return
        if self._has_to_upload(member):
            self.refuse(member.session, event.request, *_CLOSING)
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
            self.refuse(event.session, event.request, ErrorCode.BEHIND, text)
            return
        self._replaced(member, member.smashed.get(event.micro))
        member.smashed[event.micro] = _asked(event)

    def gradient(self, event: ev.GradientReceived) -> None:
        """A backward is asked for: answered from the record, noted, or refused."""
        member = self._member(event.session, event.request)
        if member is None:
            return
        step, micro, taken = event.step, event.micro, member.taken
        if taken is not None and taken.step == step and micro in taken.answers:
            self._answer_taken(member, event.request, micro)
        elif member.inside != step or micro not in member.hiddens.get(step, {}):
            text = f"step {step} was closed without this edge (silent for longer than the hub's --grace)"
            self.refuse(event.session, event.request, ErrorCode.BEHIND, text)
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

    def give_up_who_is_away(self) -> None:
        """Go on without members that are away, where nobody else is waited for."""
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
            self.refuse(member.session, request, ErrorCode.BEHIND, f"step {step} was begun anew")

    def _member(self, session: int, request: int) -> Member | None:
        member = self.state.members.get(session)
        if member is None or member.left:
            self.refuse(session, request, ErrorCode.NO_SESSION, "this session does not train")
            return None
        return member

    def forward_done(self, event: ev.ForwardDone) -> None:
        """Answer the joined forward's edges, and keep the answers."""
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

    def backward_done(self, event: ev.BackwardDone) -> None:
        """Answer the joined backward's edges, but for those whose last micro-batch this was."""
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

    def step_applied(self, event: ev.StepApplied) -> None:
        """Count the step, answer who waited for it, and see whether the round closes."""
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
            if any(asked.step < member.applied for asked in member.smashed.values()):
                # Begun anew meanwhile, perhaps from another seat: it is taken.
                self._replace_smashed(member)
            elif self._has_to_upload(member):
                self.refuse_smashed(member, *_CLOSING)

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

    def watch_deadline(self) -> None:
        """It runs from when the first member's smashed states wait to be joined."""
        state = self.state
        waits = state.phase is Phase.FORWARD and any(0 in member.smashed for member in state.active)
        if waits and state.quorum and not state.deadline_runs:
            state.gathering, state.deadline_runs, state.deadline_over = state.gathering + 1, True, False
            self._out.append(act.StartDeadline(state.gathering))
        elif not waits:
            state.deadline_runs = state.deadline_over = False

    def refuse_smashed(self, member: Member, code: ErrorCode, text: str, detail: int = 0) -> None:
        """Refuse the forwards that wait."""
        for asked in member.smashed.values():
            self.refuse(member.session, asked.request, code, text, detail)
        member.smashed = {}

    def refuse(self, session: int, request: int, code: ErrorCode, text: str, detail: int = 0) -> None:
        """Answer a request with an error."""
        self._out.append(act.Refuse(session, request, code, text, detail))


def _asked(event: ev.SmashedReceived) -> Asked:
    return Asked(event.request, event.step, event.micro, event.payload, event.micros, event.digest)
