"""The hub's memory for bytes in work, shared out: each session gets credits, and they sum to the budget at most.

In work is a request from when it is taken until it is answered, an answer as long as it is recorded for a
repetition or waits for its socket, and a piece of a file that is being read for an edge. Pure: no sockets, no clock.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum, auto

from messaging.errors import ErrorCode, HubError
from messaging.messages import MAX_FRAME_BYTES

#: A session's credits: one frame at least; what keeps a link busy at most.
LEAST_BYTES = MAX_FRAME_BYTES
MOST_BYTES = 256 << 20


class Verdict(Enum):
    """TAKEN; LATER: there is no room just now; NEVER: there never is; BROKEN: more than any credits given allow."""

    TAKEN = auto()
    LATER = auto()
    NEVER = auto()
    BROKEN = auto()


@dataclass(eq=False)
class Account:
    """One session's part, in bytes."""

    #: requests in work
    outstanding: int = 0
    #: answers kept for a repetition
    recorded: int = 0
    #: the most credits that it was ever told: what it sent under those may still be on its way
    told: int = 0


class Credits:
    """The budget, in bytes. Whatever is taken has to be given back."""

    def __init__(self, budget: int) -> None:
        self.budget = max(budget, LEAST_BYTES)
        self._accounts: set[Account] = set()
        #: the credits of each session now
        self.share = self._share()
        self._loose: dict[Hashable, int] = {}
        self._held = 0

    @property
    def most_sessions(self) -> int:
        """How many sessions can have the least credits."""
        return self.budget // LEAST_BYTES

    def _share(self) -> int:
        return max(LEAST_BYTES, min(MOST_BYTES, self.budget // max(len(self._accounts), 1)))

    @property
    def in_work(self) -> int:
        """Bytes that are held now."""
        return self._held

    @property
    def room(self) -> int:
        """Bytes that may be taken now."""
        return max(self.budget - self._held, 0)

    def open(self, account: Account) -> None:
        """A session begins. HubError if there are credits for no more."""
        if len(self._accounts) >= self.most_sessions:
            text = f"the hub is full: its memory allows {self.most_sessions} sessions. Try again later"
            raise HubError(ErrorCode.FULL, text, self.most_sessions)
        self._accounts.add(account)
        self.share = self._share()
        account.told = self.share

    def close(self, account: Account) -> None:
        """A session ends; what was held for it is given back."""
        if account in self._accounts:
            self._accounts.remove(account)
            self.share = self._share()
            self._held -= account.outstanding + account.recorded
            account.outstanding = account.recorded = 0

    def tell(self, account: Account) -> int:
        """The credits to write into a message to this session."""
        share = self.share
        account.told = max(account.told, share)
        return share

    def take(self, account: Account, size: int) -> Verdict:
        """A request of `size` bytes is here. One at a time may be larger than the credits, if there is room."""
        if account.outstanding and account.outstanding + size > account.told:
            return Verdict.BROKEN
        if size > self.budget:
            return Verdict.NEVER
        if size > self.room:
            return Verdict.LATER
        if account in self._accounts:
            account.outstanding += size
            self._held += size
        return Verdict.TAKEN

    def give_back(self, account: Account, size: int) -> None:
        """A request of `size` bytes is answered."""
        if account in self._accounts:
            account.outstanding -= size
            self._held -= size

    def record(self, account: Account, recorded: int) -> None:
        """So many bytes of answers are kept for this session now."""
        if account in self._accounts:
            self._held += recorded - account.recorded
            account.recorded = recorded

    def hold(self, owner: Hashable, size: int) -> bool:
        """Bytes that belong to no session but to `owner`: one lot, or as many as a session's credits allow."""
        before = self._loose.get(owner, 0)
        if size > self.room or (before and before + size > self.share):
            return False
        self._loose[owner] = before + size
        self._held += size
        return True

    def release(self, owner: Hashable, size: int) -> None:
        """Bytes of `hold` are free again."""
        # A lot of no bytes may be the last to go: the owner is forgotten by then.
        left = self._loose.pop(owner, 0) - size
        if left:
            self._loose[owner] = left
        self._held -= size
