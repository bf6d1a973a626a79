"""What becomes of a group whose replica died: it goes back to where it saved last, there or in other groups."""

from __future__ import annotations

from collections.abc import Sequence

from hub.groups import Group, Groups
from hub.keeper import Keeper
from hub.ledger import Ledger
from hub.membership import Answered, MemberNote, answers_from_tensors, notes_from_json
from hub.scheduler import Scheduler
from hub.scheduler import events as ev
from hub.scheduler.state import Phase, State
from hub.seating import Seating
from hub.sessions import Sessions
from hub.store.checkpoints import Checkpoint
from hub.store.published import AdapterStore
from hub.worker import ReplicaBack, ReplicaDied, ReplicaGone
from messaging.console import Journal
from messaging.errors import FedseaError


class ReplicasGone(FedseaError):
    """No replica runs any more, and none can be started."""


class Recovery:
    """For the loop's thread alone. To its edges the death of a replica is what a restart of the hub is."""

    def __init__(
        self,
        groups: Groups,
        keeper: Keeper,
        sessions: Sessions,
        seating: Seating,
        ledger: Ledger,
        published: AdapterStore,
        journal: Journal,
    ) -> None:
        self._groups = groups
        self._keeper = keeper
        self._sessions = sessions
        self._seating = seating
        self._ledger = ledger
        self._published = published
        self._journal = journal

    def died(self, group: Group, event: ReplicaDied) -> None:
        """Take the group back to where it saved last, and have its replica started again."""
        part = self._keeper.part(group.number)
        self._ledger.rewind(group.number, self._keeper.applied(), self._keeper.round_tokens())
        notes = self._notes(group)
        back = f", whose edges go back to its step {part.hub_step}" if notes else ""
        self._journal.log(f"{event.why}: starting it again{back}")
        _, answered, gathered = seats_of(part)
        gathered = gathered or group.state.phase is not Phase.GATHERING
        with self._groups.held():
            self._end_sessions(group, event.why)
            group.down = True
            group.scheduler = Scheduler(state_at(part, group.state))
            group.state.busy = True
            if self._groups.merging:
                # It has given what it had, and its part is that of the next round.
                self._groups.published(group)
            else:
                group.closing, group.deposited = None, False
                self._groups.reopen()
            self._seating.restore(notes, answered, gathered, group.number)
        versions = {kept.version: kept.tensors() for kept in self._published.kept() if kept.version <= part.version}
        group.worker.revive(part, versions)

    def back(self, group: Group, event: ReplicaBack) -> None:
        """Its replica runs again: take up what its edges have asked for since."""
        group.down = False
        self._journal.log(f"{group.name} is back at step {group.state.hub_step} ({event.where})")
        self._groups.decide(ev.HousekeepingDone(), group.number)

    def gone(self, group: Group, event: ReplicaGone) -> None:
        """Move the group's edges to the others. What its replica had trained counts in the next average."""
        notes, part = self._notes(group), self._keeper.part(group.number)
        _, answered, _ = seats_of(part)
        self._end_sessions(group, event.why)
        group.down, group.gone = False, True
        group.scheduler = Scheduler(state_at(part, group.state))
        if not self._groups.running:
            raise ReplicasGone(f"{event.why}: no replica is left. Start the hub again, it goes on where it saved last")
        moved: dict[int, list[str]] = {}
        with self._groups.held():
            if notes and not self._groups.merging:
                self._groups.reopen()
            for note in notes:
                target = self._groups.place(self._sessions, True)
                self._seating.take_in(note, answered, target)
                moved.setdefault(target, []).append(note.key)
        where = ", ".join(f"{len(keys)} to {self._groups[g].name}" for g, keys in sorted(moved.items()))
        self._journal.log(f"{event.why}; it cannot be started again. Edges moved: {where or 'none'}")

    def _notes(self, group: Group) -> list[MemberNote]:
        """Who trains in a group: as it saved last, and who has come since."""
        saved, _, _ = seats_of(self._keeper.part(group.number))
        notes = {note.key: note for note in saved if self._ledger.home(note.key) == group.number}
        for session in self._sessions:
            if session.train and session.group == group.number and session.seat in group.state.members:
                contributes = bool(self._ledger.round_tokens(session.key))
                notes.setdefault(session.key, MemberNote(session.key, session.partition, contributes, False))
        return self._seating.waited_for(notes.values())

    def _end_sessions(self, group: Group, why: str) -> None:
        for session in self._sessions:
            if session.group == group.number:
                self._seating.drop(session, why)


def state_at(part: Checkpoint, like: State) -> State:
    """The state of a scheduler that goes on from a part, by the same recipe as another one."""
    return State(
        cohort=like.cohort,
        round_steps=like.round_steps,
        rounds=like.rounds,
        quorum=like.quorum,
        hub_step=part.hub_step,
        round=part.round,
        round_step=part.round_step,
        version=part.version,
        joint=like.joint,
        elsewhere=like.elsewhere,
    )


def seats_of(part: Checkpoint) -> tuple[Sequence[MemberNote], Sequence[Answered], bool]:
    """Who trained when a part was saved, what they may not have heard, and whether the cohort had begun."""
    answered = answers_from_tensors(part.blobs, part.extra["answered"])
    return notes_from_json(part.extra["members"]), answered, part.extra["gathered"]
