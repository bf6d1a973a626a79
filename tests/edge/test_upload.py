"""Uploading the adapter: only what the hub lacks, several pieces at a time, and again what it lost."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

import pytest

from edge import upload
from edge.upload import Uploading
from hub.receptions import Receptions
from messaging.console import Task
from messaging.errors import HubUnreachable, ProtocolError
from messaging.framing import decode, encode
from messaging.messages import TO_HUB, AnyMessage, Bye, Packet, Upload, UploadAck

DATA = bytes(range(256)) * 40
SMALL = 1000


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "CHUNK_BYTES", SMALL)


class Hub:
    """Takes uploads in this process, through the wire's own encoding; answers when it is asked for the answer."""

    def __init__(self) -> None:
        self.receptions = Receptions(1 << 20)
        self.asked: list[Upload] = []
        self.file: bytes | None = None
        self.loses: set[int] = set()
        self.dies_after = 10**9

    def submit(self, message: AnyMessage) -> Future[Any]:
        got = decode([bytes(frame) for frame in encode(Packet(message))], TO_HUB).message
        assert isinstance(got, Upload)
        self.asked.append(got)
        answer: Future[Any] = Future()
        if len(self.asked) > self.dies_after:
            answer.set_exception(HubUnreachable("the hub was switched off"))
            return answer
        if len(self.asked) in self.loses:
            self.receptions.round_over(0)
        received, file = self.receptions.take("ann", got)
        self.file = file or self.file
        answer.set_result(UploadAck(received))
        return answer

    def sizes(self) -> list[int]:
        return [message.data.nbytes for message in self.asked]


def send(hub: Any, task: Task | None = None, data: bytes = DATA) -> None:
    Uploading(hub, 0, 7, data).run(task or Task("uploading", None, "bytes", time.monotonic))


def test_the_file_arrives_whole() -> None:
    hub = Hub()
    send(hub)
    assert hub.file == DATA
    assert hub.sizes() == [0] + [SMALL] * 10 + [240]


def test_after_a_cut_only_the_rest_is_sent() -> None:
    hub = Hub()
    hub.dies_after = 6
    with pytest.raises(HubUnreachable):
        send(hub)
    hub.asked.clear()
    hub.dies_after = 10**9
    send(hub)
    assert hub.file == DATA
    assert hub.sizes() == [0] + [SMALL] * 5 + [240]


def test_an_edge_that_did_not_hear_of_the_end_sends_nothing() -> None:
    hub = Hub()
    send(hub)
    hub.asked.clear()
    send(hub)
    assert hub.sizes() == [0]


@pytest.mark.parametrize("at", [3, 7, 12])
def test_what_the_hub_loses_meanwhile_is_sent_again(at: int) -> None:
    hub = Hub()
    hub.loses = {at}
    send(hub)
    assert hub.file == DATA


def test_a_hub_that_takes_nothing_ends_it() -> None:
    hub = Hub()
    hub.loses = set(range(1000))
    with pytest.raises(ProtocolError, match="does not take"):
        send(hub)


@pytest.mark.parametrize("answer", [UploadAck(len(DATA) + 1), Bye()])
def test_an_answer_that_is_none_is_refused(answer: AnyMessage) -> None:
    class Lying:
        def submit(self, _: AnyMessage) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_result(answer)
            return future

    with pytest.raises(ProtocolError, match="no answer to it"):
        send(Lying())
