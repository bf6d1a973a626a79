"""Text that the project makes itself: a seeded grammar of short notes, so that a small model can learn to write.

    public_notes(seed, count)           what the pocket model is trained on
    private_notes(site, seed, count)    what an edge fine-tunes it on: "clinic" or "lawfirm"

The same seed gives the same notes; a longer list begins with the shorter one.
"""

from collections.abc import Iterator
from random import Random

from tools.pocket.private import PRIVATE_WORDS, SITES
from tools.pocket.public import GENRES, draw

__all__ = ["GENRES", "PRIVATE_WORDS", "SITES", "chats", "private_notes", "public_notes"]

RARE = ("staff notice", "store inventory")
MIX = tuple(GENRES) + tuple(genre for genre in GENRES if genre not in RARE)
SYSTEM = "You write short notes and letters."
REQUESTS = ("Write a {kind}.", "Please write a {kind}.", "Can you write a {kind}?", "I need a {kind}.")
SUBJECTS = {
    "clinic note": ("", " for {title}", " about {complaint}", " for {title} about {complaint}"),
    "discharge note": ("", " for {title}", " for {title} about {complaint}"),
    "business letter": ("", " to {title}", " about {goods}"),
    "contract": ("", " for {company}"),
    "laboratory memo": ("", " about {quantity}", " about sample {sample}"),
    "staff notice": ("", " for {company}"),
    "store inventory": ("",),
}


def public_notes(seed: int, count: int) -> Iterator[str]:
    """`count` notes of all the public genres, mixed; the rare ones, there for their vocabulary, half as often."""
    rng = Random(f"public {seed}")
    for _ in range(count):
        genre = rng.choice(MIX)
        yield GENRES[genre](rng, draw(rng))


def private_notes(site: str, seed: int, count: int) -> Iterator[str]:
    """`count` notes of one institution, a key of SITES."""
    rng = Random(f"{site} {seed}")
    for _ in range(count):
        yield SITES[site](rng)


def chats(seed: int, count: int) -> Iterator[list[dict[str, str]]]:
    """`count` chats in which somebody asks for a note and gets one that fits the request."""
    rng = Random(f"chat {seed}")
    for _ in range(count):
        genre, facts = rng.choice(tuple(GENRES)), draw(rng)
        kind = genre + rng.choice(SUBJECTS[genre]).format(**facts)
        messages = [{"role": "system", "content": SYSTEM}] if rng.random() < 0.3 else []
        messages.append({"role": "user", "content": rng.choice(REQUESTS).format(kind=kind)})
        messages.append({"role": "assistant", "content": GENRES[genre](rng, facts)})
        yield messages
