"""Enrolment against a hub on loopback, and the words for each way it fails."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from messaging.enrol import enrol, lets_in
from messaging.errors import ErrorCode, HubUnreachable, ProtocolError, Refused
from messaging.framing import decode, encode
from messaging.joining import JoinString
from messaging.keys import new_keys
from messaging.messages import ENROL_TO_HUB, Enrol, Enrolled, Error, Packet
from messaging.transport import Buffer

TOKEN = b"0123456789abcdef"
Reply = Callable[[Enrol, str], "Packet | list[Buffer]"]


@contextmanager
def answering(hub, reply: Reply) -> Iterator[JoinString]:
    """A hub that answers Enrol with what `reply` gives."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            for arrival in hub.transport.poll(0.1):
                packet = decode(arrival.frames, ENROL_TO_HUB)
                answer = reply(packet.message, arrival.key)
                if isinstance(answer, Packet):
                    answer = encode(replace(answer, envelope=packet.envelope))
                hub.transport.send(arrival.route, answer)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield JoinString(hub.address, TOKEN)
    finally:
        stop.set()
        thread.join()


def test_the_token_binds_the_key(hub) -> None:
    keys = new_keys()
    seen = []

    def reply(message: Enrol, key: str) -> Packet:
        seen.append((message, key))
        return Packet(Enrolled("ward 3 (2)"))

    with answering(hub, reply) as join:
        assert enrol(join, keys, "ward 3", 5) == "ward 3 (2)"
    assert seen == [(Enrol(TOKEN, "ward 3"), keys.public)]


def test_a_spent_token(hub) -> None:
    error = Packet(Error(ErrorCode.TOKEN, 0, "used up: ask for another"))
    with answering(hub, lambda message, key: error) as join, pytest.raises(Refused, match="used up: ask for another"):
        enrol(join, new_keys(), "ward 3", 30)


def test_another_refusal(hub) -> None:
    error = Packet(Error(ErrorCode.SHUTDOWN, 0, "going down"))
    with answering(hub, lambda message, key: error) as join, pytest.raises(Refused, match="going down"):
        enrol(join, new_keys(), "ward 3", 30)


def test_a_hub_of_another_version(hub) -> None:
    with (
        answering(hub, lambda message, key: [b"\x92\x63\x63"]) as join,
        pytest.raises(ProtocolError, match="version 99"),
    ):
        enrol(join, new_keys(), "ward 3", 30)


def test_the_join_string_of_another_hub(hub) -> None:
    join = JoinString(replace(hub.address, key=new_keys().public), TOKEN)
    with pytest.raises(Refused, match="is the join string of this hub"):
        enrol(join, new_keys(), "ward 3", 30)


def test_nobody_there(hub) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        join = JoinString(replace(hub.address, enrol=closed.getsockname()[1]), TOKEN)
        with pytest.raises(HubUnreachable, match="is it running"):
            enrol(join, new_keys(), "ward 3", 0.4)


def test_whether_a_key_is_let_in(hub) -> None:
    assert lets_in(hub.address, hub.enrolled(), 30)
    assert not lets_in(hub.address, new_keys(), 30)
    with pytest.raises(Refused, match="another key"):
        lets_in(replace(hub.address, key=new_keys().public), hub.enrolled(), 30)


def test_a_list_that_fails_for_a_while_is_asked_again(hub) -> None:
    keys = hub.enrolled()
    hub.names.broken = True
    mended = threading.Timer(0.5, setattr, (hub.names, "broken", False))
    mended.start()
    assert lets_in(hub.address, keys, 10)
    mended.join()
    hub.names.broken = True
    with pytest.raises(HubUnreachable):
        lets_in(hub.address, keys, 0.5)
