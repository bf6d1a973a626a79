"""A hub that refuses this edge's key: whatever is asked fails with the reason, also what is asked later."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

import messaging.messages as m
from edge.client import HubClient
from messaging.console import Journal
from messaging.errors import Refused
from messaging.transport import Buffer, Channel, ConnectFailed, FailReason, LinkEvent, Traffic


class Refusing:
    """An `EdgeSide` that is refused when it dials, and then hears nothing more, as libzmq's sockets are."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        self.told = False

    def poll(self, timeout_s: float) -> list[tuple[Channel, list[Buffer]]]:
        time.sleep(min(timeout_s, 0.01))
        return []

    def send(self, channel: Channel, frames: Sequence[Buffer]) -> bool:
        return False

    def link_events(self) -> list[LinkEvent]:
        if self.told:
            return []
        self.told = True
        return [ConnectFailed(Channel.CTL, FailReason.NOT_ENROLLED)]

    def wake(self) -> None:
        pass

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_what_is_asked_after_a_refusal_fails_with_its_reason() -> None:
    transport = Refusing()
    client = HubClient(transport, Journal())
    try:
        deadline = time.monotonic() + 10
        while not transport.told and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        with pytest.raises(Refused, match="revoked"):
            client.submit(m.Describe(1, 1, "test")).result(timeout=5)
    finally:
        client.close()
