"""The edge's enrolment: show the join string's token once, and this key is on the hub's allow-list.

And how an edge finds out whether it is.
"""

from __future__ import annotations

import time

import zmq

from messaging.edge_transport import Connection
from messaging.errors import ErrorCode, FedseaError, HubError, HubUnreachable, ProtocolError, Refused
from messaging.exchange import hub_error
from messaging.framing import decode, encode
from messaging.joining import HubAddress, JoinString
from messaging.keys import KeyPair
from messaging.messages import ENROL_TO_EDGE, UNORDERED_BASE, Enrol, Enrolled, Envelope, Error, Packet
from messaging.sockets import Context, milliseconds
from messaging.transport import Buffer, Channel, Connected, ConnectFailed, FailReason

#: A hub that is just stopping hangs up too; one that hangs up this often in a row is another one.
_WRONG_KEY_TRIES = 3
_AGAIN_S = 0.25


def enrol(join: JoinString, keys: KeyPair, name: str, timeout_s: float) -> str:
    """Enrol `keys.public` at the hub under `name`; the name that the hub gave it.

    Refused: the token is spent, or what answers is not this hub. HubUnreachable: nothing answered in time.
    """
    context = zmq.Context()
    try:
        connection = Connection(context, join.hub, keys, Channel.ENROL)
        try:
            return _Enrolment(connection, join, name).run(time.monotonic() + timeout_s)
        finally:
            connection.close()
    finally:
        context.term()


def lets_in(hub: HubAddress, keys: KeyPair, timeout_s: float) -> bool:
    """Whether the hub lets `keys.public` in as an enrolled edge.

    Refused: what answers is not this hub. HubUnreachable: nothing answered in time.
    """
    context = zmq.Context()
    wrong_keys, deadline = 0, time.monotonic() + timeout_s
    try:
        while time.monotonic() < deadline:
            match _dial(context, hub, keys, deadline):
                case True:
                    return True
                case FailReason.NOT_ENROLLED:
                    return False
                case FailReason.WRONG_HUB_KEY:
                    wrong_keys += 1
            if wrong_keys >= _WRONG_KEY_TRIES:
                raise Refused(FailReason.WRONG_HUB_KEY.value)
            time.sleep(_AGAIN_S)
    finally:
        context.term()
    raise HubUnreachable(f"the hub does not answer at {hub.host}, port {hub.ctl}: is it running?")


def _dial(context: Context, hub: HubAddress, keys: KeyPair, deadline: float) -> FailReason | bool:
    """One attempt: True for a connection that both sides have proved, False for none in time."""
    connection = Connection(context, hub, keys, Channel.CTL)
    try:
        while (left := deadline - time.monotonic()) > 0:
            connection.monitor.poll(milliseconds(left))
            for event in connection.events():
                if isinstance(event, Connected):
                    return True
                if isinstance(event, ConnectFailed):
                    return event.reason
        return False
    finally:
        connection.close()


class _Enrolment:
    """One request, sent again whenever the connection is made anew, until it is answered."""

    def __init__(self, connection: Connection, join: JoinString, name: str) -> None:
        self._connection = connection
        self._where = f"{join.hub.host}, port {join.hub.enrol}"
        self._request = encode(Packet(Enrol(join.token, name), Envelope(request=UNORDERED_BASE)))
        self._wrong_keys = 0
        self._poller = zmq.Poller()
        self._poller.register(connection.sock, zmq.POLLIN)
        self._poller.register(connection.monitor, zmq.POLLIN)

    def run(self, deadline: float) -> str:
        """The name that the hub gives, before the clock shows `deadline`."""
        while (left := deadline - time.monotonic()) > 0:
            ready = dict(self._poller.poll(milliseconds(left)))
            for event in self._connection.events():
                if isinstance(event, Connected):
                    self._connection.sock.send_multipart(self._request, zmq.DONTWAIT)
                elif isinstance(event, ConnectFailed):
                    self._on_failure(event.reason)
            if self._connection.sock in ready:
                return self._on_reply(self._connection.receive()[0])
        raise HubUnreachable(f"the hub does not answer at {self._where}: is it running, and is that port open?")

    def _on_failure(self, reason: FailReason) -> None:
        self._wrong_keys = self._wrong_keys + 1 if reason is FailReason.WRONG_HUB_KEY else 0
        if self._wrong_keys >= _WRONG_KEY_TRIES:
            raise Refused(
                f"what answers at {self._where} has another key: is the join string of this hub, and not from "
                "before its key was replaced? If in doubt, ask who runs it for a new one"
            )
        if reason in (FailReason.NOT_ENROLLED, FailReason.HUB_TROUBLE):
            raise Refused(f"the hub at {self._where} takes no enrolment now: {reason.value}")

    def _on_reply(self, frames: list[Buffer]) -> str:
        message = decode(frames, ENROL_TO_EDGE).message
        match message:
            case Enrolled():
                return message.name
            case Error():
                raise _refusal(hub_error(message))
            case _:
                raise ProtocolError(f"the hub answered Enrol with {type(message).__name__}")


def _refusal(error: HubError) -> FedseaError:
    if error.code is ErrorCode.TOKEN:
        return Refused(str(error))
    return Refused(f"the hub refuses to enrol this edge: {error}")
