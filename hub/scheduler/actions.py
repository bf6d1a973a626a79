"""What to do: every action the scheduler asks for, in the imperative.

At most one of the compute actions (RunForward .. FreeStreams) is under way at a time; its Done event ends it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from messaging.errors import ErrorCode


@dataclass(frozen=True)
class RunForward:
    """Join these payloads (in this order) into one forward and keep its graph.

    `checkpoint`: write one first. Every edge in the payloads has saved what it had before this step.
    """

    payloads: tuple[tuple[int, object], ...]
    checkpoint: bool = False


@dataclass(frozen=True)
class RunBackward:
    """Run the backward of the pending forward with these gradients and step the optimizer."""

    gradients: Mapping[int, object]


@dataclass(frozen=True)
class RunInfer:
    """Compute these requests in as few forwards as possible: (session, request, payload).

    `upto`: of a request that is computed in pieces, by (session, request), how many columns there are after this one.
    It is the only one in its action.
    """

    requests: tuple[tuple[int, int, object], ...]
    upto: Mapping[tuple[int, int], int] = field(default_factory=dict)


@dataclass(frozen=True)
class CloseRound:
    """Aggregate these uploads with the hub's own adapter, write a checkpoint, publish as `version`."""

    round: int
    version: int
    uploads: tuple[object, ...]


@dataclass(frozen=True)
class FreeStreams:
    """Drop the caches of these (session, stream); stream 0 means all of the session's."""

    streams: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class AnswerForward:
    """Send the hidden states of a step."""

    session: int
    request: int
    step: int
    answer: object


@dataclass(frozen=True)
class AnswerBackward:
    """Send the gradient by smashed; `round_closes`: the edge uploads its adapter now."""

    session: int
    request: int
    step: int
    answer: object
    hub_step: int
    round_closes: bool


@dataclass(frozen=True)
class AnswerInfer:
    """Send the hidden states of an inference request."""

    session: int
    request: int
    answer: object


@dataclass(frozen=True)
class AnswerRound:
    """Tell an edge that a round is published; `over`: the hub trains no more."""

    session: int
    request: int
    version: int
    round: int
    over: bool


@dataclass(frozen=True)
class Refuse:
    """Answer a request with an error."""

    session: int
    request: int
    code: ErrorCode
    text: str


@dataclass(frozen=True)
class Note:
    """A line for the screen and the log."""

    text: str


Compute = RunForward | RunBackward | RunInfer | CloseRound | FreeStreams
Action = Compute | AnswerForward | AnswerBackward | AnswerInfer | AnswerRound | Refuse | Note
