"""What a checkpoint keeps of the members of the cohort, so that a restarted hub waits for the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hub.scheduler.state import GradGiven, HiddenGiven, Member
from messaging.messages import Tensor


@dataclass(frozen=True)
class MemberNote:
    """A member by its key. `contributes`: its adapter is wanted in the open round; `left`: it has taken its steps."""

    key: str
    partition: tuple[int, int]
    contributes: bool
    left: bool


@dataclass(frozen=True)
class Answered:
    """What the hub answered to the latest step of a member that may not have heard it."""

    key: str
    hidden: HiddenGiven
    grad: GradGiven


def notes_to_json(notes: Sequence[MemberNote]) -> list[dict[str, Any]]:
    """For the checkpoint's `extra`."""
    return [asdict(note) for note in notes]


def notes_from_json(given: Sequence[Mapping[str, Any]]) -> list[MemberNote]:
    """Back from the checkpoint."""
    return [
        MemberNote(item["key"], (item["partition"][0], item["partition"][1]), item["contributes"], item["left"])
        for item in given
    ]


def may_not_have_heard(member: Member) -> bool:
    """Whether nothing that came from an edge shows that it has saved the result of its latest applied step.

    It saves a step before it sends the next one, or its adapter.
    """
    sent_next = member.inside == member.applied or (member.smashed is not None and member.smashed[1] >= member.applied)
    return not sent_next and member.upload is None


def answered_of(member: Member, key: str) -> Answered | None:
    """The answers to keep for a member; None where it needs none, or none are known."""
    if member.grad is None or not may_not_have_heard(member):
        return None
    hidden = member.hiddens.get(member.grad.step)
    return None if hidden is None else Answered(key, hidden, member.grad)


def answers_to_tensors(answers: Sequence[Answered]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Answers as tensors of bytes for a checkpoint's file, and the JSON that says what they are."""
    tensors: dict[str, torch.Tensor] = {}
    facts = []
    for number, item in enumerate(answers):
        shapes = {}
        for what, value in (("hidden", item.hidden.answer), ("grad", item.grad.answer)):
            assert isinstance(value, Tensor)
            tensors[f"{number}/{what}"] = torch.frombuffer(bytearray(b"".join(value.chunks)), dtype=torch.uint8)
            shapes[what] = [value.dtype, list(value.shape)]
        grad = {"step": item.grad.step, "hub_step": item.grad.hub_step, "closes": item.grad.closes}
        facts.append({"key": item.key, "digest": item.hidden.digest.hex(), "shapes": shapes, **grad})
    return tensors, facts


def answers_from_tensors(tensors: Mapping[str, torch.Tensor], facts: Sequence[Mapping[str, Any]]) -> list[Answered]:
    """Back from the checkpoint."""
    out = []
    for number, fact in enumerate(facts):
        found = {}
        for what, (dtype, shape) in fact["shapes"].items():
            found[what] = Tensor(dtype, tuple(shape), (tensors[f"{number}/{what}"].numpy().tobytes(),))
        hidden = HiddenGiven(bytes.fromhex(fact["digest"]), found["hidden"])
        out.append(
            Answered(fact["key"], hidden, GradGiven(fact["step"], found["grad"], fact["hub_step"], fact["closes"]))
        )
    return out
