"""Answers that a connection does not take: they wait within bounds, and nothing is lost for good."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

import messaging.messages as m
from hub import post as post_module
from hub.credits import Credits
from hub.jobs import Place
from hub.post import Post
from hub.sessions import MOST_GENERATING, Session, Sessions
from messaging.errors import ErrorCode, HubError
from messaging.framing import decode
from messaging.memory import MemoryHub
from messaging.replies import Replies
from messaging.transport import Buffer, Channel, Route, SendResult

MEGABYTE = 1 << 20
HERE, THERE = Route(Channel.BULK, b"here"), Route(Channel.BULK, b"there")


class Link(MemoryHub):
    """Takes what it is given, and is read as far as a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[Route, list[Buffer]]] = []
        self.waiting: dict[Route, int] = {}
        self.refusing: set[Route] = set()
        self.gone: set[Route] = set()
        self.were_cut: list[Route] = []

    def send(self, route: Route, frames: Sequence[Buffer]) -> SendResult:
        if route in self.gone:
            return SendResult.GONE
        if route in self.refusing:
            return SendResult.FULL
        self.sent.append((route, list(frames)))
        self.waiting[route] = self.waiting.get(route, 0) + sum(map(len, frames))
        return SendResult.SENT

    def unread(self, route: Route, most: int) -> int:
        return self.waiting.get(route, 0)

    def cut(self, route: Route) -> str | None:
        self.were_cut.append(route)
        return "key of " + route.routing_id.decode()


class Desk:
    """A post with a budget of 64 MB, for one session of at most 32 MB."""

    def __init__(self) -> None:
        self.now = 0.0
        self.link = Link()
        self.credits = Credits(32 * MEGABYTE)
        self.post = Post(self.link, 1, self.credits, lambda: self.now)
        self.sessions = Sessions(1, self.credits)

    def session(self, key: str = "key", train: bool = False) -> Session:
        number = self.sessions.number()
        session = Session(number, number, key, key, train, (1, 1), Place(1, 5), None, Replies(), 0.0)
        self.sessions.add(session)
        return session

    def answer(self, session: Session, request: int, megabytes: int, route: Route = HERE) -> None:
        session.replies.admit(request)
        session.routes[request] = (route, 0)
        data = tuple(bytes(MEGABYTE) for _ in range(megabytes))
        self.post.answer(session, request, m.InferHidden(m.Tensor("u8", (megabytes * MEGABYTE,), data)))

    def requests(self) -> list[tuple[int, type[m.Message]]]:
        packets = [decode(list(frames), m.TO_EDGE) for _, frames in self.link.sent]
        return [(packet.envelope.request - m.UNORDERED_BASE, type(packet.message)) for packet in packets]


@pytest.fixture
def desk() -> Desk:
    return Desk()


U = m.UNORDERED_BASE


def test_one_that_is_larger_than_the_credits_goes_out_alone(desk: Desk) -> None:
    session = desk.session()
    for _ in range(7):
        desk.session()
    assert desk.credits.share == 4 * MEGABYTE
    desk.answer(session, U + 1, 6)
    desk.answer(session, U + 2, 1)
    assert desk.requests() == [(1, m.InferHidden)]
    assert desk.post.behind(HERE)
    assert not desk.post.behind(THERE)
    desk.link.waiting[HERE] = 0
    desk.post.send_parked()
    assert desk.requests() == [(1, m.InferHidden), (2, m.InferHidden)]
    assert not desk.post.waiting
    assert desk.credits.in_work == 0


def test_what_waits_is_bounded_and_in_place_of_the_rest_a_notice_waits(desk: Desk) -> None:
    session = desk.session()
    for _ in range(7):
        desk.session()
    for request in range(1, 21):
        desk.answer(session, U + request, 1)
    assert len(desk.link.sent) == 3  # with their headers four are more than the credits
    assert desk.credits.in_work <= 4 * MEGABYTE
    for _ in range(40):
        desk.link.waiting[HERE] = 0
        desk.post.send_parked()
    answered = dict(desk.requests())
    assert sorted(answered) == list(range(1, 21))
    assert [number for number, kind in answered.items() if kind is m.InferHidden] == [1, 2, 3, 4, 5, 6]
    refused = [decode(list(frames), m.TO_EDGE).message for _, frames in desk.link.sent][6:]
    assert {message.code for message in refused if isinstance(message, m.Error)} == {ErrorCode.LATER}
    assert desk.credits.in_work == 0


def test_a_full_socket_of_one_does_not_hold_up_the_other(desk: Desk) -> None:
    desk.link.refusing.add(HERE)
    session = desk.session()
    desk.answer(session, U + 1, 1)
    desk.answer(session, U + 2, 1, THERE)
    assert desk.requests() == [(2, m.InferHidden)]
    desk.link.refusing.clear()
    desk.post.send_parked()
    assert desk.requests() == [(2, m.InferHidden), (1, m.InferHidden)]


def test_what_waits_for_a_connection_that_is_gone_is_forgotten(desk: Desk) -> None:
    desk.link.refusing.add(HERE)
    session = desk.session()
    for request in range(3):
        desk.answer(session, U + request, 1)
    assert desk.credits.in_work > 3 * MEGABYTE
    desk.link.gone.add(HERE)
    desk.post.send_parked()
    assert not desk.post.waiting
    assert desk.credits.in_work == 0


def test_who_does_not_read_is_cut_and_who_reads_slowly_is_not(desk: Desk) -> None:
    session = desk.session()
    for route in (HERE, THERE):
        desk.link.refusing.add(route)
        desk.link.waiting[route] = 8 * MEGABYTE
        desk.answer(session, U + 1, 1, route)
    desk.now = 9.0
    assert desk.post.cut_stuck() == []
    desk.now = 11.0
    desk.link.waiting[THERE] -= MEGABYTE
    (stuck,) = desk.post.cut_stuck()
    assert (stuck.key, stuck.unread >> 20) == ("key of here", 9)
    assert desk.link.were_cut == [HERE]
    assert not desk.post.behind(HERE)
    desk.now = 22.0
    assert [stuck.key for stuck in desk.post.cut_stuck()] == ["key of there"]
    assert desk.credits.in_work == 0


def test_the_number_of_those_that_wait_is_bounded(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post_module, "_MOST_PARKED_ROUTE", 5)
    desk.link.refusing.add(HERE)
    for request in range(20):
        desk.post.reply(HERE, U + request, m.Bye())
    desk.link.refusing.clear()
    desk.post.send_parked()
    assert len(desk.link.sent) == 5


def test_a_recorded_answer_counts_until_it_is_acknowledged(desk: Desk) -> None:
    session = desk.session()
    desk.answer(session, 1, 2)
    assert desk.credits.in_work > 2 * MEGABYTE
    session.replies.ack(1)
    desk.credits.record(session.account, session.replies.kept_bytes)
    assert desk.credits.in_work == 0


def test_a_session_that_ends_gives_back_what_it_had(desk: Desk) -> None:
    session = desk.session()
    desk.credits.take(session.account, MEGABYTE)
    desk.answer(session, 1, 2)
    desk.sessions.remove(session.number)
    assert desk.credits.in_work == 0
    desk.sessions.remove(session.number)
    assert len(desk.sessions) == 0


def test_one_edge_has_so_many_sessions_that_generate_and_no_more(desk: Desk) -> None:
    desk.credits.budget = 1 << 30
    first, *_ = (desk.session() for _ in range(MOST_GENERATING))
    with pytest.raises(HubError, match="the most") as caught:
        desk.session()
    assert caught.value.code is ErrorCode.FULL
    desk.session(train=True)
    desk.session("another key")
    desk.sessions.remove(first.number)
    desk.session()


def test_a_hub_without_room_takes_no_more_sessions(desk: Desk) -> None:
    for number in range(32):
        desk.session(str(number))
    with pytest.raises(HubError, match="full"):
        desk.session("one more")
    assert len(desk.sessions) == 32
