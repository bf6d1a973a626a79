"""Keeps the hub's memory from those who would fill it, and says on the screen who was cut off and why."""

from __future__ import annotations

from collections import Counter

from hub.desk import Desk
from hub.post import Post
from hub.store.access import AccessList
from messaging.console import Journal
from messaging.errors import ErrorCode, HubError
from messaging.transport import Allowance, HubSide, Offence

#: What lies undelivered of an edge that keeps to its credits, where those are larger than any one request.
_CREDITS_BYTES = 256 << 20
#: Who sends what there is no room for so often, although it was told, does it on purpose.
_MOST_STRIKES = 3


class Guard:
    """Carries out what the transport and the post find. For the loop's thread."""

    def __init__(
        self,
        transport: HubSide,
        post: Post,
        access: AccessList,
        desk: Desk,
        journal: Journal,
    ) -> None:
        self._transport = transport
        self._post = post
        self._access = access
        self._credits = desk.credits
        self._one = max(desk.largest_request, _CREDITS_BYTES)
        self._journal = journal
        #: edges, by the key that they enrolled with, that were cut off for want of room and have to hear of it
        self._unheard: set[str] = set()
        self._strikes: Counter[str] = Counter()
        if not transport.watches:
            journal.log(
                "this system does not count the bytes of connections: an enrolled edge could fill this hub's memory. "
                "Run it where memory can be limited, or on Linux"
            )

    def look(self) -> None:
        """Cut off who has to be. Call it every `WATCH_S` seconds."""
        for offence in self._transport.look(Allowance(self._one, self._credits.room)):
            self._punish(offence)
        if self._post.waiting:
            for stuck in self._post.cut_stuck():
                name = None if stuck.key is None else self._access.name_of(stuck.key)
                text = f"{name or 'an edge'} was cut off: it does not read its answers ({stuck.unread >> 20} MB unread)"
                self._cut_off(text, stuck.key, "")

    def check(self, key: str) -> None:
        """Before a session begins. HubError, once, if this edge was cut off for the size of its request."""
        if key in self._unheard:
            self._unheard.discard(key)
            raise too_large(self._credits.budget)

    def _punish(self, offence: Offence) -> None:
        name = None if offence.key is None else self._access.name_of(offence.key)
        megabytes = offence.size >> 20
        if name is None:
            where = offence.address or "an unknown address"
            text = f"a connection from {where} was cut off: it sent {megabytes} MB without an end"
            self._cut_off(text, offence.key, offence.address)
        elif offence.endless:
            text = f"{name} was cut off and its key revoked: it sent {megabytes} MB without an end"
            self._cut_off(text, offence.key, offence.address)
            self._access.revoke(name)
        else:
            assert offence.key is not None
            self._no_room(offence.key, offence.address, name, megabytes)

    def _no_room(self, key: str, address: str, name: str, megabytes: int) -> None:
        """An honest edge stops when it hears of it."""
        origin = self._access.origin_of(key)
        self._unheard.add(origin)
        self._strikes[origin] += 1
        if self._strikes[origin] < _MOST_STRIKES:
            self._cut_off(f"{name} was cut off: there was no room for the {megabytes} MB that it sent", key, address)
            return
        text = f"{name} was cut off and its key revoked: {_MOST_STRIKES} times there was no room for it"
        self._cut_off(text, key, address)
        self._access.revoke(name)

    def _cut_off(self, text: str, key: str | None, address: str) -> None:
        self._journal.log(text)
        self._access.note_cut_off(text, key, address)


def cohort_too_large(budget: int) -> HubError:
    """A step for which there will be no room, because the others of its cohort wait for it, and what to do."""
    text = (
        f"the hub has {budget >> 20} MB for all requests in work, and the steps of its cohort need more together: "
        "take a smaller batch, or ask who runs the hub for a smaller --cohort"
    )
    return HubError(ErrorCode.CREDITS, text, budget)


def too_large(budget: int) -> HubError:
    """A request that the hub can never take, or not now, and what to do."""
    megabytes = budget >> 20
    text = f"the hub has {megabytes} MB for all requests in work and no room for one this large: take a smaller batch"
    return HubError(ErrorCode.CREDITS, text, budget)
