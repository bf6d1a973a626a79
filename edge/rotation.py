"""`edge rotate-key`: a new key pair in the place of the one that this edge has.

    1. the new pair is written beside the old one, as edge-next.key
    2. the hub is told of it over a connection that the old key has proved; it puts one in the place of the other
    3. the hub is dialled with the new key; when it lets that in, the new pair becomes edge.key

Whatever is killed in between, the next command dials with the new key first and so finds out how far it came
(`membership.settle`). The new pair is never thrown away before the hub has let it in, and never made a second
time: the message that tells the hub of it may still be on its way.
"""

from __future__ import annotations

from contextlib import closing

import messaging.messages as m
from edge.client import HubClient
from edge.membership import settle
from edge.state import EdgeState, Membership
from messaging.console import Journal
from messaging.edge_transport import EdgeTransport
from messaging.errors import FedseaError, InputError, Refused

_ASK_S = 15.0


def rotate_key(state: EdgeState, journal: Journal) -> str:
    """Replace this edge's key; what to tell the user.

    InputError if it is enrolled nowhere or trains just now; Refused or HubUnreachable if it keeps the old key.
    """
    with state.training():
        membership = state.membership()
        if membership is None:
            raise InputError(f"{state.folder} is enrolled nowhere yet: there is no key to replace")
        if not settle(state, membership):
            refused = _tell(state, membership, state.make_next_keys().public, journal)
            if not settle(state, membership):
                raise refused or Refused("the hub did not take the new key; the old one stays: try again")
        return f"{membership.name} has a new key: {state.keys().public}; the old one is good no more"


def _tell(state: EdgeState, membership: Membership, key: str, journal: Journal) -> FedseaError | None:
    """Have the hub put `key` in the place of the present one. What went wrong, if anything is known to have."""
    with closing(HubClient(EdgeTransport(membership.hub, state.keys()), journal, _ASK_S)) as client:
        try:
            client.ask(m.ReplaceKey(key), m.KeyReplaced, deadline_s=_ASK_S)
        except FedseaError as error:
            return error
    return None
