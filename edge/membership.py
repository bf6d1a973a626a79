"""Where an edge belongs, and with which keys: its own and the hub's, also while one of them is being replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from edge.state import EdgeState, Membership
from messaging.console import Journal
from messaging.enrol import enrol, lets_in
from messaging.errors import FedseaError, InputError, Refused
from messaging.joining import HubAddress, JoinString, read_join
from messaging.keys import KeyPair, is_key

#: How long to wait for a hub, to find out which of two keys it takes.
KNOCK_S = 10.0


def enrolled(state: EdgeState, journal: Journal, join: str | None, name: str, give_up_s: float) -> Membership:
    """Where this edge belongs; enrols it first if it is new there."""
    known = state.membership()
    if join is None:
        if known is None:
            raise InputError(f"{state.folder} is enrolled nowhere yet: give the join string that the hub printed")
        return known
    ticket: JoinString = read_join(join)
    if known is None:
        journal.log(f"enrolling at {ticket.hub.host}")
        membership = Membership(ticket.hub, enrol(ticket, state.keys(), name, give_up_s))
    elif ticket.hub.key == known.hub.key:
        # The same hub, perhaps at new ports: its key is what counts.
        membership = replace(known, hub=ticket.hub)
    else:
        if ticket.hub.key != known.next_key:
            _check_same(state, known, ticket.hub)
        journal.log("the hub has another key than before; it knows this edge")
        membership = replace(known, hub=ticket.hub, next_key=None)
    state.set_membership(membership)
    return membership


def _check_same(state: EdgeState, known: Membership, hub: HubAddress) -> None:
    """A hub that knows this edge's key is the one that it belongs to, whatever key the hub has. Refused: another."""
    text = f"{state.folder} belongs to another hub ({known.hub.host}): give another --state for this join string"
    try:
        same = lets_in(hub, state.keys(), KNOCK_S)
    except FedseaError as error:
        raise Refused(f"{text}, or a newer join string if its hub's key was replaced ({error})") from error
    if not same:
        raise Refused(text)


def settle(state: EdgeState, membership: Membership, timeout_s: float = KNOCK_S) -> bool:
    """If this edge's key was about to be replaced, find out whether the hub took the new one, and use it then.

    True if it did. As long as the hub does not know the new key it is kept, for it may be told of it still.
    """
    successor = state.next_keys()
    if successor is None or not _known(membership, successor, timeout_s):
        return False
    state.adopt_next_keys()
    return True


def _known(membership: Membership, keys: KeyPair, timeout_s: float) -> bool:
    """Whether the hub knows a key of this edge, whichever of its own keys it has."""
    hub = membership.hub
    if membership.next_key is None:
        return lets_in(hub, keys, timeout_s)
    try:
        return lets_in(hub, keys, timeout_s)
    except Refused:
        return lets_in(replace(hub, key=membership.next_key), keys, timeout_s)


class HubKey:
    """The hub's key while an edge is connected: the one in use, and the one announced for the hub's next start.

    For the network thread. `keep` is called with both whenever they have changed.
    """

    def __init__(self, hub: HubAddress, announced: str | None, keep: Callable[[str, str | None], None]) -> None:
        self._proved = self._dialled = hub.key
        self._announced = announced
        self._keep = keep

    def announced(self, key: str) -> None:
        """The hub, proved to be it, says which key it has from its next start on."""
        if is_key(key) and key not in (self._proved, self._announced):
            self._announced = key
            self._keep(self._proved, key)

    def other(self) -> str | None:
        """The key to expect when what answers has not the one that was dialled; None if there is no other."""
        if self._announced is None:
            return None
        self._dialled = self._announced if self._dialled == self._proved else self._proved
        return self._dialled

    def proved(self) -> None:
        """What answers has the key that was dialled."""
        if self._dialled != self._proved:
            self._proved, self._announced = self._dialled, None
            self._keep(self._proved, None)
