"""The groups of edges: each has a replica of B, a scheduler and a compute thread. A hub without replicas has one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from hub.replicas import rounds
from hub.replicas.placement import Load, place
from hub.scheduler import Scheduler
from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.scheduler.state import Member, State
from hub.sessions import Session
from hub.worker import Worker


@dataclass(eq=False)
class Group:
    """One replica of B and the edges that it serves; for the loop's thread alone."""

    number: int
    scheduler: Scheduler
    worker: Worker
    #: when its next checkpoint is due; inf while one is due or being written
    checkpoint_at: float
    #: its replica died and is being started again
    down: bool = False
    #: its replica died for good
    gone: bool = False
    #: what its scheduler asked for the round that closes, and whether the keeper has all of it
    closing: act.CloseRound | None = None
    deposited: bool = False
    #: optimizer steps since the hub's start
    steps: int = 0
    #: when the time to gather for a joined step is over, and its number
    deadline: tuple[float, int] = (math.inf, 0)

    @property
    def name(self) -> str:
        """For the screen and the log."""
        return f"replica {self.number + 1}"

    @property
    def state(self) -> State:
        """Its scheduler's."""
        return self.scheduler.state


@dataclass(eq=False)
class Groups:
    """All groups by number, and what they do together. `decide` tells a group's scheduler of an event."""

    all: list[Group]
    decide: Callable[[ev.Event, int], None]
    #: the round closes: every group is to give what it has
    closing: bool = False
    #: all have given; the new adapter is being made, or loaded
    merging: bool = False
    _settling: bool = field(default=False, repr=False)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, number: int) -> Group:
        return self.all[number]

    @property
    def running(self) -> list[Group]:
        """Those whose replica is there, or comes back."""
        return [group for group in self.all if not group.gone]

    def state(self, number: int) -> State:
        """The state of a group's scheduler."""
        return self.all[number].state

    def members(self) -> Iterator[Member]:
        """The members of the cohort, in all groups."""
        return (member for group in self.all for member in group.state.members.values())

    def served(self, number: int | None = None) -> set[int]:
        """Adapter versions that a group's replica serves, or that any does."""
        chosen: Iterable[Group] = self.all if number is None else [self.all[number]]
        return set[int]().union(*(group.worker.engine.versions for group in chosen))

    def place(self, sessions: Iterable[Session], train: bool) -> int:
        """The group for a new session."""
        running = self.running
        if len(running) == 1:
            return running[0].number
        counts = {group.number: [0, 0] for group in running}
        for session in sessions:
            if session.group in counts:
                counts[session.group][not session.train] += 1
        return place({number: Load(*count) for number, count in counts.items()}, train)

    # -- deadlines -----------------------------------------------------------------------------------

    @property
    def next_deadline(self) -> float:
        """When the first of the groups stops waiting for edges that are late for a joined step; inf for none."""
        return min(group.deadline[0] for group in self.all)

    def pass_deadlines(self, now: float) -> None:
        """Tell those groups whose deadline is over."""
        for group in self.all:
            at, gathering = group.deadline
            if now >= at:
                group.deadline = (math.inf, 0)
                self.decide(ev.DeadlinePassed(gathering), group.number)

    # -- together ------------------------------------------------------------------------------------

    def settle(self) -> None:
        """After any event: let groups begin, or close the round, if that is due for all of them."""
        if len(self.all) == 1 or self._settling:
            return
        self._settling = True
        try:
            self._gather()
            running = self.running
            if not self.closing and rounds.may_close([group.state for group in running]):
                self.closing = True
                for group in running:
                    self.decide(ev.RoundCloses(), group.number)
        finally:
            self._settling = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Settle nothing before the end: in between, seats are empty that are about to be taken."""
        before, self._settling = self._settling, True
        try:
            yield
        finally:
            self._settling = before
        self.settle()

    def _gather(self) -> None:
        running = self.running
        states = [group.state for group in running]
        for place_, group in enumerate(running):
            active = rounds.elsewhere(states, place_)
            if active != group.state.elsewhere:
                self.decide(ev.OthersChanged(active), group.number)

    def deposited(self, group: Group) -> Sequence[act.CloseRound] | None:
        """A group has given what it has for the round; the actions of all of them once the last one has."""
        if not self.closing and len(self.all) > 1:
            self._free(group)
            return None
        group.deposited = True
        running = self.running
        if not all(other.deposited for other in running):
            return None
        self.closing = self.merging = True
        return [other.closing for other in running if other.closing is not None]

    def published(self, group: Group) -> None:
        """A group works with the new adapter."""
        group.closing, group.deposited = None, False
        if not any(other.closing is not None for other in self.running):
            self.closing = self.merging = False

    def reopen(self) -> None:
        """The round does not close yet: one of the groups has to take steps again."""
        self.closing = False
        for group in self.running:
            if group.deposited:
                self._free(group)
            self.decide(ev.RoundReopened(), group.number)

    def _free(self, group: Group) -> None:
        group.closing, group.deposited = None, False
        self.decide(ev.HousekeepingDone(), group.number)
