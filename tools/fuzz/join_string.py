"""Target: join strings."""

from __future__ import annotations

from messaging.errors import InputError
from messaging.joining import HubAddress, JoinString
from messaging.transport import Channel


def run(data: bytes) -> None:
    """Any text, by itself or behind the prefix."""
    text = data.decode("utf-8", "surrogateescape")
    for given in (text, "fedsea1:" + text):
        try:
            joined = JoinString.parse(given)
        except InputError:
            continue
        assert JoinString.parse(joined.encode()) == joined
        assert joined.hub.endpoint(Channel.CTL).startswith("tcp://")


def seeds() -> list[bytes]:
    """Valid inputs to begin with."""
    key = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
    hubs = [HubAddress(host, 1, 2, 65535, key) for host in ("10.0.0.1", "hub.example.org", "fe80::1%eth0")]
    texts = [JoinString(hub, token).encode() for hub in hubs for token in (b"", bytes(16))]
    return [text.encode() for text in texts] + [text.removeprefix("fedsea1:").encode() for text in texts]
