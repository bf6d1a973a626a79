"""A hub without sockets, tensors and disk around the real scheduler; it holds what the scheduler says against rules.

It does what `hub/server.py`, `hub/ledger.py`, `hub/desk.py` and `hub/worker.py` do with events, actions and
checkpoints. A broken rule is an AssertionError that names it. Weights are hashes of everything that made them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count

from hub.membership import Answered, MemberNote, answered_of
from hub.scheduler import Scheduler
from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.scheduler.state import Member, Phase, State
from messaging.errors import ErrorCode, HubError, NotFinite
from tests.support.model_edge import Adapter, Ask, Grad, Gradient, Hidden, Published, Smashed, Welcome, digest

_TRAINING = (act.RunForward, act.RunBackward, act.CloseRound)


def shape_of(content: object) -> tuple[int, int]:
    """Rows and columns of a request for inference: those that read with stream 2 send wide ones."""
    stream, pick = content  # type: ignore[misc]
    return (1 + pick % 3, 40 * (pick % 9) + 1) if stream == 2 else (1, 1)


@dataclass
class Seat:
    """A session, by its seat; `number` is that of the process that sits there."""

    seat: int
    number: int
    name: str
    train: bool
    applied: int = 0
    forwarded: tuple[int, int] = (0, 0)
    silent: bool = False
    left: bool = False
    #: its next request
    request: int = 1


@dataclass
class Asked:
    """A request without an answer; `number` is the process that asked."""

    ask: Ask
    number: int
    reply: Callable[[object], None]


@dataclass(frozen=True)
class Point:
    """A checkpoint."""

    hub_step: int
    round: int
    round_step: int
    version: int
    applied: dict[str, int]
    members: tuple[MemberNote, ...]
    gathered: bool
    answered: tuple[Answered, ...]
    weights: str
    log: tuple[tuple[str, ...], ...]


@dataclass
class Engine:
    """What the compute thread owns. `log`: who was inside each optimizer step, in row order."""

    weights: str = "initial"
    log: tuple[tuple[str, ...], ...] = ()
    #: the joined step: hiddens by micro-batch and session, gradients by session and micro-batch
    pending: dict[int, dict[int, Hidden]] = field(default_factory=dict)
    given: dict[int, dict[int, tuple[Smashed, object]]] = field(default_factory=dict)
    caches: set[tuple[int, int]] = field(default_factory=set)
    #: columns computed of requests of which a part is missing
    parts: dict[tuple[int, int], int] = field(default_factory=dict)


class ModelHub:
    """`hello`, `ask` and `finish` are what happens to it; `kill` and `stop` end it and begin it anew."""

    def __init__(self, cohort: int, round_steps: int, rounds: int, quorum: int = 0) -> None:
        self.cohort, self.round_steps, self.rounds, self.quorum = cohort, round_steps, rounds, quorum
        self._numbers = count(1)
        #: published adapters by version
        self.published = {0: "initial"}
        #: the newest checkpoint on the disk, and those that are being written
        self.durable: Point | None = None
        self.writing: list[Point] = []
        #: who has left the training, by name: on the disk at once
        self.left: set[str] = set()
        self.starts = 0
        self._begin()

    # -- life ----------------------------------------------------------------------------------------

    def _begin(self) -> None:
        point, self.writing = self.durable, []
        self.starts += 1
        state = State(self.cohort, self.round_steps, self.rounds, self.quorum, chunk=50)
        if point is not None:
            state.hub_step, state.round = point.hub_step, point.round
            state.round_step, state.version = point.round_step, point.version
        self.scheduler = Scheduler(state)
        self.engine = Engine() if point is None else Engine(point.weights, point.log)
        self.seats: dict[int, Seat] = {}
        self.open: dict[tuple[int, int], Asked] = {}
        self.computing: act.Compute | None = None
        self.applied = {} if point is None else dict(point.applied)
        self.begun = dict(self.applied)
        self._due = True
        #: caches to free that the scheduler was told of
        self.owed: Counter[tuple[int, int]] = Counter()
        #: who took a step in the open round, or was restored as one who did
        self.trained: set[int] = set()
        self.uploaded: set[int] = set()
        #: the joined step under way: how many micro-batches each seat has in it
        self.stepping: dict[int, int] = {}
        #: the deadline that runs
        self.deadline: int | None = None
        #: the latest answers that stand for a step, by seat, step and micro-batch
        self.grads: dict[tuple[int, int, int], tuple[int, object, int, bool]] = {}
        self.hiddens: dict[tuple[int, int, int], Hidden] = {}
        self._passed_training = self._passed_inference = 0
        self.seen = (state.version, state.round, state.hub_step)
        self.overfull = False
        if point is not None:
            self._restore(point)

    def _restore(self, point: Point) -> None:
        """As `Server.restore`."""
        state, answers = self.scheduler.state, {item.key: item for item in point.answered}
        for note in point.members:
            if note.key in self.left or (note.left and not note.contributes):
                continue
            applied, number = self.applied.get(note.key, 0), next(self._numbers)
            self.seats[number] = Seat(number, number, note.key, True, applied, (applied, 0))
            member = state.members[number] = Member(number, note.key, applied, contributes=note.contributes)
            if note.contributes:
                self.trained.add(number)
            known = answers.get(note.key)
            if known is not None and known.taken.step == applied - 1:
                taken = known.taken
                member.hiddens, member.taken = {taken.step: dict(known.hiddens)}, taken
                for micro, given in known.hiddens.items():
                    assert isinstance(given.answer, Hidden)
                    self.hiddens[number, taken.step, micro] = given.answer
                self._note_taken(number, taken.step, dict(taken.answers), taken.hub_step, taken.closes)
        if state.members and point.gathered and state.phase is Phase.GATHERING:
            state.phase = Phase.CLOSING if state.round_step >= state.round_steps else Phase.FORWARD
        # Everybody was gone when the hub stopped: who comes now takes one more step and closes the round.
        self.overfull = state.phase is Phase.GATHERING and state.round_step >= state.round_steps
        self.tell(ev.OthersChanged(state.elsewhere))

    def _note_taken(self, seat: int, step: int, answers: dict[int, object], hub_step: int, closes: bool) -> None:
        """What an edge is told of a step that is applied: only the last micro-batch's answer says what came of it."""
        for micro, answer in answers.items():
            last = micro == len(answers) - 1
            self.grads[seat, step, micro] = (step, answer, hub_step if last else 0, closes and last)

    def kill(self, written: int, published: bool) -> None:
        """kill -9: `written` of the checkpoints under way reach the disk; `published`: so does that of a round."""
        for point in self.writing[:written]:
            self.durable = point
        if published and isinstance(self.computing, act.CloseRound):
            self._save_round(self.computing)
        version = self.durable.version if self.durable is not None else 0
        self.published = {number: made for number, made in self.published.items() if number <= version}
        self._begin()

    def stop(self) -> None:
        """An orderly stop: what is computed is finished and answered, nothing is begun, a checkpoint is written."""
        self.scheduler.state.stopping = True
        if self.computing is not None:
            self.finish()
        assert self.computing is None, "a hub that stops begins nothing"
        self.durable = self._point()
        self._begin()

    def _point(self) -> Point:
        """As `Ledger.progress`."""
        state = self.scheduler.state
        here = [(m, self.seats[m.session]) for m in state.members.values() if m.session in self.seats]
        answered = [answered_of(member, seat.name) for member, seat in here]
        return Point(
            state.hub_step, state.round, state.round_step, state.version, dict(self.applied),
            tuple(MemberNote(seat.name, (1, 1), member.contributes, member.left) for member, seat in here),
            state.phase is not Phase.GATHERING, tuple(item for item in answered if item is not None),
            self.engine.weights, self.engine.log,
        )  # fmt: skip

    # -- sessions ------------------------------------------------------------------------------------

    def knows(self, number: int) -> bool:
        """A session is open."""
        return any(seat.number == number for seat in self.seats.values())

    def _seat(self, number: int) -> Seat:
        return next(seat for seat in self.seats.values() if seat.number == number)

    def hello(self, name: str, train: bool = True) -> Welcome:
        """As `Seating._open`."""
        number = next(self._numbers)
        for old in [seat for seat in self.seats.values() if train and seat.train and seat.name == name]:
            if old.seat in self.scheduler.state.members:
                old.number, old.request, old.left = number, 1, False
                self._forget_requests(old.seat)
                self.tell(ev.EdgeRestarted(old.seat))
                self.heard(old.seat)
                return self.welcome(number)
            self.gone(old.seat)
        applied = self.applied.get(name, 0)
        if train:
            self.left.discard(name)
        self.seats[number] = Seat(number, number, name, train, applied)
        self.tell(ev.EdgeJoined(number, name, train, applied))
        return self.welcome(number)

    def welcome(self, number: int) -> Welcome:
        """Where the hub is."""
        state = self.scheduler.state
        return Welcome(number, self._seat(number).applied, state.version, state.round)

    def heard(self, seat: int) -> None:
        """Something came from there."""
        if self.seats[seat].silent:
            self.seats[seat].silent = False
            self.tell(ev.EdgeCameBack(seat))

    def silent(self, seat: int) -> None:
        """Nothing came for the grace."""
        if self.seats[seat].train and not self.seats[seat].silent:
            self.seats[seat].silent = True
            self.trained -= {seat} - self.uploaded
            self.tell(ev.EdgeFellSilent(seat))

    def gone(self, seat: int) -> None:
        """The session is closed. (The server forgets it first; the order of the two changes nothing.)"""
        self._forget_requests(seat)
        self.trained.discard(seat)
        del self.seats[seat]
        self.tell(ev.EdgeGone(seat))

    def _forget_requests(self, seat: int) -> None:
        self.open = {key: asked for key, asked in self.open.items() if key[0] != seat}
        self.owed[seat, 0] += 1

    # -- requests ------------------------------------------------------------------------------------

    def ask(self, number: int, ask: Ask, reply: Callable[[object], None]) -> None:
        """A request arrives from a process with an open session."""
        seat = self._seat(number)
        self.heard(seat.seat)
        request, seat.request = seat.request, seat.request + 1
        match ask.kind:
            case "upload":
                if ask.number == self.scheduler.state.round:
                    self.uploaded.add(seat.seat)
                self.tell(ev.AdapterUploaded(seat.seat, ask.number, ask.content))
                reply(True)
                return
            case "leave":
                self._leave(seat, bool(ask.content))
                reply(True)
                return
            case "forward" if ask.number not in (seat.applied, seat.applied - 1):
                reply(HubError(ErrorCode.BEHIND, "not the step that is next"))
                return
        self.open[seat.seat, request] = Asked(ask, number, reply)
        match ask.kind:
            case "forward":
                again = (ask.number, ask.micro) < seat.forwarded
                seat.forwarded = max(seat.forwarded, (ask.number, ask.micro + 1))
                same = digest(ask.content).encode() if again else b""
                asked = (ask.number, ask.content, same, ask.micro, ask.micros)
                self.tell(ev.SmashedReceived(seat.seat, request, *asked))
            case "gradient":
                self.tell(ev.GradientReceived(seat.seat, request, ask.number, ask.content, ask.micro))
            case "await":
                state = self.scheduler.state
                if ask.number < state.round or (seat.name == "rogue" and state.phase is Phase.CLOSING):
                    # It missed a publication, and goes on from that: its steps since then are in no adapter of it. Or
                    # it asks for the round without having uploaded, as no honest edge does.
                    self.trained -= {seat.seat} - self.uploaded
                self.tell(ev.RoundAwaited(seat.seat, request, ask.number))
            case _:
                self.tell(ev.InferReceived(seat.seat, request, ask.content, *shape_of(ask.content)))

    def _leave(self, seat: Seat, done: bool) -> None:
        seat.left = True
        if not done and seat.train:
            self.left.add(seat.name)
        if not done and seat.seat in self.scheduler.state.members and not self.scheduler.state.members[seat.seat].left:
            self.trained.discard(seat.seat)
        self.tell(ev.EdgeLeft(seat.seat, done))
        if not done:
            self.gone(seat.seat)

    def close_stream(self, seat: int, stream: int) -> None:
        """A generation is over."""
        self.owed[seat, stream] += 1
        self.tell(ev.StreamClosed(seat, stream))

    def checkpoint_due(self) -> None:
        """The last checkpoint is old."""
        if self._due and not self.writing:
            self._due = False
            self.tell(ev.CheckpointDue())

    def deadline_passes(self) -> None:
        """The time to gather for a joined step is over."""
        if self.deadline is not None:
            gathering, self.deadline = self.deadline, None
            self.tell(ev.DeadlinePassed(gathering))

    def written(self) -> None:
        """The oldest checkpoint under way is on the disk."""
        if self.writing:
            self.durable, self._due = self.writing.pop(0), True

    # -- what is computed ----------------------------------------------------------------------------

    def finish(self, bad: int | None = None) -> None:
        """The computation under way ends; the tensor of session `bad` is not finite."""
        action, engine, bad_one = self.computing, self.engine, NotFinite("bad")
        self.computing = None
        match action:
            case act.RunForward():
                rows = [(s, p) for s, p in action.payloads if s != bad]
                joined = digest(engine.weights, rows_of(rows))
                hiddens = engine.pending[action.micro] = {s: Hidden(joined, p) for s, p in rows}
                answers: dict[int, object] = {s: hiddens.get(s, bad_one) for s, _ in action.payloads}
                digests = {s: digest(p).encode() for s, p in action.payloads}
                self.hiddens |= {(s, hidden.rows.step, action.micro): hidden for s, hidden in hiddens.items()}
                self.tell(ev.ForwardDone(answers, digests))
            case act.RunBackward():
                self._backward(action, bad, bad_one)
            case act.ApplyStep():
                self._step(action)
            case act.RunInfer():
                engine.caches |= {(s, p[0]) for s, _, p in action.requests if p[0]}  # type: ignore[index]
                whole = [(s, r, p) for s, r, p in action.requests if self._computed(action, s, r, p)]
                self.tell(ev.InferDone(tuple((s, r, digest("x", p)) for s, r, p in whole)))
            case act.CloseRound():
                self._save_round(action)
                self.writing, self._due = [], True
                self.trained, self.uploaded, self.overfull = set(), set(), False
                self.begun = dict(self.applied)
                self.tell(ev.RoundPublished(action.version))
            case act.FreeStreams():
                for session, stream in action.streams:
                    engine.caches -= {at for at in engine.caches if at[0] == session and stream in (0, at[1])}
                    gone = [at for at in engine.parts if at[0] == session and stream == 0]
                    engine.parts = {at: have for at, have in engine.parts.items() if at not in gone}
                self.tell(ev.HousekeepingDone())

    def _computed(self, action: act.RunInfer, session: int, request: int, content: object) -> bool:
        """Compute columns of a request, as far as is asked; whether it is whole then."""
        rows, columns = shape_of(content)
        have, upto = self.engine.parts.pop((session, request), 0), action.upto.get((session, request), columns)
        assert have < upto <= columns, "each piece of a request goes on where the one before ended"
        assert rows * (upto - have) <= 4 * self.scheduler.state.chunk, "no piece is larger than four chunks"
        if upto < columns:
            self.engine.parts[session, request] = upto
        return upto == columns

    def _backward(self, action: act.RunBackward, bad: int | None, bad_one: Exception) -> None:
        engine, micro, answers = self.engine, action.micro, {}
        for session, gradient in action.gradients.items():
            hidden = engine.pending[micro][session]
            if session == bad:
                answers[session] = bad_one
                continue
            answers[session] = digest("grad", engine.weights, gradient)
            engine.given.setdefault(session, {})[micro] = (hidden.rows, gradient)
            self.grads[session, hidden.rows.step, micro] = (hidden.rows.step, answers[session], 0, False)
        self.tell(ev.BackwardDone(answers))

    def _step(self, action: act.ApplyStep) -> None:
        engine, state = self.engine, self.scheduler.state
        if action.sessions:
            inside = [sorted(engine.given[s].items()) for s in action.sessions]
            engine.weights = digest(engine.weights, inside)
            engine.log = (*engine.log, tuple(parts[0][1][0].name for parts in inside))
        closes = state.round_step + bool(action.sessions) >= self.round_steps
        for session in action.sessions:
            rows, seat = engine.given[session][0][0], self.seats.get(session)
            assert rows.step == self.applied.get(rows.name, 0), "an edge's steps are applied once each, in order"
            self.applied[rows.name] = rows.step + 1
            if seat is not None:
                seat.applied = rows.step + 1
                answers = {micro: self.grads[session, rows.step, micro][1] for micro in engine.given[session]}
                self._note_taken(session, rows.step, answers, len(engine.log), closes)
                if not seat.silent and not seat.left:
                    self.trained.add(session)
                    # What it uploaded before lacks this step.
                    self.uploaded.discard(session)
        engine.pending, engine.given, self.stepping = {}, {}, {}
        self._catch_up()
        self.tell(ev.StepApplied(action.sessions))

    def _catch_up(self) -> None:
        """As `Seating.catch_up`: who gave up its seat while its step was applied, and took another."""
        for seat in self.seats.values():
            if seat.train:
                seat.applied = self.applied.get(seat.name, 0)
                member = self.scheduler.state.members.get(seat.seat)
                if member is not None:
                    member.applied = max(member.applied, seat.applied)

    def _save_round(self, action: act.CloseRound) -> None:
        """As `Keeper._merge`: the adapter and the checkpoint are on the disk before anyone hears of them."""
        point = self._point()
        self.published[action.version] = digest("published", self.engine.weights, action.uploads)
        members = tuple(replace(note, contributes=False) for note in point.members)
        self.durable = replace(
            point, round=action.round + 1, round_step=0, version=action.version, members=members, gathered=True
        )

    # -- what the scheduler says ---------------------------------------------------------------------

    def tell(self, event: ev.Event) -> None:
        """An event, its actions, and what must hold of them."""
        request = (event.session, event.request) if hasattr(event, "request") else None
        before = repr(self.scheduler.state)
        gathering = self.scheduler.state.phase is Phase.GATHERING
        actions = self.scheduler.handle(event)
        for action in actions:
            match action:
                case act.Note():
                    pass
                case act.StartDeadline():
                    self.deadline = action.gathering
                case act.RunForward() | act.RunBackward() | act.ApplyStep() | act.RunInfer():
                    self._started(action, gathering)
                case act.CloseRound() | act.FreeStreams():
                    self._started(action, gathering)
                case _:
                    refused = isinstance(action, act.Refuse) and (action.session, action.request) == request
                    # A micro-batch with other bytes than before: that it takes its step out is the point.
                    anew = isinstance(event, ev.SmashedReceived) and event.micro > 0
                    if refused and not anew:
                        assert repr(self.scheduler.state) == before, "what is refused changes nothing"
                    self._answer(action, isinstance(event, ev.ForwardDone | ev.BackwardDone))

    def _answer(self, action: act.Action, computed: bool) -> None:
        assert not isinstance(action, act.Note | act.StartDeadline | act.Compute)
        asked = self.open.pop((action.session, action.request), None)
        assert asked is not None, "every request is answered once, and nobody is who was killed or is gone"
        seat, ask, value = self.seats[action.session], asked.ask, None
        assert seat.number == asked.number, "no answer to one process reaches the next"
        match action:
            case act.Refuse():
                value = HubError(action.code, action.text, action.detail)
            case act.AnswerForward(answer=Hidden() as hidden):
                question = (ask.kind, ask.number, ask.micro)
                assert question == ("forward", action.step, action.micro), "an answer fits its question"
                assert hidden.rows == ask.content, "other bytes are never answered from the record"
                assert hidden == self.hiddens[action.session, *question[1:]], "the same bytes are answered as before"
                value = hidden
            case act.AnswerBackward(answer=str()):
                question = (ask.kind, ask.number, ask.micro)
                assert question == ("gradient", action.step, action.micro), "an answer fits its question"
                given = (action.step, action.answer, action.hub_step, action.round_closes)
                applied = self.grads[action.session, action.step, action.micro]
                assert given == applied, "a gradient is answered as it was applied"
                # A gradient does not say of how many it is one: a rogue may think of another number than before.
                last = action.micro == ask.micros - 1 and seat.name != "rogue"
                assert not last or action.step < seat.applied, "the last is answered when the step is applied"
                value = Grad(action.answer, action.hub_step, action.round_closes, self.begun.get(seat.name, 0))
            case act.AnswerForward() | act.AnswerBackward():
                assert computed, "a failure is told once, by the computation that failed"
                value = HubError(ErrorCode.NOT_FINITE, "bad")
            case act.AnswerInfer():
                assert (ask.kind, digest("x", ask.content)) == ("infer", action.answer), "an answer fits its question"
                value = action.answer
            case act.AnswerRound():
                value = self._round_answer(ask, action)
        asked.reply(value)

    def _round_answer(self, ask: Ask, action: act.AnswerRound) -> Published:
        state = self.scheduler.state
        assert ask.kind == "await", "an answer fits its question"
        nothing_to_wait_for = state.phase is Phase.OVER or not state.round_step or not state.active
        assert ask.number < state.round or nothing_to_wait_for, "who waits for a round hears when it is published"
        assert (action.version, action.round) == (state.version, state.round), "a publication is the newest"
        assert action.over == (bool(self.rounds) and state.round >= self.rounds), "over means the last round"
        return Published(action.version, action.round, action.over)

    def _started(self, action: act.Compute, gathering: bool) -> None:
        assert self.computing is None, "one computation at a time"
        assert not self.scheduler.state.stopping, "a hub that stops begins nothing"
        self.computing = action
        self._turns(action)
        match action:
            case act.RunForward():
                self._check_forward(action, gathering)
            case act.RunBackward():
                self._check_backward(action)
            case act.ApplyStep():
                self._check_apply(action)
            case act.CloseRound():
                self._check_round(action)
            case act.FreeStreams():
                self.owed.subtract(action.streams)
                assert not any(self.owed.values()), "all caches of closed streams are freed, once each"
            case act.RunInfer():
                asked = [self.open[session, request].ask for session, request, _ in action.requests]
                assert [item[2] for item in action.requests] == [ask.content for ask in asked]
                assert len({item[:2] for item in action.requests}) == len(action.requests), "each request runs once"

    def _turns(self, action: act.Compute) -> None:
        state = self.scheduler.state
        if isinstance(action, act.RunInfer):
            self._passed_inference = 0
            # The pieces of a request are one turn.
            turn = not any(0 < wide.have < wide.columns for wide in state.wide.values())
            self._passed_training = self._passed_training + turn if training_is_ready(state) else 0
        elif isinstance(action, _TRAINING):
            self._passed_training = 0
            self._passed_inference = self._passed_inference + 1 if state.infers else 0
        assert self._passed_training <= 1, "inference does not starve training"
        assert self._passed_inference <= 1, "training does not starve inference"

    def _check_forward(self, action: act.RunForward, gathering: bool) -> None:
        wanted = [s for s in self.seats.values() if s.train and not s.left and not s.silent]
        order = [seat.seat for seat in sorted(wanted, key=lambda seat: (seat.name, seat.seat))]
        joined = [session for session, _ in action.payloads]
        if action.micro:
            assert not action.checkpoint, "a checkpoint is taken between two steps"
            assert joined == [s for s in self.stepping if s in joined], "rows keep their order"
            assert all(self.stepping[s] > action.micro for s in joined), "nobody has more micro-batches than it said"
        elif self.quorum and len(joined) < len(order):
            assert joined == [s for s in order if s in joined], "rows are by name"
            assert len(joined) >= self.quorum, "less than a quorum waits for the others"
        else:
            assert joined == order, "each active member is in a forward once, by name; nobody else"
            assert not gathering or len(order) >= self.cohort, "the first step waits for the cohort"
        for session, payload in action.payloads:
            asked = self._asked(session, "forward", action.micro)
            assert [a.content for a in asked] == [payload], "what is joined is what the live process asks"
            assert isinstance(payload, Smashed)
            assert payload.step == self.seats[session].applied, "the step that is joined is the next one"
            if not action.micro:
                self.stepping[session] = asked[0].micros
        if action.checkpoint:
            self.begun = dict(self.applied)
            self.writing.append(self._point())

    def _asked(self, session: int, kind: str, micro: int) -> list[Ask]:
        asks = [asked.ask for (seat, _), asked in self.open.items() if seat == session]
        return [ask for ask in asks if (ask.kind, ask.micro) == (kind, micro)]

    def _check_backward(self, action: act.RunBackward) -> None:
        for session, gradient in action.gradients.items():
            assert isinstance(gradient, Gradient)
            pending = self.engine.pending[action.micro][session]
            assert gradient.step == pending.rows.step, "a gradient is of the pending forward"
            asked = self._asked(session, "gradient", action.micro)
            assert [a.content for a in asked] == [gradient], "what is applied is what the live process asks"
            if not self.seats[session].name.startswith("rogue"):
                assert gradient.hidden == pending, "a gradient is of the rows it was asked for"

    def _check_apply(self, action: act.ApplyStep) -> None:
        assert list(action.sessions) == [s for s in self.stepping if s in action.sessions], "rows keep their order"
        for session in action.sessions:
            given = sorted(self.engine.given[session])
            assert given == list(range(self.stepping[session])), "a step counts wholly or not at all"
            rows = [rows for rows, _ in self.engine.given[session].values()]
            assert rows[0].name == "rogue" or len({part.weights for part in rows}) == 1, "all of it is of one try"

    def _check_round(self, action: act.CloseRound) -> None:
        state = self.scheduler.state
        assert (action.round, action.version) == (state.round, state.version + 1), "rounds and versions go up by one"
        assert state.round_step, "a round that closes has a step in it"
        names = [upload.name for upload in action.uploads if isinstance(upload, Adapter)]
        assert len(names) == len(action.uploads)
        assert names == sorted(set(names)), "each contributor is in a round once, by name"
        assert {upload.round for upload in action.uploads if isinstance(upload, Adapter)} <= {action.round}, (
            "only adapters of this round are in it"
        )
        missing = {self.seats[s].name for s in self.trained if not self.seats[s].silent} - set(names)
        assert not missing, "nobody who took a step in the round and is here is left out of it"


def rows_of(rows: list[tuple[int, object]]) -> list[object]:
    """Without sessions, which differ from run to run."""
    return [payload for _, payload in rows]


def training_is_ready(state: State) -> bool:
    """Whether a training action could begin."""
    match state.phase:
        case Phase.FORWARD:
            here = [0 in member.smashed for member in state.active]
            return bool(here) and (all(here) or (state.deadline_over and 0 < state.quorum <= sum(here)))
        case Phase.STEPPING:
            forward, backward = state.forwards, state.backwards
            given = [backward in m.gradients for m in state.inside if m.micros > backward]
            sent = [forward in m.smashed for m in state.inside if m.micros > forward]
            return (backward < forward and all(given)) or (bool(sent) and all(sent))
        case Phase.CLOSING:
            return all(member.upload for member in state.members.values() if member.contributes)
    return False
