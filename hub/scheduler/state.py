"""The scheduler's state, every field explained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

#: see `State.chunk`: below this, prompts take longer in pieces than as a whole
CHUNK = 256


class Phase(Enum):
    """Where the cohort is between two optimizer steps of B."""

    GATHERING = "waiting for edges"
    FORWARD = "collecting smashed states"
    STEPPING = "taking a joined step"
    CLOSING = "closing the round"
    OVER = "serving generation"


@dataclass(frozen=True)
class Asked:
    """A forward or a backward of micro-batch `micro` of a step, until it is computed.

    Of a forward: `micros` is the count of micro-batches in its step; `digest` stands for its bytes, and is empty
    unless they may have been asked before.
    """

    request: int
    step: int
    micro: int
    payload: object
    micros: int = 1
    digest: bytes = b""


@dataclass(frozen=True)
class HiddenGiven:
    """The answer to a forward, for an edge that asks again; `digest` stands for the bytes that it asked with."""

    digest: bytes
    answer: object

    def answers(self, digest: bytes) -> bool:
        """Whether a repetition asks the same; an empty digest is never the same."""
        return bool(digest) and self.digest == digest


@dataclass(frozen=True)
class StepTaken:
    """The latest step that was applied, for an edge that asks again: the answers to its backwards by micro-batch."""

    step: int
    answers: Mapping[int, object]
    hub_step: int
    closes: bool


@dataclass
class Wide:
    """How far a request has come that is computed some columns at a time: `have` of `columns`, `step` at once."""

    columns: int
    step: int
    have: int = 0


@dataclass
class Member:
    """An edge that trains."""

    #: names it in events and actions, whichever process of the edge speaks
    session: int
    #: orders the rows of a joined batch, so that arrival does not
    name: str
    #: steps of this edge that B's optimizer has applied
    applied: int = 0
    #: out of the cohort until it is heard again
    silent: bool = False
    #: takes no more steps, but may still await a round
    left: bool = False
    #: forwards of its next step that wait to be joined, by micro-batch
    smashed: dict[int, Asked] = field(default_factory=dict)
    #: its step that is in the joined one, and how many micro-batches that has
    inside: int | None = None
    micros: int = 1
    #: backwards of that step that wait to be joined, by micro-batch
    gradients: dict[int, Asked] = field(default_factory=dict)
    #: answers to its backwards that were computed, by micro-batch
    grads: dict[int, object] = field(default_factory=dict)
    #: the request for the last of these, which is answered when the step is applied; 0 for none
    last: int = 0
    #: by step (the latest applied and the one after it) and micro-batch: what an edge is told that was killed
    hiddens: dict[int, dict[int, HiddenGiven]] = field(default_factory=dict)
    taken: StepTaken | None = None
    #: adapter of the round that is open, once uploaded
    upload: object | None = None
    #: took a step in the open round or uploaded for it, so its adapter is wanted
    contributes: bool = False

    @property
    def active(self) -> bool:
        """One step of it is wanted for each step of B."""
        return not self.left and not self.silent


@dataclass
class State:
    """Everything the scheduler knows."""

    #: edges that must be here before the first step
    cohort: int
    #: optimizer steps of B per round
    round_steps: int
    #: rounds to train; 0 for no end
    rounds: int
    #: active members that are enough for a joined step once its deadline is over; 0: it takes all of them
    quorum: int = 0
    #: optimizer steps of B since the hub's first start
    hub_step: int = 0
    #: rounds that are published
    round: int = 0
    #: optimizer steps of B in the open round
    round_step: int = 0
    #: version of the adapter that is published
    version: int = 0
    phase: Phase = Phase.GATHERING
    #: training members by session, also those that left and still await their round
    members: dict[int, Member] = field(default_factory=dict)
    #: sessions that began the joined step under way, in row order
    joined: tuple[int, ...] = ()
    #: inference requests that wait: (session, request, payload)
    infers: list[tuple[int, int, object]] = field(default_factory=list)
    #: of a request of more positions, this many are computed at a time while others generate: they wait for no more
    chunk: int = CHUNK
    #: the requests of which that holds, (session, request), waiting or under way
    wide: dict[tuple[int, int], Wide] = field(default_factory=dict)
    #: the one of which a part is under way; the rest of it waits
    parted: tuple[int, int, object] | None = None
    #: the last inference was no piece of a wide request, so one goes first now
    narrow_last: bool = False
    #: caches to drop: (session, stream), stream 0 for all
    freeing: list[tuple[int, int]] = field(default_factory=list)
    #: (session, request, round) of edges that wait for a publication
    awaiting: list[tuple[int, int, int]] = field(default_factory=list)
    #: a compute action is under way
    busy: bool = False
    #: requests (session -> (request, step, micro)) that the forward or backward under way will answer
    answering: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    #: sessions whose steps the optimizer is stepping on now
    applying: tuple[int, ...] = ()
    #: micro-batches of the joined step whose forward, and whose backward, was begun
    forwards: int = 0
    backwards: int = 0
    #: (session, request) that the inference under way will answer
    inferring: list[tuple[int, int]] = field(default_factory=list)
    #: the sessions of the last two batches of inference, the latest first
    recent: tuple[frozenset[int], ...] = ()
    #: the last compute action was inference, so training goes first now
    inferred_last: bool = False
    #: joined steps that were gathered for: numbers the deadlines
    gathering: int = 0
    #: the deadline of the one that is gathered for now runs, or is over
    deadline_runs: bool = False
    deadline_over: bool = False
    #: a checkpoint is to be written before the next joined forward
    checkpoint_due: bool = False
    #: no new work is begun
    stopping: bool = False
    #: one of several groups of edges, each with a replica of B: it closes a round only together with the others
    joint: bool = False
    #: the other groups are ready too, so the open round may close
    closes: bool = False
    #: active members of the other groups; all of a cohort if one of these trains already
    elsewhere: int = 0

    @property
    def active(self) -> list[Member]:
        """Members of which a step is wanted, in row order."""
        return sorted((m for m in self.members.values() if m.active), key=lambda m: (m.name, m.session))

    @property
    def inside(self) -> list[Member]:
        """Members of the joined step under way, in row order."""
        here = [self.members[session] for session in self.joined if session in self.members]
        return [member for member in here if member.inside is not None]

    def inferred_lately(self) -> set[int]:
        """The sessions of the last two batches of inference."""
        return {session for batch in self.recent for session in batch}
