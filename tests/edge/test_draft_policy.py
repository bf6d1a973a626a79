"""How many tokens a request guesses: a few numbers in, a number out."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from edge.draft_policy import MOST, SIZES, Policy, RequestTimes

SURE = [0.95] * MOST
UNSURE = [0.3] * MOST


def measured(plain_s: float, first_s: float = 0.0, each_s: float = 0.0, prompt: int = 100) -> Policy:
    """A policy that has seen a prompt, plain requests and each size: the first guess adds `first_s`, each `each_s`."""
    policy = Policy()
    policy.note_prompt(prompt, plain_s + prompt * each_s)
    for _ in range(4):
        policy.note(0, 0, plain_s)
    for size in SIZES:
        policy.note(size, 0, plain_s + first_s + size * each_s)
    return policy


def test_nothing_is_guessed_before_a_plain_request_was_timed() -> None:
    policy = Policy()
    assert policy.size(SURE) == 0
    policy.note_prompt(100, 0.2)
    assert policy.size(SURE) == 0
    policy.note(0, 0, 0.05)
    assert policy.size(SURE) == MOST


def test_the_links_round_trip_stands_in_until_then() -> None:
    known: list[float] = []
    policy = Policy(lambda: known[0] if known else None)
    known.append(0.05)
    # What a prompt's position takes is not known: it may be more than the link's round trip.
    assert policy.size(SURE) == 0
    policy.note_prompt(100, 0.15)
    assert policy.size(SURE) == MOST
    known[0] = 0.0001
    assert policy.size(UNSURE) == 0


@pytest.mark.parametrize(
    ("plain_s", "first_s", "each_s", "chances", "size"),
    [
        # A slow link: whatever is likely at all is worth a try.
        (0.055, 0.001, 0.0003, SURE, 15),
        (0.055, 0.001, 0.0003, UNSURE, 3),
        (0.055, 0.001, 0.0003, [0.02] * MOST, 0),
        # A fast link and computing that costs: only what is nearly sure, and a little of it.
        (0.003, 0.002, 0.001, [0.85] * MOST, 7),
        (0.003, 0.002, 0.001, UNSURE, 0),
        # A further position costs as much as a request: never.
        (0.003, 0.003, 0.003, SURE, 0),
        # A further position costs nothing: as many as there can be.
        (0.003, 0.0, 0.0, SURE, 15),
    ],
)
def test_size_follows_from_times_and_chances(
    plain_s: float, first_s: float, each_s: float, chances: list[float], size: int
) -> None:
    assert measured(plain_s, first_s, each_s).size(chances) == size


def test_no_more_is_guessed_than_there_is_to_guess() -> None:
    policy = measured(0.05)
    assert policy.size([]) == 0
    assert policy.size(SURE[:5]) == 5
    assert policy.size([0.9]) == 1


def test_guessing_itself_may_cost_too_much() -> None:
    policy = measured(0.02, 0.001, 0.0005)
    assert policy.size(SURE, lambda size: size * 0.001) == 15
    assert policy.size(SURE, lambda size: size * 0.03) == 0


def test_a_token_that_comes_fast_anyway_saves_less() -> None:
    """Where 8 tokens come in a round trip, one more saves an eighth of it."""
    fresh, quick = measured(0.05, 0.0, 0.004), measured(0.05, 0.0, 0.004)
    for _ in range(20):
        quick.note(7, 7, 0.05 + 7 * 0.004)
    assert quick.size([0.7] * MOST) < fresh.size([0.7] * MOST)


def test_times_follow_the_link() -> None:
    """A link that becomes slow moves the plain time, whatever is guessed, and not what a position adds."""
    times = RequestTimes()
    for width, seconds in ((1, 0.01), (4, 0.013), (8, 0.017)) * 8:
        times.note(width, seconds)
    assert times.plain == pytest.approx(0.01, rel=0.01)
    assert times.added(8) == pytest.approx(0.007, rel=0.05)
    for _ in range(20):
        times.note(8, 0.067)
        times.note(1, 0.06)
    assert times.plain == pytest.approx(0.06, rel=0.05)
    assert times.added(8) == pytest.approx(0.007, abs=0.004)


def test_one_stall_changes_little() -> None:
    policy = measured(0.05, 0.001, 0.0005)
    policy.note(3, 0, 30.0)
    policy.note(0, 0, 30.0)
    assert policy.times.plain is not None
    assert policy.times.plain < 0.12
    assert policy.size(SURE) == 15


def test_a_width_that_was_not_measured_costs_at_least_the_next_narrower_one() -> None:
    times = RequestTimes()
    times.note(1, 0.02)
    times.note(4, 0.03)
    assert times.added(2) == 0.0
    assert times.added(8) == times.added(4) == pytest.approx(0.01)
    # What the prompt took beyond a plain request is what its positions added.
    times.note_prompt(101, 0.12)
    assert times.added(2) == pytest.approx(0.001)
    assert times.added(8) == pytest.approx(0.014)


def test_where_guessing_did_not_pay_it_is_tried_again_more_and_more_seldom() -> None:
    policy = measured(0.01, 0.02, 0.0)
    tries = []
    for request in range(600):
        if size := policy.size(UNSURE):
            tries.append(request)
            assert size == 3
        policy.note(size, 0, 0.01 + (0.02 if size else 0.0))
    gaps = [b - a for a, b in itertools.pairwise(tries)]
    assert tries[0] == 16
    assert gaps == [33, 65, 129, 257]


def test_what_has_become_cheap_is_found_by_such_a_try() -> None:
    policy = measured(0.01, 0.02, 0.0)
    sizes = []
    for _ in range(120):
        sizes.append(policy.size([0.5] * MOST))
        policy.note(sizes[-1], 0, 0.01)
    assert sizes[0] == 0
    assert 3 in sizes[:20]
    assert sizes[-1] > 0


def test_hopeless_guesses_are_not_even_tried() -> None:
    policy = measured(0.01, 0.02, 0.0)
    for _ in range(100):
        assert policy.size([0.01] * MOST) == 0
        policy.note(0, 0, 0.01)


def test_decisions_need_no_torch() -> None:
    code = "import sys, edge.draft_policy, edge.draft_lookup; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
