"""Guesses from the text: where they come from, and how likely they are held to be."""

from __future__ import annotations

import random

import pytest

from edge.draft_lookup import LONGEST, Lookup, Odds, _agreement


def looked_up(text: str, length: int, earlier: str = "") -> tuple[int, str]:
    """How many letters agree, and the guess after `text`."""
    lookup = Lookup(Odds(), map(ord, earlier))
    lookup.read(map(ord, text))
    return lookup.agreed, "".join(map(chr, lookup.guess(length)))


@pytest.mark.parametrize(
    ("text", "agreed", "guess"),
    [
        ("", 0, ""),
        ("a", 0, ""),
        ("abcdef", 0, ""),
        # One letter, then two, then more.
        ("xa-a", 1, "-a-a"),
        ("the cat. the", 3, " cat"),
        # The longest agreement, not the latest.
        ("1 the cat 2 the dog 3 a cat 1 the", 5, " cat"),
        # Of equal ones the latest.
        (".the cat,the dog;the", 3, " dog"),
        # A guess that reaches the end goes on with itself.
        ("abababab", 6, "abab"),
        ("aaaa", 3, "aaaa"),
        ("xyzxyzxyzxyz", LONGEST, "xyzx"),
    ],
)
def test_guess(text: str, agreed: int, guess: str) -> None:
    assert looked_up(text, 4) == (agreed, guess)


def test_an_earlier_text_is_guessed_from_but_not_gone_on_from() -> None:
    assert looked_up("he told her", 4, "she told her all") == (8, " all")
    # It ends where it ends, and what comes after it does not follow from it.
    assert looked_up("told her", 4, "she told her al") == (8, " al")
    assert looked_up("x", 4, "she told her x") == (0, "")
    assert looked_up("r", 4, "her") == (0, "")


def test_of_many_places_the_latest_are_compared() -> None:
    """A text of one pair over and over costs no more than another."""
    lookup = Lookup(Odds())
    lookup.read([7, 1, 2, 3, *[1, 2, 9] * 500, 7, 1, 2])
    assert lookup.guess(1) == [9]


def test_chances_follow_what_came() -> None:
    odds = Odds()
    before = odds[3]
    for _ in range(100):
        odds.note(3, True)
        odds.note(2, False)
    assert before < 0.9 < odds[3] < 1.0
    assert odds[2] < 0.05
    assert odds.along(2, 3) == [odds[2], odds[3], odds[4]]
    assert odds[LONGEST + 5] == odds[LONGEST]
    for _ in range(100):
        odds.note(3, False)
    assert odds[3] < 0.3


def test_every_token_that_comes_teaches_whether_its_guess_was_sent_or_not() -> None:
    odds = Odds()
    likely, unlikely = odds[LONGEST], odds[1]
    lookup = Lookup(odds)
    lookup.read([1, 2, 3, 4, 5, 6, 7, 8, 9, 10] * 2)
    assert odds[LONGEST] == likely
    lookup.add([1, 2, 3])
    assert odds[LONGEST] > likely
    lookup.add([5, 5, 9, 5])
    assert odds[1] < unlikely


def test_the_index_finds_what_a_search_finds() -> None:
    rng = random.Random(3)
    text = [rng.randrange(4) for _ in range(60)]
    lookup = Lookup(Odds())
    for end in range(1, len(text) + 1):
        lookup.add(text[end - 1 : end])
        known = text[:end]
        places = [place for place in range(1, end) if known[place - 1] == known[-1]]
        longest = max((_agreement(known, place) for place in places), default=0)
        assert lookup.agreed == longest
        if longest:
            best = max(place for place in places if _agreement(known, place) == longest)
            assert lookup.guess(1) == [known[best]]
