"""What happened: every event the scheduler hears of, in the past tense.

Payloads (tensors, uploads) are opaque here: they are handed on inside actions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class EdgeJoined:
    """A session was opened. `train` says whether it joins the cohort; `name` orders the rows."""

    session: int
    name: str
    train: bool
    applied: int = 0


@dataclass(frozen=True)
class EdgeRestarted:
    """The same member speaks from a new process: what the old one asked is answered to nobody."""

    session: int


@dataclass(frozen=True)
class EdgeLeft:
    """A session takes no more steps. `done`: all its steps are taken and its adapter is uploaded."""

    session: int
    done: bool


@dataclass(frozen=True)
class EdgeGone:
    """A session is closed for good; nothing of it may be answered any more."""

    session: int


@dataclass(frozen=True)
class EdgeFellSilent:
    """Nothing was heard of a member for longer than the grace."""

    session: int


@dataclass(frozen=True)
class EdgeCameBack:
    """A silent member was heard again."""

    session: int


@dataclass(frozen=True)
class SmashedReceived:
    """An edge asks for the forward of micro-batch `micro` of `micros` of its step `step`.

    `digest` stands for the bytes of one that may have been asked before; it is empty where it is new.
    """

    session: int
    request: int
    step: int
    payload: object
    digest: bytes = b""
    micro: int = 0
    micros: int = 1


@dataclass(frozen=True)
class GradientReceived:
    """An edge asks for the backward of micro-batch `micro` of its step `step`."""

    session: int
    request: int
    step: int
    payload: object
    micro: int = 0


@dataclass(frozen=True)
class InferReceived:
    """A generation or an evaluation asks for a forward of `rows` x `columns` positions.

    It may be computed some columns at a time, unless `columns` is 1.
    """

    session: int
    request: int
    payload: object
    rows: int = 1
    columns: int = 1


@dataclass(frozen=True)
class StreamClosed:
    """A generation's cache is not needed any more."""

    session: int
    stream: int


@dataclass(frozen=True)
class AdapterUploaded:
    """An edge's adapter for round `round` is here, whole."""

    session: int
    round: int
    payload: object


@dataclass(frozen=True)
class RoundAwaited:
    """An edge waits for the publication of round `round`."""

    session: int
    request: int
    round: int


@dataclass(frozen=True)
class ForwardDone:
    """The joined forward was computed; an answer per session in it, and the digest of what it asked."""

    answers: Mapping[int, object]
    digests: Mapping[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class BackwardDone:
    """The joined backward of a micro-batch was computed; an answer per session that gave a gradient."""

    answers: Mapping[int, object]


@dataclass(frozen=True)
class StepApplied:
    """B's optimizer has stepped on the gradients of these sessions; with none of them it has not."""

    sessions: tuple[int, ...]


@dataclass(frozen=True)
class InferDone:
    """A batch of inference was computed: (session, request, answer), without those of which a part is missing."""

    answers: tuple[tuple[int, int, object], ...]


@dataclass(frozen=True)
class RoundPublished:
    """The new global adapter is on disk and served as `version`."""

    version: int


@dataclass(frozen=True)
class HousekeepingDone:
    """Memory was freed."""


@dataclass(frozen=True)
class DeadlinePassed:
    """The time that `StartDeadline` of the same number began to count is over."""

    gathering: int


@dataclass(frozen=True)
class CheckpointDue:
    """The last checkpoint is old enough: write one before the next joined forward."""


@dataclass(frozen=True)
class OthersChanged:
    """So many members are active in the other groups; a cohort that was too small may be whole now."""

    active: int


@dataclass(frozen=True)
class RoundCloses:
    """All groups are ready: this one closes the open round with them."""


@dataclass(frozen=True)
class RoundReopened:
    """The round does not close yet after all: another group takes steps again.

    `steps`: edges have come over from a group that is no more, and take the rest of theirs here.
    """

    steps: bool = False


Event = (
    EdgeJoined
    | EdgeRestarted
    | EdgeLeft
    | EdgeGone
    | EdgeFellSilent
    | EdgeCameBack
    | SmashedReceived
    | GradientReceived
    | InferReceived
    | StreamClosed
    | AdapterUploaded
    | RoundAwaited
    | ForwardDone
    | BackwardDone
    | StepApplied
    | InferDone
    | RoundPublished
    | HousekeepingDone
    | DeadlinePassed
    | CheckpointDue
    | OthersChanged
    | RoundCloses
    | RoundReopened
)
