"""The edge's request table: credits, order, retries only where something may be lost, and giving up."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from messaging.errors import ErrorCode, HubError, HubUnreachable, LinkLost, ProtocolError
from messaging.exchange import Answered, Failed, Outgoing, channel_of
from messaging.framing import decode
from messaging.messages import (
    TO_HUB,
    UNORDERED_BASE,
    AnyMessage,
    AwaitRound,
    CloseStream,
    Describe,
    Description,
    Envelope,
    Error,
    Fetch,
    Hello,
    Infer,
    InferHidden,
    Packet,
    Ping,
    Pong,
    Published,
    StepForward,
    StepHidden,
    Tensor,
)
from messaging.requests import Requests, Session
from messaging.transport import Channel

OPEN = Session(number=5, epoch=2, credits=1 << 30, next_ordered=1)
PONG = Pong(1, 1, 1, 0, 0, 0, 0, 0, 0)
DESCRIPTION = Description("fedsea", "pocket", "", "float32", 8, 0, 0, 0)


def tensor(nbytes: int) -> Tensor:
    return Tensor("u8", (1, 1, nbytes), (bytes(nbytes),))


def step(number: int, nbytes: int = 1000) -> StepForward:
    return StepForward(number, 4, (), tensor(nbytes))


def infer(nbytes: int = 1000) -> Infer:
    return Infer(1, 0, 0, (), (), tensor(nbytes))


def table(session: Session = OPEN, give_up_s: float = 30.0) -> Requests:
    requests = Requests(random.Random(0), give_up_s)
    assert requests.opened(session) == []
    return requests


def flush(requests: Requests, now: float) -> list[int]:
    """Send everything that is due; the ids."""
    return [outgoing.request for outgoing in send(requests, now)]


def send(requests: Requests, now: float) -> list[Outgoing]:
    found = []
    for outgoing in requests.due(now):
        found.append(outgoing)
        requests.sent(outgoing.request, now)
    return found


def reply(request: int, message: AnyMessage, **envelope: int) -> Packet:
    return Packet(message, replace(Envelope(session=5, epoch=2, request=request), **envelope))


def refusal(request: int, code: ErrorCode, detail: int = 0, **envelope: int) -> Packet:
    return reply(request, Error(code, detail, code.name), **envelope)


# --- asking ----------------------------------------------------------------------------------


def test_ids_and_envelopes() -> None:
    requests = table(replace(OPEN, next_ordered=9))
    ids = [requests.add(message, 0.0, 7.5) for message in (step(1), infer(), step(2), Describe(1, 1, "x"))]
    assert ids == [9, UNORDERED_BASE, 10, UNORDERED_BASE + 1]
    envelopes = {out.request: decode(out.frames, TO_HUB).envelope for out in send(requests, 0.0)}
    assert envelopes[9] == Envelope(5, 2, 9, 8, 0, 7500)
    assert envelopes[10] == Envelope(5, 2, 10, 8, 0, 7500)
    assert envelopes[UNORDERED_BASE + 1] == Envelope(0, 0, UNORDERED_BASE + 1, 0, 0, 7500)
    assert len(requests) == 4


def test_ack_is_the_last_reply_without_a_hole() -> None:
    requests = table()
    first, second = requests.add(step(1), 0.0), requests.add(step(2), 0.0)
    flush(requests, 0.0)
    requests.received(reply(second, StepHidden(2, tensor(4))), 1.0)
    assert decode(requests.stamp(CloseStream(1)).frames, TO_HUB).envelope.ack == 0
    requests.received(reply(first, StepHidden(1, tensor(4))), 1.0)
    assert decode(requests.stamp(CloseStream(1)).frames, TO_HUB).envelope.ack == 2


def test_channels() -> None:
    assert channel_of(infer(64 * 1024)) is Channel.CTL
    assert channel_of(infer(64 * 1024 + 1)) is Channel.BULK
    assert channel_of(step(1, 1)) is Channel.BULK
    assert channel_of(AwaitRound(1)) is Channel.BULK
    assert channel_of(Fetch("manifest", 0, 10, 0)) is Channel.BULK
    assert channel_of(Describe(1, 1, "x")) is Channel.CTL


def test_a_bad_message_fails_where_it_is_asked() -> None:
    requests = table()
    with pytest.raises(ProtocolError, match=r"Infer\.stream"):
        requests.add(replace(infer(), stream=-1), 0.0)
    assert requests.add(step(1), 0.0) == 1


def test_before_the_first_session_only_what_needs_none() -> None:
    requests = Requests(random.Random(0), 30.0)
    with pytest.raises(RuntimeError, match="Hello"):
        requests.add(infer(), 0.0)
    asked = requests.add(Describe(1, 1, "x"), 0.0)
    assert flush(requests, 0.0) == [asked]
    assert requests.received(reply(asked, DESCRIPTION, session=0, epoch=77), 1.0) == Answered(asked, DESCRIPTION)


# --- credits and order -----------------------------------------------------------------------


def test_no_credit_no_send() -> None:
    requests = table(replace(OPEN, credits=2500))
    ids = [requests.add(step(number), 0.0) for number in (1, 2, 3)]
    assert flush(requests, 0.0) == ids[:2]
    assert requests.next_event() == 30.0
    requests.received(reply(ids[0], StepHidden(1, tensor(4))), 1.0)
    assert flush(requests, 1.0) == ids[2:]


def test_one_request_goes_out_whatever_its_size() -> None:
    requests = table(replace(OPEN, credits=10))
    ids = [requests.add(step(number), 0.0) for number in (1, 2)]
    assert flush(requests, 0.0) == ids[:1]


def test_nothing_overtakes_what_waits_for_credits_on_its_channel() -> None:
    requests = table(replace(OPEN, credits=3000))
    first = requests.add(step(1, 1000), 0.0)
    large = requests.add(step(2, 5000), 0.0)
    requests.add(step(3, 10), 0.0)
    small = requests.add(infer(10), 0.0)
    assert flush(requests, 0.0) == [small, first]
    assert requests.next_event() == 30.0
    requests.received(reply(small, InferHidden(tensor(4))), 0.0)
    requests.received(reply(first, StepHidden(1, tensor(4))), 1.0)
    assert flush(requests, 1.0) == [large]


def test_the_hub_changes_the_credits() -> None:
    requests = table(replace(OPEN, credits=10))
    ids = [requests.add(step(number), 0.0) for number in (1, 2)]
    assert flush(requests, 0.0) == ids[:1]
    requests.received(reply(0, PONG, credits=5000), 1.0)
    assert flush(requests, 1.0) == ids[1:]
    requests.received(reply(0, PONG), 1.0)
    assert requests.session.credits == 5000


def test_a_blocked_channel_is_left_alone_and_the_other_goes_on() -> None:
    requests = table()
    first, second, small = requests.add(step(1), 0.0), requests.add(step(2), 0.0), requests.add(infer(), 0.0)
    seen = []
    for outgoing in requests.due(0.0):
        seen.append(outgoing.request)
        if outgoing.channel is Channel.BULK:
            requests.blocked(Channel.BULK, 0.0)
        else:
            requests.sent(outgoing.request, 0.0)
    assert seen == [small, first]
    assert requests.next_event() == 0.05
    assert flush(requests, 0.04) == []
    requests.connected(Channel.BULK, 0.04)
    assert flush(requests, 0.04) == [first, second]


# --- sending again ---------------------------------------------------------------------------


def test_a_step_may_wait_for_its_cohort() -> None:
    requests = table()
    asked = requests.add(step(1), 0.0)
    assert flush(requests, 0.0) == [asked]
    for second in range(1, 600):
        requests.received(reply(0, PONG, ack=1), second)
        assert flush(requests, second) == []
        assert requests.expired(second) == []
    assert requests.received(reply(asked, StepHidden(1, tensor(4))), 600.0) is not None


def test_a_lost_connection_brings_the_same_bytes_again_in_order() -> None:
    requests = table()
    ids = [requests.add(step(number), 0.0) for number in (1, 2, 3)]
    before = [out.frames for out in send(requests, 0.0)]
    requests.connected(Channel.CTL, 5.0)
    assert flush(requests, 5.0) == []
    requests.connected(Channel.BULK, 5.0)
    assert 5.0 <= requests.next_event() <= 5.25
    again = send(requests, 5.25)
    assert [out.request for out in again] == ids
    assert [out.frames for out in again] == before


def test_backoff_doubles_to_ten_seconds_with_full_jitter() -> None:
    waits: list[list[float]] = []
    for seed in range(200):
        requests = Requests(random.Random(seed), math.inf)
        requests.opened(OPEN)
        requests.add(step(1), 0.0)
        waits.append([])
        now = 0.0
        for _ in range(8):
            flush(requests, now)
            requests.connected(Channel.BULK, now)
            waits[-1].append(requests.next_event() - now)
            now = requests.next_event()
    for place, most in enumerate([0.25, 0.5, 1, 2, 4, 8, 10, 10]):
        column = [row[place] for row in waits]
        assert max(column) <= most + 1e-9
        assert max(column) > 0.9 * most
        assert min(column) < 0.1 * most


def test_a_reply_resets_the_backoff() -> None:
    requests = table()
    for number in range(1, 30):
        asked = requests.add(step(number), 0.0)
        flush(requests, 0.0)
        requests.connected(Channel.BULK, 0.0)
        assert flush(requests, 0.25) == [asked]
        requests.received(reply(asked, StepHidden(number, tensor(4))), 0.3)


def test_busy_means_that_the_hub_has_it() -> None:
    requests = table()
    asked = requests.add(infer(), 0.0)
    flush(requests, 0.0)
    assert requests.received(refusal(asked, ErrorCode.BUSY), 1.0) is None
    requests.received(reply(0, PONG), 500.0)
    assert flush(requests, 500.0) == []
    assert isinstance(requests.received(reply(asked, InferHidden(tensor(4))), 501.0), Answered)


def test_later_means_to_send_it_again_in_a_while() -> None:
    requests = table()
    for message in (infer(), step(1)):
        asked = requests.add(message, 0.0)
        flush(requests, 0.0)
        requests.received(refusal(asked, ErrorCode.BUSY), 0.5)
        assert requests.received(refusal(asked, ErrorCode.LATER), 1.0) is None
        assert 1.0 <= requests.next_event() <= 11.0
        assert flush(requests, 12.0) == [asked]
        assert requests.received(refusal(asked, ErrorCode.STALE), 13.0) is not None


def test_what_was_sent_together_and_refused_together_backs_off_once() -> None:
    """A hub with room for one of many gets them one after the other, without a longer wait each time."""
    requests = table()
    asked = [requests.add(infer(), 0.0) for _ in range(12)]
    now = 0.0
    while asked:
        assert set(flush(requests, now)) == set(asked)
        for refused in asked[1:]:
            requests.received(refusal(refused, ErrorCode.LATER), now)
        requests.received(reply(asked.pop(0), InferHidden(tensor(8))), now)
        if asked:
            now = max(now, requests.next_event())
    assert now < 12 * 0.25


def test_doubt_when_the_hub_lives_and_shows_no_sign_of_having_it() -> None:
    requests = table(give_up_s=math.inf)
    asked = requests.add(infer(64 * 1024 - 100), 0.0)
    flush(requests, 0.0)
    assert flush(requests, 100.0) == []  # a silent hub is a matter for the heartbeat
    assert requests.next_event() == math.inf
    requests.received(reply(0, PONG), 5.0)
    assert 10.9 < requests.next_event() < 11.1  # ten seconds, and one for 64 KB on a slow link
    assert flush(requests, 10.0) == []
    assert flush(requests, 11.1) == [asked]
    requests.received(reply(0, PONG), 12.0)
    assert 32.0 < requests.next_event() < 32.2  # the second time it takes twice as long


def test_a_gap_brings_back_everything_from_the_missing_one() -> None:
    requests = table()
    ids = [requests.add(step(number), 0.0) for number in (1, 2, 3)]
    flush(requests, 0.0)
    assert requests.received(refusal(3, ErrorCode.GAP, detail=2), 1.0) is None
    assert flush(requests, 1.25) == ids[1:]
    outcome = requests.received(refusal(3, ErrorCode.GAP, detail=77), 2.0)
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, HubError)


# --- outcomes --------------------------------------------------------------------------------


def test_replies_are_matched_by_id_and_epoch() -> None:
    requests = table()
    asked = requests.add(infer(), 0.0)
    flush(requests, 0.0)
    hidden = InferHidden(tensor(4))
    assert requests.received(reply(asked + 1, hidden), 1.0) is None
    assert requests.received(reply(asked, hidden, epoch=1), 1.0) is None
    assert requests.received(reply(asked, hidden, epoch=3), 1.0) is None
    assert requests.received(reply(asked, hidden), 1.0) == Answered(asked, hidden)
    assert requests.received(reply(asked, hidden), 1.0) is None


def test_a_refusal_fails_its_request() -> None:
    requests = table()
    asked = requests.add(infer(), 0.0)
    flush(requests, 0.0)
    outcome = requests.received(refusal(asked, ErrorCode.CACHE_MISS, 17), 1.0)
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, HubError)
    assert (outcome.request, outcome.error.code, outcome.error.detail) == (asked, ErrorCode.CACHE_MISS, 17)
    assert len(requests) == 0


def test_an_unknown_code_and_no_request() -> None:
    outcome = table().received(Packet(Error(200, 3, "new trouble")), 1.0)
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, HubError)
    assert (outcome.request, outcome.error.code, str(outcome.error)) == (0, ErrorCode.PROTOCOL, "new trouble")


def test_an_answer_of_another_kind() -> None:
    requests = table()
    asked = requests.add(infer(), 0.0)
    flush(requests, 0.0)
    outcome = requests.received(reply(asked, Published(1, 1, 0)), 1.0)
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, ProtocolError)


def test_deadlines() -> None:
    requests = table()
    asked = requests.add(infer(), 0.0, deadline_s=2.0)
    requests.add(infer(), 0.0)
    assert requests.next_event() <= 2.0
    assert requests.expired(1.9) == []
    (failed,) = requests.expired(2.0)
    assert failed.request == asked
    assert "2 s" in str(failed.error)
    assert len(requests) == 1


def test_giving_up_on_a_silent_hub() -> None:
    requests = table()
    first, second = requests.add(infer(), 100.0), requests.add(step(1), 120.0)
    assert requests.expired(129.9) == []
    requests.received(reply(0, PONG), 129.9)
    assert requests.expired(159.8) == []
    failed = requests.expired(160.0)
    assert [item.request for item in failed] == [first, second]
    assert all(isinstance(item.error, HubUnreachable) for item in failed)
    assert requests.next_event() == math.inf


# --- sessions --------------------------------------------------------------------------------


def test_the_same_session_goes_on() -> None:
    requests = table()
    ids = [requests.add(step(number), 0.0) for number in (1, 2)]
    before = [out.frames for out in send(requests, 0.0)]
    assert requests.opened(replace(OPEN, next_ordered=2)) == []
    assert [out.frames for out in send(requests, 1.0)] == before
    assert requests.add(step(3), 1.0) == ids[-1] + 1


def test_a_new_session_ends_what_belonged_to_the_old_one() -> None:
    requests = table()
    forward, fetch, small = (requests.add(item, 0.0) for item in (step(1), Fetch("x", 0, 1, 0), infer()))
    flush(requests, 0.0)
    failed = requests.opened(Session(6, 3, 1 << 20, next_ordered=40))
    assert [item.request for item in failed] == [forward, small]
    assert all(isinstance(item.error, LinkLost) for item in failed)
    assert requests.received(reply(fetch, DESCRIPTION, epoch=3), 1.0) is not None
    assert requests.add(step(1), 1.0) == 40


@pytest.mark.parametrize("epoch", [2, 3])
def test_no_session_asks_for_a_hello(epoch: int) -> None:
    requests = table()
    asked = requests.add(step(1), 0.0)
    flush(requests, 0.0)
    assert requests.received(refusal(asked, ErrorCode.NO_SESSION, epoch=epoch), 1.0) is None
    assert requests.needs_session
    hello = requests.add(Hello(1, 1, "", "", 1, "", 1, 1, 0, 5, 0), 1.0)
    assert flush(requests, 1.0) == [hello]
    assert flush(requests, 100.0) == []
    requests.opened(OPEN)
    assert asked in flush(requests, 100.0)


@pytest.mark.parametrize(("session", "lost"), [(5, True), (4, False)])
def test_a_ping_into_a_session_that_is_no_more_asks_for_a_hello(session: int, lost: bool) -> None:
    """Of what the hub said it holds nothing else would ever be heard."""
    requests = table()
    asked = requests.add(step(1), 0.0)
    flush(requests, 0.0)
    requests.received(refusal(asked, ErrorCode.BUSY), 1.0)
    ping = requests.stamp(Ping("training", 0, 0.0, 0.0, 0.0, 0.0, None)).request
    requests.received(refusal(ping, ErrorCode.NO_SESSION, session=session), 2.0)
    assert requests.needs_session == lost


def test_a_newer_epoch_asks_for_a_hello() -> None:
    requests = table()
    requests.received(reply(0, PONG, epoch=1), 1.0)
    assert not requests.needs_session
    requests.received(reply(0, PONG, epoch=3), 1.0)
    assert requests.needs_session
