"""The scheduler under anything that edges, hubs and links may do, in any order; and what must hold all the same.

The machines share the model (`tests/support/model_hub.py` has the rules for each action, this file those for states).
In `Honest` processes are killed and hubs begin anew, but nobody is silent for longer than the grace: then the end is
that of an undisturbed run, to the last bit. In `Quorum` steps do not wait for everybody besides: nothing is lost. In
`Disorder` edges are silent, leave, are gone, come late, send what is not finite and ask for what they should not: then
the rules hold, and who does its part still comes to its end.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hub.scheduler import actions as act
from hub.scheduler import plan
from hub.scheduler.state import Phase
from tests.support.model_edge import Adapter, Ask, Edge, Gradient, Hidden, Smashed, digest
from tests.support.model_hub import ModelHub

#: FEDSEA_LONG=1: minutes instead of seconds, and other sequences each time.
_LONG = bool(os.environ.get("FEDSEA_LONG"))
_SETTINGS = settings(
    max_examples=3000 if _LONG else 100,
    stateful_step_count=80 if _LONG else 40,
    deadline=None,
    derandomize=not _LONG,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
_PICK = st.integers(0, 5)


@dataclass(frozen=True)
class Recipe:
    """Steps that each edge wants (None: until the hub is done), steps of a round, rounds (0: no end).

    parts: each edge's micro-batches, and how many of them are under way at once. quorum: 0 for all edges.
    """

    wanted: tuple[int | None, ...]
    round_steps: int
    rounds: int
    parts: tuple[tuple[int, int], ...]
    quorum: int = 0

    def edges(self) -> list[Edge]:
        return [
            Edge(f"edge{9 - place}", wanted, place == 1, *self.parts[place]) for place, wanted in enumerate(self.wanted)
        ]

    def hub(self) -> ModelHub:
        return ModelHub(len(self.wanted), self.round_steps, self.rounds, self.quorum)


@st.composite
def recipes(draw: st.DrawFn, quorum: bool = False) -> Recipe:
    rounds = draw(st.integers(0, 3))
    steps = st.integers(1, 7) if not rounds else st.none() | st.integers(1, 7)
    wanted = tuple(draw(st.lists(steps, min_size=1, max_size=3)))
    part = st.sampled_from([(1, 1), (1, 1), (2, 2), (3, 2), (4, 4), (3, 1)])
    parts = tuple(draw(st.lists(part, min_size=len(wanted), max_size=len(wanted))))
    few = draw(st.integers(1, len(wanted))) if quorum else 0
    return Recipe(wanted, draw(st.integers(1, 4)), rounds, parts, few)


def finish(hub: ModelHub, edges: list[Edge], most: int = 500) -> bool:
    """Everybody does its part: processes run, nobody is silent. Returns whether all came to their end."""
    for _ in range(most):
        if all(edge.done and edge.process is None for edge in edges) and hub.computing is None:
            return True
        for edge in edges:
            if edge.process is None and not edge.done:
                edge.start(hub)
            elif edge.process is not None and edge.process.lost:
                edge.process.reconnect()
            elif edge.can_act:
                edge.act()
        for seat in list(hub.seats.values()):
            hub.heard(seat.seat)
        hub.written()
        hub.deadline_passes()
        if hub.computing is not None:
            hub.finish()
    return False


def outcome(hub: ModelHub, edges: list[Edge]) -> tuple:  # type: ignore[type-arg]
    """What a training comes to: what each side trained, the rows of every step, the counts."""
    state = hub.scheduler.state
    sides = [(edge.name, edge.standing.steps, edge.gave) for edge in edges]
    return sides, hub.engine.weights, hub.engine.log, hub.applied, hub.published, (state.hub_step, state.round)


def adapters_kept(edges: list[Edge]) -> list[tuple[int, str]]:
    """The version of the published adapter that each edge ends with, and what it has by that."""
    return [(edge.standing.version, edge.standing.weights) for edge in edges]


@cache
def undisturbed(recipe: Recipe) -> tuple[tuple, list[tuple[int, str]]]:  # type: ignore[type-arg]
    """The outcome when nothing happens, and the adapters that the edges end with."""
    hub, edges = recipe.hub(), recipe.edges()
    assert finish(hub, edges), "an undisturbed training comes to its end"
    return outcome(hub, edges), adapters_kept(edges)


class Honest(RuleBasedStateMachine):
    """Kills and restarts of both sides, and generation beside the training."""

    @initialize(recipe=recipes())
    def begin(self, recipe: Recipe) -> None:
        self.begin_with(recipe)

    def begin_with(self, recipe: Recipe) -> None:
        self.recipe, self.edges = recipe, recipe.edges()
        self.hub = recipe.hub()
        self.readers: list[int] = []
        self.floor = (0, 0, 0)
        self.over = False

    def edge(self, pick: int) -> Edge:
        return self.edges[pick % len(self.edges)]

    # -- what happens --------------------------------------------------------------------------------

    @rule(ticks=st.integers(1, 40), order=st.booleans())
    def things_go_on(self, ticks: int, order: bool) -> None:
        for _ in range(ticks):
            for edge in self.edges[:: 1 if order else -1]:
                self.one_goes_on(edge)
            if self.hub.computing is not None:
                self.hub.finish()

    @rule(pick=_PICK)
    def an_edge_goes_on(self, pick: int) -> None:
        self.one_goes_on(self.edge(pick))

    def one_goes_on(self, edge: Edge) -> None:
        if edge.can_act:
            edge.act()
        elif edge.process is None and not edge.done:
            edge.start(self.hub)

    @rule()
    def a_computation_ends(self) -> None:
        if self.hub.computing is not None:
            self.hub.finish()

    @rule(pick=_PICK, written=st.booleans(), again=st.booleans())
    def an_edge_is_killed(self, pick: int, written: bool, again: bool) -> None:
        edge = self.edge(pick)
        edge.kill(written)
        if again and not edge.done:
            edge.start(self.hub)

    @rule(pick=_PICK)
    def an_edge_finds_a_new_session(self, pick: int) -> None:
        process = self.edge(pick).process
        if process is not None and process.lost:
            process.reconnect()

    @rule(pick=_PICK)
    def an_edge_hears_a_pong(self, pick: int) -> None:
        process, state = self.edge(pick).process, self.hub.scheduler.state
        if process is not None and not process.lost:
            process.hear(state.version, state.round)

    @rule()
    def a_checkpoint_is_due(self) -> None:
        self.hub.checkpoint_due()

    @rule()
    def a_checkpoint_is_written(self) -> None:
        self.hub.written()

    @rule(written=st.integers(0, 1), published=st.booleans(), all_back=st.booleans(), lost=st.booleans())
    def the_hub_is_killed(self, written: int, published: bool, all_back: bool, lost: bool) -> None:
        self.hub.kill(written, published)
        self.a_hub_is_here_again(all_back, lost)

    @rule(all_back=st.booleans(), lost=st.booleans())
    def the_hub_is_stopped(self, all_back: bool, lost: bool) -> None:
        self.hub.stop()
        self.a_hub_is_here_again(all_back, lost)

    def a_hub_is_here_again(self, all_back: bool, lost: bool) -> None:
        self.readers = []
        self.floor = self.hub.seen
        for edge in self.edges:
            if edge.process is not None and lost:
                edge.process.lose_mail()
        for pick in range(len(self.edges) * all_back):
            self.an_edge_finds_a_new_session(pick)

    @rule(pick=_PICK, again=st.booleans())
    def somebody_generates(self, pick: int, again: bool) -> None:
        if not self.readers or (not again and len(self.readers) < 5):
            self.readers.append(self.hub.hello("reader", train=False).number)
        self.hub.ask(self.readers[pick % len(self.readers)], Ask("infer", content=(1 + pick % 2, pick)), ignore)

    @precondition(lambda self: self.readers)
    @rule(pick=_PICK)
    def a_generation_ends(self, pick: int) -> None:
        self.hub.close_stream(self.readers[pick % len(self.readers)], 1 + pick % 2)

    @precondition(lambda self: self.readers)
    @rule(pick=_PICK)
    def a_reader_is_gone(self, pick: int) -> None:
        self.hub.gone(self.readers.pop(pick % len(self.readers)))

    def teardown(self) -> None:
        if not hasattr(self, "hub"):
            return
        self.come_to_an_end()
        self.rules_hold()
        for seat in list(self.hub.seats):
            self.hub.gone(seat)
        while self.hub.computing is not None:
            self.hub.finish()
        state = self.hub.scheduler.state
        assert not self.hub.open, "every request is answered in the end"
        left = (state.members, state.awaiting, state.infers, state.answering, state.inferring, state.freeing)
        assert left == ({}, [], [], {}, [], []), "nothing is kept of who is gone"
        assert (state.wide, state.parted) == ({}, None), "nor of how far their requests came"
        assert not self.hub.engine.caches, "no cache outlives its session"

    def come_to_an_end(self) -> None:
        assert finish(self.hub, self.edges), "nobody waits for ever"
        assert all(edge.skips == 0 for edge in self.edges), "nothing that was learned is lost"
        assert {end for edge in self.edges for end in edge.ends} <= {"done"}, "no honest edge is sent away"
        expected, kept = undisturbed(self.recipe)
        assert outcome(self.hub, self.edges) == expected, "the end is that of an undisturbed run"
        for edge, mine, other in zip(self.edges, adapters_kept(self.edges), kept, strict=True):
            # The others do not wait for an edge that has all its steps, nor for it to hear of its last round.
            later = edge.wanted is not None and mine[0] > other[0]
            assert later or mine == other, "every edge ends with the adapter of its last round, or a newer one"

    def rules_hold(self) -> None:
        for name in dir(type(self)):
            if name.startswith("rule_"):
                getattr(self, name)()

    # -- what holds ----------------------------------------------------------------------------------

    @invariant()
    def rule_the_scheduler_knows_whether_something_is_computed(self) -> None:
        assert self.hub.scheduler.state.busy == (self.hub.computing is not None)

    @invariant()
    def rule_nothing_waits_that_could_be_computed(self) -> None:
        state = self.hub.scheduler.state
        assert state.busy or (plan.next_compute(state) is None and not state.infers and not state.freeing)

    @invariant()
    def rule_a_step_waits_for_its_active_members_only(self) -> None:
        hub, state = self.hub, self.hub.scheduler.state
        active = {seat.seat for seat in hub.seats.values() if seat.train and not seat.left and not seat.silent}
        asked = {(s, a.ask.kind, a.ask.micro) for (s, _), a in hub.open.items()}
        if state.phase is Phase.FORWARD and not state.busy:
            assert not active or active - {s for s, kind, micro in asked if (kind, micro) == ("forward", 0)}
        if state.phase is Phase.STEPPING and not state.busy:
            inside = {m.session: m.micros for m in state.inside if m.session in active}
            forward, backward = state.forwards, state.backwards
            wanted = {(s, "gradient", backward) for s, micros in inside.items() if backward < min(forward, micros)}
            wanted |= {(s, "forward", forward) for s, micros in inside.items() if forward < micros}
            assert wanted - asked

    @invariant()
    def rule_every_open_request_is_held_in_one_place(self) -> None:
        state = self.hub.scheduler.state
        members = state.members.values()
        held = [(m.session, a.request) for m in members for a in (*m.smashed.values(), *m.gradients.values())]
        held += [(m.session, m.last) for m in members if m.last]
        held += [(session, request) for session, (request, *_) in state.answering.items() if request]
        held += [item[:2] for item in (*state.awaiting, *state.infers)] + list(state.inferring)
        assert sorted(held) == sorted(self.hub.open)

    @invariant()
    def rule_nothing_is_kept_of_sessions_that_are_gone(self) -> None:
        state, here = self.hub.scheduler.state, self.hub.seats.keys()
        assert {s for s, _, _ in (*state.awaiting, *state.infers)} | {s for s, _ in state.inferring} <= here
        assert {session for session, _ in state.wide} <= here
        assert state.answering.keys() <= here & state.members.keys()
        assert all(session in here or member.upload for session, member in state.members.items())

    @invariant()
    def rule_members_are_edges_that_train(self) -> None:
        for session, member in self.hub.scheduler.state.members.items():
            seat = self.hub.seats.get(session)
            assert member.session == session
            assert seat is None or (seat.train and seat.name == member.name)

    @invariant()
    def rule_an_edge_sits_on_one_seat(self) -> None:
        names = [seat.name for seat in self.hub.seats.values() if seat.train]
        assert len(names) == len(set(names))

    @invariant()
    def rule_who_is_silent_or_has_left_is_known(self) -> None:
        for member in self.hub.scheduler.state.members.values():
            seat = self.hub.seats.get(member.session)
            assert member.left == (seat is None or seat.left)
            assert seat is None or member.left or member.silent == seat.silent

    @invariant()
    def rule_members_stand_where_their_edges_do(self) -> None:
        for member in self.hub.scheduler.state.members.values():
            seat = self.hub.seats.get(member.session)
            assert seat is None or member.applied == seat.applied == self.hub.applied.get(seat.name, 0)

    @invariant()
    def rule_records_are_bounded(self) -> None:
        for member in self.hub.scheduler.state.members.values():
            assert member.hiddens.keys() <= {member.applied - 1, member.applied}
            assert member.taken is None or member.taken.step == member.applied - 1
            for held in (member.smashed, member.gradients, member.grads, *member.hiddens.values()):
                assert held.keys() <= set(range(4))

    @invariant()
    def rule_the_record_of_a_step_is_that_of_its_answers(self) -> None:
        for member in self.hub.scheduler.state.members.values():
            for step, micro, given in [(s, j, g) for s, gs in member.hiddens.items() for j, g in gs.items()]:
                assert given.answer == self.hub.hiddens[member.session, step, micro]
                assert given.digest == digest(self.hub.hiddens[member.session, step, micro].rows).encode()

    @invariant()
    def rule_steps_are_counted(self) -> None:
        state = self.hub.scheduler.state
        assert state.hub_step == len(self.hub.engine.log)
        assert 0 <= state.round_step <= state.round_steps + self.hub.overfull

    @invariant()
    def rule_applied_counts_the_joined_steps_that_an_edge_was_in(self) -> None:
        for name, applied in self.hub.applied.items():
            assert sum(name in rows for rows in self.hub.engine.log) == applied

    @invariant()
    def rule_version_round_and_step_only_grow(self) -> None:
        state = self.hub.scheduler.state
        now = (state.version, state.round, state.hub_step)
        assert all(before <= after for before, after in zip(self.floor, now, strict=True))
        assert state.version == state.round
        self.floor = now

    @invariant()
    def rule_gradients_wait_for_a_forward_only(self) -> None:
        state = self.hub.scheduler.state
        for member in state.members.values():
            inside = member.inside is not None
            assert not inside or (state.phase is Phase.STEPPING and member.session in state.joined)
            assert not inside or member.inside == member.applied
            assert inside or not (member.gradients or member.grads or member.last)
            here = member.hiddens.get(member.inside, {}) if member.inside is not None else {}
            assert member.gradients.keys() | member.grads.keys() <= here.keys()

    @invariant()
    def rule_forwards_wait_in_order_behind_the_first(self) -> None:
        for member in self.hub.scheduler.state.members.values():
            assert len({(asked.step, asked.micros) for asked in member.smashed.values()}) <= 1
            assert not member.smashed or 0 in member.smashed or member.inside is not None
            assert all(0 <= micro == asked.micro < asked.micros for micro, asked in member.smashed.items())

    @invariant()
    def rule_joined_is_what_is_pending(self) -> None:
        state = self.hub.scheduler.state
        if state.phase is Phase.STEPPING:
            assert set(state.joined) == self.hub.stepping.keys()
        elif self.hub.computing is None:
            assert not self.hub.engine.pending
            assert not state.joined
            assert not state.answering

    @invariant()
    def rule_uploads_are_of_the_open_round(self) -> None:
        state = self.hub.scheduler.state
        for member in state.members.values():
            if member.upload is not None:
                assert isinstance(member.upload, Adapter)
                assert (member.upload.round, member.upload.name) == (state.round, member.name)
                assert member.contributes
                assert state.round_step

    @invariant()
    def rule_who_waits_for_a_round_waits_for_one_to_come(self) -> None:
        state = self.hub.scheduler.state
        assert all(round_ >= state.round for _, _, round_ in state.awaiting)
        assert state.phase is not Phase.OVER or not state.awaiting

    @invariant()
    def rule_a_round_that_has_all_its_steps_is_closing(self) -> None:
        state = self.hub.scheduler.state
        assert state.round_step < state.round_steps or state.phase is Phase.CLOSING or self.hub.overfull

    @invariant()
    def rule_after_the_last_round_nothing_trains(self) -> None:
        state = self.hub.scheduler.state
        if state.phase is Phase.OVER:
            assert state.rounds
            assert state.round >= state.rounds
            assert not any(member.smashed or member.gradients for member in state.members.values())

    @invariant()
    def rule_caches_to_free_are_noted_once_each(self) -> None:
        freeing = self.hub.scheduler.state.freeing
        assert sorted(freeing) == sorted(self.hub.owed.elements())

    @invariant()
    def rule_caches_belong_to_open_sessions(self) -> None:
        hub = self.hub
        assert hub.computing is not None or {session for session, _ in hub.engine.caches} <= hub.seats.keys()

    @invariant()
    def rule_a_checkpoint_holds_the_state_between_two_steps(self) -> None:
        for point in (self.hub.durable, *self.hub.writing):
            if point is not None:
                assert point.hub_step == len(point.log)
                assert max(point.applied.values(), default=0) <= point.hub_step
                assert point.round_step <= self.recipe.round_steps + self.hub.overfull


class HonestOnly(Honest):
    """What holds as long as nobody is silent for longer than the grace."""

    @invariant()
    def rule_every_edge_can_go_back_to_every_checkpoint(self) -> None:
        for point in (self.hub.durable, *self.hub.writing):
            applied = point.applied if point is not None else {}
            answered = {item.key for item in point.answered} if point is not None else set()
            for edge in self.edges:
                steps = applied.get(edge.name, 0)
                kept = {at[0] for at in edge.disk}
                if edge.process is not None and edge.process.writing is not None:
                    kept.add(edge.process.writing.steps)
                told_again = edge.name in answered and steps - 1 in kept
                assert edge.done or not edge.disk or steps in kept or told_again

    @invariant()
    def rule_hub_and_edge_differ_by_one_step_at_most(self) -> None:
        for edge in self.edges:
            process = edge.process
            if process is not None and not process.lost and process.welcome.number == process._session:
                ahead = self.hub.applied.get(edge.name, 0) - edge.standing.steps
                assert ahead in (0, 1)

    @invariant()
    def rule_edges_lose_nothing(self) -> None:
        assert not any(edge.skips for edge in self.edges)

    @invariant()
    def rule_every_joined_step_is_that_of_an_undisturbed_run(self) -> None:
        (_, _, log, *_), _ = undisturbed(self.recipe)
        assert self.hub.engine.log == log[: len(self.hub.engine.log)]


class Quorum(HonestOnly):
    """Steps that do not wait for everybody: nothing is lost all the same. Who is in which step depends on time."""

    @initialize(recipe=recipes(quorum=True))
    def begin(self, recipe: Recipe) -> None:
        self.begin_with(recipe)

    @rule()
    def a_deadline_passes(self) -> None:
        self.hub.deadline_passes()

    def come_to_an_end(self) -> None:
        assert finish(self.hub, self.edges), "nobody waits for ever"
        assert all(edge.skips == 0 for edge in self.edges), "nothing that was learned is lost"
        assert {end for edge in self.edges for end in edge.ends} <= {"done"}, "no honest edge is sent away"

    def rule_every_joined_step_is_that_of_an_undisturbed_run(self) -> None:
        """There is none to compare with."""


class Disorder(Honest):
    """Silence, leaving, failures, deadlines, and a member that asks for what it should not."""

    @initialize(recipe=recipes() | recipes(quorum=True))
    def begin(self, recipe: Recipe) -> None:
        self.begin_with(recipe)

    @rule()
    def a_deadline_passes(self) -> None:
        self.hub.deadline_passes()

    def __init__(self) -> None:
        super().__init__()
        self.rogue = Rogue()

    @rule(pick=_PICK)
    def a_member_falls_silent(self, pick: int) -> None:
        seats = [seat.seat for seat in self.hub.seats.values() if seat.train]
        if seats:
            self.hub.silent(seats[pick % len(seats)])

    @rule(pick=_PICK)
    def a_member_is_heard(self, pick: int) -> None:
        seats = list(self.hub.seats)
        if seats:
            self.hub.heard(seats[pick % len(seats)])

    @rule(pick=_PICK)
    def a_session_is_closed(self, pick: int) -> None:
        seats = [seat.seat for seat in self.hub.seats.values() if seat.train]
        if seats:
            self.hub.gone(seats[pick % len(seats)])

    @rule(pick=_PICK)
    def an_edge_is_told_to_end(self, pick: int) -> None:
        edge = self.edge(pick)
        if edge.process is not None:
            number = edge.process.welcome.number
            edge.kill(written=True)
            if self.hub.knows(number):
                self.hub.ask(number, Ask("leave", content=False), ignore)

    @precondition(lambda self: len(self.edges) < 5)
    @rule(wanted=st.integers(1, 5))
    def an_edge_comes_late(self, wanted: int) -> None:
        self.edges.append(Edge(f"edge{9 - len(self.edges)}", wanted, False))
        self.edges[-1].start(self.hub)

    @precondition(lambda self: isinstance(self.hub.computing, act.RunForward | act.RunBackward))
    @rule(pick=_PICK)
    def a_computation_ends_badly(self, pick: int) -> None:
        action = self.hub.computing
        inside = [s for s, _ in action.payloads] if isinstance(action, act.RunForward) else list(action.gradients)
        self.hub.finish(inside[pick % len(inside)] if inside else None)

    @rule()
    def a_rogue_begins_anew(self) -> None:
        self.rogue.hello(self.hub)

    @rule(
        kind=st.sampled_from(["forward"] * 3 + ["gradient"] * 3 + ["infer", "upload", "await"]),
        offset=st.integers(-1, 1),
        content=st.integers(0, 1),
        part=st.sampled_from([(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]),
    )
    def a_rogue_asks(self, kind: str, offset: int, content: int, part: tuple[int, int]) -> None:
        self.rogue.ask(self.hub, kind, offset, content, part)

    @rule(content=st.integers(0, 1), ticks=st.integers(0, 12))
    def a_rogue_does_its_part(self, content: int, ticks: int) -> None:
        for _ in range(ticks + 1):
            self.rogue.play_along(self.hub, content)
            self.things_go_on(1, True)

    @rule(done=st.booleans())
    def a_rogue_leaves(self, done: bool) -> None:
        self.rogue.ask(self.hub, "leave", 0, done)

    def come_to_an_end(self) -> None:
        for seat in [seat.seat for seat in self.hub.seats.values() if seat.name == self.rogue.name]:
            self.hub.gone(seat)
        ended, state = finish(self.hub, self.edges), self.hub.scheduler.state
        # A cohort that has gone home has to gather again, and there may be too few edges left for one.
        too_few = state.phase is Phase.GATHERING and len(state.active) < state.cohort
        assert ended or too_few, "nobody waits for ever"


class Rogue:
    """A member that asks for steps and rounds around the right ones, with bytes of its choice."""

    name = "rogue"

    def __init__(self) -> None:
        self.number = 0
        self.hidden = Hidden("made up", Smashed(self.name, 0, ""))

    def hello(self, hub: ModelHub) -> None:
        self.number = hub.hello(self.name).number

    def ask(self, hub: ModelHub, kind: str, offset: int, content: int, part: tuple[int, int] = (0, 1)) -> None:
        if not hub.knows(self.number):
            self.hello(hub)
        welcome = hub.welcome(self.number)
        step, round_ = max(welcome.applied + offset, 0), max(welcome.round + offset, 0)
        asks = {
            "forward": Ask("forward", step, Smashed(self.name, step, str(content), part[0]), *part),
            "gradient": Ask("gradient", step, Gradient(step, self.hidden), *part),
            "infer": Ask("infer", content=(content, step)),
            "upload": Ask("upload", round_, Adapter(self.name, round_, str(content))),
            "await": Ask("await", round_),
            "leave": Ask("leave", content=bool(content)),
        }
        hub.ask(self.number, asks[kind], self.hear)

    def play_along(self, hub: ModelHub, content: int) -> None:
        """Ask for what is next, if nothing is asked for yet."""
        if not any(asked.number == self.number for asked in hub.open.values()):
            mine = [m for m in hub.scheduler.state.members.values() if m.name == self.name and m.inside is not None]
            if not mine:
                self.ask(hub, "forward", 0, content)
                return
            forwards = len(mine[0].hiddens.get(mine[0].inside or 0, {}))
            kind, micro = ("gradient", len(mine[0].grads)) if len(mine[0].grads) < forwards else ("forward", forwards)
            if micro < mine[0].micros:
                self.ask(hub, kind, 0, content, (micro, mine[0].micros))

    def hear(self, answer: object) -> None:
        if isinstance(answer, Hidden):
            self.hidden = answer


def ignore(_: object) -> None:
    """An answer that nobody waits for."""


def test_who_was_too_late_for_a_step_with_a_checkpoint_can_go_back_to_it() -> None:
    """It has not heard of its step yet that the checkpoint counts; the hub that comes after tells it."""
    recipe = Recipe((3, 3), 20, 0, ((2, 2), (1, 1)), quorum=1)
    hub, edges = recipe.hub(), recipe.edges()
    early, late = edges
    for edge in edges:
        edge.start(hub)
    while hub.applied.get(late.name, 0) < 1:
        for edge in edges:
            if edge.can_act:
                edge.act()
        if hub.computing is not None:
            hub.finish()
    hub.checkpoint_due()
    while not hub.writing:
        if early.can_act:
            early.act()
        hub.deadline_passes()
        if hub.computing is not None:
            hub.finish()
    hub.kill(written=1, published=False)
    for edge in edges:
        assert edge.process is not None
        edge.process.lose_mail()
    assert finish(hub, edges)
    assert [edge.skips for edge in edges] == [0, 0]


TestHonest = HonestOnly.TestCase
TestHonest.settings = _SETTINGS
TestQuorum = Quorum.TestCase
TestQuorum.settings = _SETTINGS
TestDisorder = Disorder.TestCase
TestDisorder.settings = _SETTINGS
