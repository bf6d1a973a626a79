"""The hub's budget of bytes in work: what is shared out, what is taken, what comes back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub.credits import LEAST_BYTES, MOST_BYTES, Account, Credits, Verdict
from messaging.errors import ErrorCode, HubError

MEGABYTE = 1 << 20


def opened(credits: Credits, count: int) -> list[Account]:
    accounts = [Account() for _ in range(count)]
    for account in accounts:
        credits.open(account)
    return accounts


@given(st.integers(0, 1 << 34), st.integers(1, 200))
def test_shares_sum_to_the_budget_at_most(budget: int, count: int) -> None:
    credits = Credits(budget)
    accounts = opened(credits, min(count, credits.most_sessions))
    assert LEAST_BYTES <= credits.share <= MOST_BYTES
    assert credits.share * len(accounts) <= credits.budget


def test_the_hub_is_full_when_there_is_less_than_a_frame_for_each() -> None:
    credits = Credits(3 * LEAST_BYTES)
    accounts = opened(credits, 3)
    with pytest.raises(HubError, match="full") as caught:
        credits.open(Account())
    assert caught.value.code is ErrorCode.FULL
    credits.close(accounts[0])
    credits.open(Account())


def test_what_a_request_may_take() -> None:
    credits = Credits(100 * MEGABYTE)
    one, two = opened(credits, 2)
    assert credits.share == 50 * MEGABYTE
    assert credits.take(one, 80 * MEGABYTE) is Verdict.TAKEN  # alone, and there is room
    assert credits.take(two, 50 * MEGABYTE) is Verdict.LATER
    assert credits.take(two, 20 * MEGABYTE) is Verdict.TAKEN
    credits.give_back(one, 80 * MEGABYTE)
    assert credits.take(two, 30 * MEGABYTE) is Verdict.TAKEN
    assert credits.take(one, 101 * MEGABYTE) is Verdict.NEVER


def test_more_than_any_credits_that_were_given_is_broken_and_less_is_not() -> None:
    credits = Credits(100 * MEGABYTE)
    (first,) = opened(credits, 1)
    assert credits.tell(first) == 100 * MEGABYTE
    opened(credits, 9)
    assert credits.tell(first) == 10 * MEGABYTE
    # Sent before it heard of the smaller credits.
    assert credits.take(first, 30 * MEGABYTE) is Verdict.TAKEN
    assert credits.take(first, 30 * MEGABYTE) is Verdict.TAKEN
    assert credits.take(first, 50 * MEGABYTE) is Verdict.BROKEN


def test_recorded_answers_and_what_is_held_count() -> None:
    credits = Credits(100 * MEGABYTE)
    (account,) = opened(credits, 1)
    credits.record(account, 60 * MEGABYTE)
    assert not credits.hold("somebody", 50 * MEGABYTE)
    assert credits.hold("somebody", 40 * MEGABYTE)
    assert credits.take(account, 1) is Verdict.LATER
    credits.record(account, 10 * MEGABYTE)
    assert credits.take(account, 50 * MEGABYTE) is Verdict.TAKEN
    credits.close(account)
    credits.release("somebody", 40 * MEGABYTE)
    assert credits.in_work == 0


def test_one_owner_holds_one_lot_or_its_share() -> None:
    credits = Credits(100 * MEGABYTE)
    opened(credits, 10)
    assert credits.hold("large", 30 * MEGABYTE)
    assert not credits.hold("large", 1)
    assert credits.hold("small", 6 * MEGABYTE)
    assert not credits.hold("small", 6 * MEGABYTE)
    assert credits.hold("small", 4 * MEGABYTE)


@pytest.mark.parametrize("order", [(0, 40), (40, 0)])
def test_a_lot_of_no_bytes_beside_another_comes_back_too(order: tuple[int, int]) -> None:
    credits = Credits(100 * MEGABYTE)
    assert credits.hold("somebody", 40)
    assert credits.hold("somebody", 0)
    for size in order:
        credits.release("somebody", size)
    assert credits.in_work == 0
    assert credits.hold("somebody", 100 * MEGABYTE)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["open", "close", "take", "give", "record", "hold", "release"]),
        st.integers(0, 4),
        st.integers(0, 90),
    ),
    max_size=60,
)


@given(STEPS)
def test_never_negative_never_over_the_budget_and_all_comes_back(steps: list[tuple[str, int, int]]) -> None:
    credits = Credits(100 * MEGABYTE)
    accounts: dict[int, Account] = {}
    taken: dict[int, list[int]] = {}
    held: list[tuple[int, int]] = []
    for what, who, megabytes in steps:
        size = megabytes * MEGABYTE
        account = accounts.get(who)
        if what == "open" and account is None:
            accounts[who], taken[who] = Account(), []
            credits.open(accounts[who])
        elif what == "hold" and credits.hold(who, size):
            held.append((who, size))
        elif what == "release" and held:
            credits.release(*held.pop())
        elif account is None:
            continue
        elif what == "close":
            credits.close(accounts.pop(who))
            credits.give_back(account, 5)  # an answer that comes too late changes nothing
        elif what == "take" and credits.take(account, size) is Verdict.TAKEN:
            taken[who].append(size)
        elif what == "give" and taken[who]:
            credits.give_back(account, taken[who].pop())
        elif what == "record" and size - account.recorded <= credits.room:
            credits.record(account, size)
        assert 0 <= credits.in_work <= credits.budget
        assert credits.share * max(len(accounts), 1) <= credits.budget
    for account in accounts.values():
        credits.close(account)
    for who, size in held:
        credits.release(who, size)
    assert credits.in_work == 0
