"""The hub's record of a session: every ordered request is new exactly once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from messaging.messages import UNORDERED_BASE
from messaging.replies import MOST_BYTES, MOST_REPLIES, Busy, Gap, New, Replay, Replies, Stale


def test_the_life_of_an_ordered_request() -> None:
    replies = Replies()
    assert replies.admit(2) == Gap(1)
    assert replies.admit(1) == New()
    assert replies.admit(1) == Busy()
    assert replies.admit(2) == New()
    replies.record(1, [b"one"])
    assert replies.admit(1) == Replay((b"one",))
    assert replies.admit(2) == Busy()
    replies.ack(1)
    assert replies.admit(1) == Stale()
    assert replies.admit(4) == Gap(3)
    assert replies.next == 3


def test_a_resumed_session_starts_where_it_was() -> None:
    replies = Replies(next_request=7)
    assert replies.admit(6) == Stale()
    assert replies.admit(8) == Gap(7)
    assert replies.admit(7) == New()


def test_the_latest_replies_are_kept() -> None:
    replies, last = Replies(), MOST_REPLIES + 2
    for request in range(1, last + 1):
        replies.admit(request)
        replies.record(request, [b"x" * 10, b"y"])
    found = [type(replies.admit(request)) for request in range(1, last + 1)]
    assert found == [Stale] * 2 + [Replay] * MOST_REPLIES
    assert replies.kept_bytes == 11 * MOST_REPLIES
    replies.ack(last - 1)
    assert replies.kept_bytes == 11
    replies.ack(99)
    assert replies.kept_bytes == 0


def test_old_replies_make_room_but_the_newest_stays() -> None:
    replies = Replies()
    half = memoryview(bytes(MOST_BYTES // 2))
    for request in (1, 2, 3):
        replies.admit(request)
        replies.record(request, [half])
    assert replies.kept_bytes == MOST_BYTES
    assert replies.admit(1) == Stale()
    replies.admit(4)
    replies.record(4, [half, half, b"!"])
    assert replies.kept_bytes == MOST_BYTES + 1
    assert replies.admit(3) == Stale()
    assert replies.admit(4) == Replay((half, half, b"!"))


def test_unordered_requests_may_be_repeated() -> None:
    replies = Replies()
    assert replies.admit(UNORDERED_BASE + 5) == New()
    assert replies.admit(UNORDERED_BASE + 5) == Busy()
    replies.record(UNORDERED_BASE + 5, [b"x"])
    assert replies.kept_bytes == 0
    assert replies.admit(UNORDERED_BASE + 5) == New()
    assert replies.next == 1


@given(st.lists(st.tuples(st.sampled_from(["ask", "answer", "ack"]), st.integers(1, 12)), max_size=80))
def test_nothing_is_taken_twice(events: list[tuple[str, int]]) -> None:
    replies = Replies()
    taken: list[int] = []
    answered: set[int] = set()
    for what, request in events:
        if what == "ask":
            admission = replies.admit(request)
            if admission == New():
                taken.append(request)
            elif isinstance(admission, Replay):
                assert admission.frames == (str(request).encode(),)
            elif isinstance(admission, Gap):
                assert request > admission.expected == len(taken) + 1
        elif what == "answer" and request in taken and request not in answered:
            answered.add(request)
            replies.record(request, [str(request).encode()])
        elif what == "ack":
            replies.ack(request)
    assert taken == list(range(1, len(taken) + 1))
