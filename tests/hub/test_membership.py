"""What a checkpoint keeps of members, and of answers that their edges may not have heard."""

from __future__ import annotations

import json

from hub.membership import (
    MemberNote,
    answered_of,
    answers_from_tensors,
    answers_to_tensors,
    notes_from_json,
    notes_to_json,
)
from hub.scheduler.state import Asked, HiddenGiven, Member, StepTaken
from messaging.messages import Tensor


def tensor(fill: int) -> Tensor:
    """A [1, 2, 3] f16 tensor in two pieces."""
    return Tensor("f16", (1, 2, 3), (bytes([fill]) * 8, bytes([fill + 1]) * 4))


def member(**more: object) -> Member:
    """A member after its step 4 of two micro-batches, whose answers are known."""
    hiddens = {0: HiddenGiven(b"digest", tensor(1)), 1: HiddenGiven(b"other", tensor(5))}
    given = Member(7, "ward", applied=5, hiddens={4: hiddens})
    given.taken = StepTaken(4, {0: tensor(3), 1: tensor(7)}, 9, True)
    for name, value in more.items():
        setattr(given, name, value)
    return given


def test_notes_go_through_json() -> None:
    notes = [MemberNote("key", (1, 2), True, False), MemberNote("other", (3, 1), False, True)]
    assert notes_from_json(json.loads(json.dumps(notes_to_json(notes)))) == notes


def test_answers_go_through_tensors() -> None:
    answered = answered_of(member(), "key")
    assert answered is not None
    tensors, facts = answers_to_tensors([answered])
    (back,) = answers_from_tensors(tensors, json.loads(json.dumps(facts)))
    assert (back.key, [given.digest for given in back.hiddens.values()]) == ("key", [b"digest", b"other"])
    assert (back.taken.step, back.taken.hub_step, back.taken.closes) == (4, 9, True)
    found = [back.hiddens[0].answer, back.taken.answers[0], back.hiddens[1].answer, back.taken.answers[1]]
    for one, other in zip(found, (tensor(fill) for fill in (1, 3, 5, 7)), strict=True):
        assert isinstance(one, Tensor)
        assert (one.dtype, one.shape, b"".join(one.chunks)) == (other.dtype, other.shape, b"".join(other.chunks))


def test_answers_are_kept_until_something_shows_that_the_edge_has_them() -> None:
    assert answered_of(member(), "key") is not None
    assert answered_of(member(smashed={0: Asked(11, 4, 0, "again")}), "key") is not None
    assert answered_of(member(smashed={0: Asked(11, 5, 0, "next")}), "key") is None
    assert answered_of(member(inside=5), "key") is None
    assert answered_of(member(upload="adapter"), "key") is None
    assert answered_of(member(taken=None), "key") is None
