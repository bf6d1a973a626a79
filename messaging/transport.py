"""The two sides of a link as the code above them sees it, whatever carries the frames.

`hub_transport.py` and `edge_transport.py` do it over ZeroMQ, `memory.py` inside one process for tests.
A transport belongs to one thread: only `wake` may be called from another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Protocol

Buffer = bytes | memoryview

#: What CURVE adds to every frame: command name 8, nonce 8, authenticator 16, flags 1.
CURVE_BYTES = 33
#: How often `HubSide.look` has to be called: at the speed of CURVE, 60 MB come in between.
WATCH_S = 0.1


class Channel(IntEnum):
    """The three connections an edge can have: small and urgent, large, and enrolment only."""

    CTL = 0
    BULK = 1
    ENROL = 2


@dataclass(frozen=True, slots=True)
class Route:
    """The way back to one connection of one edge. It dies with the connection; a key outlives it."""

    channel: Channel
    routing_id: bytes
    #: the IP address at the other end, for logs; empty where it is not known
    address: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One multipart message at the hub. `key` is the sender's public key (Z85), proved by CURVE."""

    key: str
    route: Route
    frames: list[Buffer]


class SendResult(Enum):
    """SENT: handed to the transport. FULL: the peer reads too slowly, try later. GONE: no such connection."""

    SENT = 1
    FULL = 2
    GONE = 3


class FailReason(Enum):
    """Why an edge is not connected; the values are for the user."""

    NOT_ENROLLED = (
        "the hub does not know this edge's key, or it was revoked or replaced: ask who runs the hub (`hub edges` "
        "shows whom it knows); with a new join string, join with another --state"
    )
    HUB_TROUBLE = "the hub could not check the key just now"
    WRONG_HUB_KEY = (
        "what answers there has another key than the hub that this edge joined, or is no hub at all: if the hub's "
        "key was replaced (`hub rotate-key`), ask who runs it for a new join string and join with it, in this --state"
    )
    UNREACHABLE = "nothing answers at the hub's address"


@dataclass(frozen=True, slots=True)
class Connected:
    """The channel is up and both keys are proved."""

    channel: Channel


@dataclass(frozen=True, slots=True)
class Disconnected:
    """A channel that was up is down; it is dialled again without being asked."""

    channel: Channel


@dataclass(frozen=True, slots=True)
class ConnectFailed:
    """An attempt to connect failed. After NOT_ENROLLED only `reset` can bring the channel up again."""

    channel: Channel
    reason: FailReason


@dataclass(frozen=True, slots=True)
class Reachable:
    """While a dial got no answer, another attempt was accepted: after a `reset` the channels come up at once."""


LinkEvent = Connected | Disconnected | ConnectFailed | Reachable


@dataclass(slots=True)
class Traffic:
    """Bytes as they cross the socket (frames with CURVE and ZMTP framing), and messages thrown away."""

    received: int = 0
    sent: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Allowance:
    """Bytes that may have arrived and lie undelivered: of one connection, and of all connections together."""

    one: int
    all: int


@dataclass(frozen=True, slots=True)
class Offence:
    """A connection that was cut because `size` bytes of it lay undelivered, and what is known of its other end.

    `key` is None if it never said anything and the handshakes leave more than one choice. `endless`: it alone
    had more than any message may have; else all of them together had too much, and this one had most.
    """

    channel: Channel
    key: str | None
    address: str
    size: int
    endless: bool


class HubSide(Protocol):
    """Many edges, addressed by route."""

    traffic: Traffic
    #: Whether the bytes of each connection can be counted; if not, `unread` is 0 and `look` finds nothing.
    watches: bool

    def poll(self, timeout_s: float) -> list[Arrival]:
        """What arrived, ctl first, in bounded portions; waits up to `timeout_s` seconds if there is nothing."""

    def rest(self, seconds: float) -> None:
        """Leave what arrives alone for so long. A `wake` ends it, and the next `poll` too."""

    def send(self, route: Route, frames: Sequence[Buffer]) -> SendResult:
        """Send without waiting. Buffers of 64 KB and more are not copied: leave them unchanged afterwards."""

    def unread(self, route: Route, most: int) -> int:
        """Bytes sent that the peer's machine has not acknowledged. Exact if above `most`, else maybe less."""

    def cut(self, route: Route) -> str | None:
        """End a connection, and say whose it was if that is known. Its edge dials again."""

    def look(self, allowance: Allowance) -> list[Offence]:
        """Cut the connections that have more undelivered than allowed. Cheap; call it every `WATCH_S` seconds."""

    def wake(self) -> None:
        """Make a `poll` in progress, or else the next one, return at once. For any thread."""

    def close(self) -> None:
        """Close every connection; what was not sent yet is lost."""


class EdgeSide(Protocol):
    """One edge's connections to its hub."""

    traffic: Traffic

    def poll(self, timeout_s: float) -> list[tuple[Channel, list[Buffer]]]:
        """What arrived, ctl first. Returns empty after `timeout_s` seconds, a `wake` or a link event."""

    def send(self, channel: Channel, frames: Sequence[Buffer]) -> bool:
        """Send without waiting; False when not connected or full. The first send opens BULK (and gives False)."""

    def link_events(self) -> list[LinkEvent]:
        """What happened to the connections since the last call, oldest first."""

    def wake(self) -> None:
        """Make a `poll` in progress, or else the next one, return at once. For any thread."""

    def reset(self) -> None:
        """Throw all connections away and dial afresh; what was not sent yet is lost."""

    def use_key(self, hub_key: str) -> None:
        """Expect this public key (Z85) of the hub from the next `reset` on."""

    def close(self) -> None:
        """Close every connection; what was not sent yet is lost."""


def wire_bytes(frames: Sequence[Buffer]) -> int:
    """Bytes that these frames take on a TCP connection under CURVE, ZMTP's length fields included."""
    total = 0
    for frame in frames:
        size = len(frame) + CURVE_BYTES
        total += size + (2 if size < 256 else 9)
    return total
