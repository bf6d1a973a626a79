"""What every genre shares: drawing facts, and filling the slots of a note with templates."""

from datetime import date, timedelta
from random import Random
from string import ascii_uppercase

from tools.pocket.words import (
    CODAS,
    COMPANIES,
    DAYS,
    JOBS,
    MEN,
    MONTHS,
    ONSETS,
    STREETS,
    SURNAMES,
    TOWNS,
    VOWELS,
    WOMEN,
)

INVENTED_SHARE = 0.25  # of the names: a model that has spelled and repeated many learns new ones quickly

Facts = dict[str, str]
Slot = tuple[str, ...]
"""The templates of one place in a note: one of them is drawn; an empty one means that nothing stands there."""


def invent(rng: Random) -> str:
    """A name that nobody has, of one to three syllables."""
    syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(("", rng.choice(CODAS))) for _ in range(3)]
    return "".join(syllables[: rng.choice((1, 2, 2, 3))]).capitalize()


def name_from(rng: Random, names: tuple[str, ...]) -> str:
    return invent(rng) if rng.random() < INVENTED_SHARE else rng.choice(names)


def code(rng: Random) -> str:
    """Two or four capitals, as in a reference. (The abbreviations of the private text have three.)"""
    return "".join(rng.choices(ascii_uppercase, k=rng.choice((2, 4))))


def person(rng: Random, prefix: str = "") -> Facts:
    """A person and the pronouns that go with the person, under names that start with `prefix`."""
    woman = rng.random() < 0.5
    first, last = rng.choice(WOMEN if woman else MEN), name_from(rng, SURNAMES)
    facts = {
        "name": f"{first} {last}",
        "title": f"{'Mrs.' if woman else 'Mr.'} {last}",
        "initial": f"{first[0]}. {last}",
        "last": last,
        "he": "she" if woman else "he",
        "He": "She" if woman else "He",
        "his": "her" if woman else "his",
        "His": "Her" if woman else "His",
        "him": "her" if woman else "him",
        "age": str(rng.randint(18, 89)),
        "job": rng.choice(JOBS),
    }
    return {prefix + key: value for key, value in facts.items()}


def written(day: date) -> str:
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def amount(rng: Random) -> str:
    return f"{rng.choice((50, 100, 250)) * rng.randint(3, 99):,} euros"


def setting(rng: Random) -> Facts:
    """Facts that any genre may use: when, where, how much, who writes."""
    company, town = name_from(rng, COMPANIES), name_from(rng, TOWNS)
    today = date(2015, 1, 1) + timedelta(days=rng.randrange(3650))
    return {
        "earlier": written(today - timedelta(days=rng.randint(5, 40))),
        "date": written(today),
        "later": written(today + timedelta(days=rng.randint(5, 60))),
        "weekday": rng.choice(DAYS),
        "hour": str(rng.randint(8, 17)),
        "amount": amount(rng),
        "company": company,
        "other": name_from(rng, tuple(name for name in COMPANIES if name != company)),
        "town": town,
        "other_town": name_from(rng, tuple(name for name in TOWNS if name != town)),
        "street": f"{rng.randint(1, 99)} {rng.choice(STREETS)} Street",
        "count": str(rng.randint(6, 60)),
        "days": rng.choice(("7", "10", "14", "21", "30", "60")),
        "weeks": rng.choice(("two", "three", "four", "six", "eight")),
        "few": rng.choice(("two", "three", "four", "five")),
        "code": code(rng),
        "number": str(rng.randint(1000, 9999)),
        "years": rng.choice(("one year", "two years", "three years", "five years")),
        **person(rng),
        **person(rng, "my_"),
    }


def fill(rng: Random, slots: tuple[Slot, ...], facts: Facts) -> str:
    """One template for each slot, joined by spaces, or by the newline that one of them ends or starts with."""
    text = ""
    for slot in slots:
        piece = rng.choice(slot).format(**facts)
        joined = not piece or not text or text.endswith("\n") or piece.startswith("\n")
        text += piece if joined else f" {piece}"
    return text.strip()
