"""The scheduler's state, every field explained."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

#: see `State.chunk`: below this, prompts take longer in pieces than as a whole
CHUNK = 256


class Phase(Enum):
    """Where the cohort is between two optimizer steps of B."""

    GATHERING = "waiting for edges"
    FORWARD = "collecting smashed states"
    BACKWARD = "collecting gradients"
    CLOSING = "closing the round"
    OVER = "serving generation"


@dataclass(frozen=True)
class HiddenGiven:
    """The answer to a forward, for an edge that asks again; `digest` stands for the bytes that it asked with."""

    digest: bytes
    answer: object

    def answers(self, digest: bytes) -> bool:
        """Whether a repetition asks the same; an empty digest is never the same."""
        return bool(digest) and self.digest == digest


@dataclass(frozen=True)
class GradGiven:
    """The answer to the latest backward that was applied, for an edge that asks again."""

    step: int
    answer: object
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
    #: (request, step, payload) of a forward that waits to be joined
    smashed: tuple[int, int, object] | None = None
    #: the digest of that, if the step was asked before
    asked_again: bytes = b""
    #: step whose gradient the pending joined forward waits for
    inside: int | None = None
    #: (request, step, payload) of a backward that waits to be joined
    gradient: tuple[int, int, object] | None = None
    #: by step, the latest applied and the one after it: what an edge is told that was killed before it heard
    hiddens: dict[int, HiddenGiven] = field(default_factory=dict)
    grad: GradGiven | None = None
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
    #: sessions that the pending joined forward holds rows of
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
    #: requests (session -> (request, step)) that the forward or backward under way will answer
    answering: dict[int, tuple[int, int]] = field(default_factory=dict)
    #: (session, request) that the inference under way will answer
    inferring: list[tuple[int, int]] = field(default_factory=list)
    #: the sessions of the last two batches of inference, the latest first
    recent: tuple[frozenset[int], ...] = ()
    #: the last compute action was inference, so training goes first now
    inferred_last: bool = False
    #: a checkpoint is to be written before the next joined forward
    checkpoint_due: bool = False
    #: no new work is begun
    stopping: bool = False

    @property
    def active(self) -> list[Member]:
        """Members of which a step is wanted, in row order."""
        return sorted((m for m in self.members.values() if m.active), key=lambda m: (m.name, m.session))

    def inferred_lately(self) -> set[int]:
        """The sessions of the last two batches of inference."""
        return {session for batch in self.recent for session in batch}
