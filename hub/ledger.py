"""How far every edge's training is: what B's optimizer has applied, and what of it a checkpoint holds.

The loop's thread owns it. Keys are public keys: an edge keeps its count over sessions and restarts.
"""

from __future__ import annotations

from collections.abc import Mapping

from hub.jobs import StepItem
from hub.membership import MemberNote, answered_of
from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.scheduler.state import Phase, State
from hub.sessions import Sessions
from hub.worker import CheckpointWritten, Progress


class Ledger:
    """`applied` and `round_tokens` as the loaded checkpoint has them."""

    def __init__(self, applied: Mapping[str, int], round_tokens: Mapping[str, int]) -> None:
        self._applied = dict(applied)
        #: in the newest checkpoint that was begun, and in the newest that is safe on the disk
        self._begun, self._durable = dict(applied), dict(applied)
        #: target tokens of each edge's applied steps in the open round: the most that its adapter may weigh
        self._round_tokens = dict(round_tokens)
        #: who is inside the joined step that is computed now: seat -> (key, steps applied when it is done, tokens)
        self._stepping: dict[int, tuple[str, int, int]] = {}

    def applied(self, key: str) -> int:
        """Steps of an edge that B's optimizer has applied."""
        return self._applied.get(key, 0)

    def begun(self, key: str) -> int:
        """Steps of an edge in the newest checkpoint that was begun."""
        return self._begun.get(key, 0)

    def durable(self, key: str) -> int:
        """Steps of an edge in the newest checkpoint on the disk."""
        return self._durable.get(key, 0)

    def round_tokens(self, key: str) -> int:
        """Target tokens of an edge's applied steps in the open round."""
        return self._round_tokens.get(key, 0)

    def weight(self, key: str, claimed: int) -> int:
        """The target tokens that an edge's adapter weighs: those that the hub saw of it, whatever it claims."""
        return min(claimed, self.round_tokens(key))

    def begins(self, action: act.RunForward, sessions: Sessions) -> None:
        """The joined forward of a micro-batch is handed to the compute thread."""
        if not action.micro:
            self._stepping = {}
        for seat, item in action.payloads:
            session = sessions.find(seat)
            if session is not None and isinstance(item, StepItem):
                before = self._stepping[seat][2] if seat in self._stepping else 0
                self._stepping[seat] = (session.key, self.applied(session.key) + 1, before + item.tokens)
        if action.checkpoint:
            self._begun = dict(self._applied)

    def stepped(self, event: ev.StepApplied) -> None:
        """The optimizer has stepped, whether or not the edges are still there to hear of it."""
        for seat in event.sessions:
            if seat in self._stepping:
                key, applied, tokens = self._stepping[seat]
                self._applied[key] = applied
                self._round_tokens[key] = self._round_tokens.get(key, 0) + tokens

    def published(self) -> None:
        """A round is closed."""
        self._round_tokens = {}
        self._begun = dict(self._applied)

    def written(self, checkpoint: CheckpointWritten) -> None:
        """A checkpoint is on the disk."""
        self._durable = dict(checkpoint.applied)

    def progress(self, state: State, sessions: Sessions) -> Progress:
        """Everything as of now, for a checkpoint, with what edges may not have heard."""
        seated = [(member, sessions.find(member.session)) for member in state.members.values()]
        here = [(member, session) for member, session in seated if session is not None]
        answered = [answered_of(member, session.key) for member, session in here]
        return Progress(
            state.hub_step,
            state.round,
            state.round_step,
            state.version,
            dict(self._applied),
            dict(self._round_tokens),
            tuple(MemberNote(s.key, s.partition, member.contributes, member.left) for member, s in here),
            state.phase is not Phase.GATHERING,
            tuple(item for item in answered if item is not None),
        )
