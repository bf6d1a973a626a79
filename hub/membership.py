"""What a checkpoint keeps of the members of the cohort, so that a restarted hub waits for the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hub.scheduler.state import HiddenGiven, Member, StepTaken
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
    """What the hub answered to the latest step of a member that may not have heard it, by micro-batch."""

    key: str
    hiddens: Mapping[int, HiddenGiven]
    taken: StepTaken


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
    sent_next = member.inside == member.applied or any(a.step >= member.applied for a in member.smashed.values())
    return not sent_next and member.upload is None


def answered_of(member: Member, key: str) -> Answered | None:
    """The answers to keep for a member; None where it needs none, or none are known."""
    if member.taken is None or not may_not_have_heard(member):
        return None
    hiddens = member.hiddens.get(member.taken.step)
    return None if hiddens is None else Answered(key, dict(hiddens), member.taken)


def answers_to_tensors(answers: Sequence[Answered]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Answers as tensors of bytes for a checkpoint's file, and the JSON that says what they are."""
    tensors: dict[str, torch.Tensor] = {}
    facts = []
    for number, item in enumerate(answers):
        taken, micros = item.taken, []
        for micro in range(len(taken.answers)):
            given = item.hiddens[micro]
            fact: dict[str, Any] = {"digest": given.digest.hex()}
            for what, value in (("hidden", given.answer), ("grad", taken.answers[micro])):
                assert isinstance(value, Tensor)
                data = bytearray(b"".join(value.chunks))
                tensors[f"{number}/{micro}/{what}"] = torch.frombuffer(data, dtype=torch.uint8)
                fact[what] = [value.dtype, list(value.shape)]
            micros.append(fact)
        told = {"step": taken.step, "hub_step": taken.hub_step, "closes": taken.closes}
        facts.append({"key": item.key, "micros": micros, **told})
    return tensors, facts


def answers_from_tensors(tensors: Mapping[str, torch.Tensor], facts: Sequence[Mapping[str, Any]]) -> list[Answered]:
    """Back from the checkpoint."""
    out = []
    for number, fact in enumerate(facts):
        hiddens, grads = {}, {}
        for micro, given in enumerate(fact["micros"]):
            found = {}
            for what in ("hidden", "grad"):
                dtype, shape = given[what]
                data = tensors[f"{number}/{micro}/{what}"].numpy().tobytes()
                found[what] = Tensor(dtype, tuple(shape), (data,))
            hiddens[micro] = HiddenGiven(bytes.fromhex(given["digest"]), found["hidden"])
            grads[micro] = found["grad"]
        taken = StepTaken(fact["step"], grads, fact["hub_step"], fact["closes"])
        out.append(Answered(fact["key"], hiddens, taken))
    return out
