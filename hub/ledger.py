"""How far every edge's training is: what B's optimizer has applied, and what of it a checkpoint holds.

The loop's thread owns it. Keys are public keys: an edge keeps its count over sessions and restarts.
"""

from __future__ import annotations

from collections.abc import Mapping

from hub.jobs import StepItem
from hub.keeper import CheckpointWritten, Progress
from hub.membership import MemberNote, answered_of
from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.scheduler.state import Phase, State
from hub.sessions import Sessions


class Ledger:
    """`applied` and `round_tokens` as the loaded checkpoint has them; `home`: the group where an edge trained last."""

    def __init__(
        self, applied: Mapping[str, int], round_tokens: Mapping[str, int], home: Mapping[str, int] | None = None
    ) -> None:
        self._applied = dict(applied)
        self._home = dict(home or {})
        #: in the newest checkpoint that was begun, and in the newest that is safe on the disk
        self._begun, self._durable = dict(applied), dict(applied)
        #: target tokens of each edge's applied steps in the open round: the most that its adapter may weigh
        self._round_tokens = dict(round_tokens)
        #: who is inside the joined step that a group computes now: (key, steps applied when it is done, tokens) by seat
        self._stepping: dict[int, dict[int, tuple[str, int, int]]] = {}

    def applied(self, key: str) -> int:
        """Steps of an edge that B's optimizer has applied."""
        return self._applied.get(key, 0)

    def begun(self, key: str) -> int:
        """Steps of an edge in the newest checkpoint that was begun."""
        return self._begun.get(key, 0)

    def durable(self, key: str) -> int:
        """Steps of an edge in the newest checkpoint on the disk."""
        return self._durable.get(key, 0)

    def home(self, key: str) -> int:
        """The group that an edge trained in last: what it did is inside that group's replica."""
        return self._home.get(key, 0)

    def move(self, key: str, group: int) -> None:
        """An edge trains in this group from now on."""
        self._home[key] = group

    def inside(self, key: str) -> bool:
        """Whether the joined step that an edge's group computes now was begun with it, and may yet count for it."""
        return any(key == inside for inside, _, _ in self._stepping.get(self.home(key), {}).values())

    def _of_group(self, counts: Mapping[str, int], group: int) -> dict[str, int]:
        return {key: count for key, count in counts.items() if self.home(key) == group}

    def rewind(self, group: int, applied: Mapping[str, int], round_tokens: Mapping[str, int]) -> None:
        """A group goes back to where it saved last."""
        for mine, saved in ((self._applied, applied), (self._begun, applied), (self._round_tokens, round_tokens)):
            for key in self._of_group(mine, group):
                mine.pop(key)
            mine.update(self._of_group(saved, group))
        self._stepping.pop(group, None)

    def round_tokens(self, key: str) -> int:
        """Target tokens of an edge's applied steps in the open round."""
        return self._round_tokens.get(key, 0)

    def weight(self, key: str, claimed: int) -> int:
        """The target tokens that an edge's adapter weighs: those that the hub saw of it, whatever it claims."""
        return min(claimed, self.round_tokens(key))

    def begins(self, action: act.RunForward, sessions: Sessions, group: int = 0) -> None:
        """The joined forward of a micro-batch is handed to the compute thread."""
        if not action.micro:
            self._stepping[group] = {}
        stepping = self._stepping.setdefault(group, {})
        for seat, item in action.payloads:
            session = sessions.find(seat)
            if session is not None and isinstance(item, StepItem):
                before = stepping[seat][2] if seat in stepping else 0
                stepping[seat] = (session.key, self.applied(session.key) + 1, before + item.tokens)
        if action.checkpoint:
            self._begun.update(self._of_group(self._applied, group))

    def stepped(self, event: ev.StepApplied, group: int = 0) -> None:
        """The optimizer has stepped, whether or not the edges are still there to hear of it."""
        stepping = self._stepping.pop(group, {})
        for seat in event.sessions:
            if seat in stepping:
                key, applied, tokens = stepping[seat]
                self._applied[key] = applied
                self._round_tokens[key] = self._round_tokens.get(key, 0) + tokens

    def published(self) -> None:
        """A round is closed."""
        self._round_tokens = {}
        self._begun = dict(self._applied)

    def written(self, checkpoint: CheckpointWritten) -> None:
        """A checkpoint is on the disk."""
        self._durable = dict(checkpoint.applied)

    def progress(self, state: State, sessions: Sessions, group: int = 0) -> Progress:
        """All of a group as of now, for a checkpoint, with what its edges may not have heard."""
        seated = [(member, sessions.find(member.session)) for member in state.members.values()]
        here = [(member, session) for member, session in seated if session is not None]
        answered = [answered_of(member, session.key) for member, session in here]
        return Progress(
            state.hub_step,
            state.round,
            state.round_step,
            state.version,
            self._of_group(self._applied, group),
            self._of_group(self._round_tokens, group),
            tuple(MemberNote(s.key, s.partition, member.contributes, member.left) for member, s in here),
            state.phase is not Phase.GATHERING,
            tuple(item for item in answered if item is not None),
        )
