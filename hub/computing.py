"""What the groups compute: actions go to their workers, and what comes back goes to those whom it concerns.

For the loop's thread alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from hub.desk import Desk
from hub.figures import Figures
from hub.filing import Filing
from hub.groups import Group, Groups
from hub.keeper import CheckpointWritten, Failure, Keeper, RoundMerged
from hub.ledger import Ledger
from hub.recovery import Recovery, ReplicasGone
from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.seating import Seating
from hub.sessions import Sessions
from hub.worker import Deposited, ReplicaBack, ReplicaDied, ReplicaGone, Report
from messaging.console import Journal


class Computing:
    """`failure` is what a hub cannot go on after."""

    def __init__(
        self,
        groups: Groups,
        keeper: Keeper,
        recovery: Recovery,
        sessions: Sessions,
        seating: Seating,
        ledger: Ledger,
        figures: Figures,
        filing: Filing,
        desk: Desk,
        journal: Journal,
        checkpoint_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._groups = groups
        self._keeper = keeper
        self._recovery = recovery
        self._sessions = sessions
        self._seating = seating
        self._ledger = ledger
        self._figures = figures
        self._filing = filing
        self._desk = desk
        self._journal = journal
        self._checkpoint_s = checkpoint_s
        self._clock = clock
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Let the workers begin."""
        for group in self._groups:
            group.worker.start()

    def begin(self, action: act.Compute, group: Group) -> None:
        """Hand an action to a group's worker."""
        if isinstance(action, act.RunForward):
            self._ledger.begins(action, self._sessions, group.number)
        elif isinstance(action, act.CloseRound):
            group.closing = action
        self._figures.began(action, group.number)
        # Going through all edges takes long where there are many, and a decoded token must not wait for it.
        keeps = isinstance(action, act.CloseRound) or (isinstance(action, act.RunForward) and action.checkpoint)
        progress = self._ledger.progress(group.state, self._sessions, group.number) if keeps else None
        group.worker.put(action, progress)

    def done(self, event: Report, number: int) -> None:
        """A group's worker reports."""
        group = self._groups[number]
        if isinstance(event, Failure):
            self.failure = event.error
            return
        self._figures.ended(number)
        match event:
            case Deposited():
                self._deposited(group)
            case ReplicaDied():
                self._recovery.died(group, event)
            case ReplicaBack():
                self._recovery.back(group, event)
            case ReplicaGone():
                self._gone(group, event)
            case _:
                self._computed(event, group)

    def _computed(self, event: ev.Event, group: Group) -> None:
        if isinstance(event, ev.StepApplied):
            self._figures.stepped(event)
            self._ledger.stepped(event, group.number)
            self._seating.catch_up()
        elif isinstance(event, ev.RoundPublished):
            self._groups.published(group)
        self._groups.decide(event, group.number)

    def _deposited(self, group: Group) -> None:
        actions = self._groups.deposited(group)
        if actions is not None:
            self._keeper.close_round(actions, self._seating.pinned())

    def _gone(self, group: Group, event: ReplicaGone) -> None:
        try:
            self._recovery.gone(group, event)
        except ReplicasGone as error:
            self.failure = error

    # -- what is on the disk ---------------------------------------------------------------------------

    def kept(self, event: CheckpointWritten | RoundMerged | Failure) -> None:
        """The keeper reports."""
        match event:
            case Failure():
                self.failure = event.error
            case CheckpointWritten():
                self._written(event)
            case RoundMerged():
                self._merged(event)

    def _written(self, event: CheckpointWritten) -> None:
        self._ledger.written(event)
        for group in self._groups if event.group is None else [self._groups[event.group]]:
            # Where one is due already, none more may become due before that one is on the disk: edges keep what
            # fits the two newest that were begun.
            if not group.state.checkpoint_due:
                group.checkpoint_at = self._clock() + self._checkpoint_s

    def _merged(self, event: RoundMerged) -> None:
        self._ledger.published()
        running = self._groups.running
        round_ = running[0].state.round + 1
        self._filing.run(partial(self._desk.round_over, round_))
        if len(self._groups) > 1:
            text = f"round {round_} published as adapter version {event.version}, of {len(running)} replicas"
            self._journal.log(text)
        for group in running:
            group.worker.begin_round(event, self._seating.pinned())

    def look(self, now: float) -> None:
        """Have checkpoints written that are due."""
        for group in self._groups:
            if now >= group.checkpoint_at:
                group.checkpoint_at = math.inf
                self._groups.decide(ev.CheckpointDue(), group.number)

    # -- the end ---------------------------------------------------------------------------------------

    def stop(self, wait_for_one: Callable[[], None]) -> None:
        """Finish what is computed, a round that is being closed included; `wait_for_one` takes in one report."""
        for group in self._groups:
            group.state.stopping = True
        while self._groups.merging and self.failure is None:
            wait_for_one()
        for group in self._groups:
            # One whose replica is being started again has nothing under way, and that may take long.
            if not group.down:
                group.worker.stop()

    def finish(self) -> None:
        """After `stop`: write the last checkpoint, and end the thread that writes. StoreError if the disk fails."""
        try:
            if self.failure is None:
                self._last_checkpoint()
        finally:
            self._keeper.finish()

    def _last_checkpoint(self) -> None:
        for group in self._groups.running:
            if not group.down:
                progress = self._ledger.progress(group.state, self._sessions, group.number)
                group.worker.leave_to_keeper(progress)
        self._keeper.write().result()
        step = sum(group.state.hub_step for group in self._groups)
        self._journal.log(f"checkpoint written at step {step}; start `hub serve` with the same --state to go on")
