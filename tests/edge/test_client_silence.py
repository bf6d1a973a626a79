"""A hub that falls silent: fresh sockets, HELLO with resume, the same bytes once more; and who gives up when."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import messaging.messages as m
from edge.client import HubClient
from messaging.console import Journal
from messaging.errors import ErrorCode, HubError, HubUnreachable
from messaging.framing import decode, encode
from messaging.memory import MemoryEdge, MemoryHub
from messaging.transport import Arrival, Reachable
from tests.edge.test_cut_links import RECIPE, _filled, _hello

CREDITS = 1 << 20


class Resettable(MemoryEdge):
    """Counts resets."""

    resets = 0

    def reset(self) -> None:
        self.resets += 1
        super().reset()


class Watched(HubClient):
    """Tells how often it has looked after its link at the present time."""

    looks: tuple[float, int] = (0.0, 0)

    def _watch(self, now: float) -> None:
        super()._watch(now)
        self.looks = (now, self.looks[1] + 1 if self.looks[0] == now else 1)


class Scene:
    """A client, its hub played by the test, and a clock turned by hand."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.hub = MemoryHub()
        self.edge = Resettable(self.hub, "key")
        self.lines: list[str] = []
        journal = Journal()
        journal.echo_to(self.lines.append)
        self.client = Watched(self.edge, journal, clock=lambda: self.now)
        self._kept: list[Arrival] = []

    def request(self, kind: type[m.Message], answer_pings: bool = True) -> Arrival:
        """The next request of a kind; pings before it are answered, or left."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            arrivals, self._kept = [*self._kept, *self.hub.poll(0.02)], []
            for arrival in [item for item in arrivals if item.route.routing_id in self.hub._edges]:
                message = decode(arrival.frames, m.TO_HUB).message
                if isinstance(message, m.Ping) and answer_pings:
                    self.answer(arrival, m.Pong(1, 1, 1, 0, 0, 0, 0, 0, 0))
                elif isinstance(message, kind):
                    return arrival
        raise AssertionError(f"no {kind.__name__} came")

    def answer(self, arrival: Arrival, message: m.AnyMessage, session: int = 7, epoch: int = 3) -> None:
        request = decode(arrival.frames, m.TO_HUB).envelope.request
        frames = encode(m.Packet(message, m.Envelope(session, epoch, request, 0, CREDITS)))
        self.hub.send(arrival.route, frames)

    def welcome(self, next_request: int = 1, session: int = 7) -> m.Hello:
        """Answer the HELLO that comes; what it said."""
        arrival = self.request(m.Hello)
        made = _filled(m.Welcome, next=next_request, credit_bytes=CREDITS, recipe=RECIPE)
        self.answer(arrival, made, session)
        hello = decode(arrival.frames, m.TO_HUB).message
        assert isinstance(hello, m.Hello)
        return hello

    def silence(self, seconds: float) -> None:
        """Time passes; whatever the edge sends meanwhile is lost, but for what goes first over fresh sockets."""
        for _ in range(int(seconds)):
            self.now += 1.0
            # What is found late is sent at the beginning of the next turn.
            self.until(self._looked_twice)
            arrivals = self.hub.poll(0.0)
            fresh = m.Hello | m.Fetch
            self._kept += [item for item in arrivals if isinstance(decode(item.frames, m.TO_HUB).message, fresh)]

    def _looked_twice(self) -> bool:
        self.edge.wake()
        return self.client.looks >= (self.now, 2)

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.client.close()


@pytest.fixture
def opened(scene: Scene) -> Scene:
    opening = threading.Thread(target=scene.client.open, args=(_hello(),))
    opening.start()
    assert scene.welcome().resume == 0
    opening.join()
    return scene


STEP = m.StepForward(0, 1, (), m.Tensor("u8", (1, 1, 3), (b"abc",)))


def test_how_often_to_ping_follows_from_all_sessions_not_from_the_cohort(opened: Scene) -> None:
    """Where thousands only generate, the cohort may be empty."""
    opened.now += 6.0
    opened.edge.wake()
    ping = opened.request(m.Ping, answer_pings=False)
    opened.answer(ping, m.Pong(4000, 0, 1, 0, 0, 0, 0, 0, 0))
    opened.until(lambda: opened.client._liveness.quiet_s == 2 * (4000 / 200 + 1))


def test_after_three_missed_pings_the_session_is_resumed_over_fresh_sockets(opened: Scene) -> None:
    opened.client.be_patient(math.inf)
    asked = opened.client.submit(STEP)
    first = opened.request(m.StepForward)
    opened.silence(21)
    assert opened.edge.resets == 1
    assert opened.client.trouble == "hub silent for 21 s, retrying"
    assert opened.welcome(next_request=2).resume == 7
    again = opened.request(m.StepForward)
    assert [bytes(frame) for frame in again.frames] == [bytes(frame) for frame in first.frames]
    opened.answer(again, m.StepHidden(0, STEP.smashed))
    assert isinstance(asked.result(timeout=60), m.StepHidden)
    opened.until(lambda: opened.client.trouble == "")
    told = [line.split(" ", 1)[1] for line in opened.lines]
    assert told == ["hub silent for 11 s, retrying", "the hub answers again after 21 s"]


def test_it_tries_again_and_again(opened: Scene) -> None:
    opened.client.be_patient(math.inf)
    asked = opened.client.submit(STEP)
    opened.silence(100)
    assert 4 <= opened.edge.resets <= 7
    assert not asked.done()


def test_it_gives_up_when_told_to(opened: Scene) -> None:
    asked = opened.client.submit(STEP)
    opened.silence(32)
    with pytest.raises(HubUnreachable, match="nothing heard from the hub for 30 s"):
        asked.result(timeout=60)


def test_a_hub_that_can_be_reached_again_is_dialled_at_once(opened: Scene) -> None:
    opened.edge._events.append(Reachable())
    opened.edge.wake()
    assert opened.welcome().resume == 7
    assert opened.edge.resets == 1


def test_pings_go_on_without_a_session(scene: Scene) -> None:
    assert scene.request(m.Ping, answer_pings=False)
    scene.now += 5.0
    assert scene.request(m.Ping, answer_pings=False)


def test_who_waits_for_a_session_without_end_gets_it(opened: Scene) -> None:
    opened.client.be_patient(math.inf)
    opened.silence(21)
    opened.until(lambda: opened.client._reopening)
    got: list[m.Welcome] = []
    waiting = threading.Thread(target=lambda: got.append(opened.client.wait_for_session(math.inf)))
    waiting.start()
    opened.welcome()
    waiting.join(60)
    assert got


def test_a_hub_that_refuses_to_resume_ends_what_is_asked_and_is_not_asked_forever(opened: Scene) -> None:
    opened.client.be_patient(math.inf)
    asked = opened.client.submit(STEP)
    opened.request(m.StepForward)
    opened.silence(21)
    opened.answer(opened.request(m.Hello), m.Error(ErrorCode.MODEL, 0, "another model"), session=0)
    with pytest.raises(HubError, match="another model"):
        asked.result(timeout=60)
    with pytest.raises(HubError, match="another model"):
        opened.client.wait_for_session(math.inf)
    with pytest.raises(HubError, match="another model"):
        opened.client.submit(STEP).result(timeout=60)
    time.sleep(0.5)
    kinds = [type(decode(arrival.frames, m.TO_HUB).message) for arrival in opened.hub.poll(0.0)]
    assert m.Hello not in kinds


def test_what_was_asked_before_there_is_a_session_is_asked_again_too(scene: Scene) -> None:
    scene.client.be_patient(math.inf)
    # On the bulk channel, which nothing opens again but a request.
    asked = scene.client.submit(_filled(m.Fetch, resource="manifest", length=3))
    scene.request(m.Fetch, answer_pings=False)
    scene.silence(21)
    assert scene.edge.resets == 1
    scene.answer(scene.request(m.Fetch), _filled(m.Chunk, total=3, data=STEP.smashed), session=0)
    assert isinstance(asked.result(timeout=60), m.Chunk)
