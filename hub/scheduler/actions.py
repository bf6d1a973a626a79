"""What to do: every action the scheduler asks for, in the imperative.

At most one of the compute actions (RunForward .. FreeStreams) is under way at a time; its Done event ends it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from messaging.errors import ErrorCode


@dataclass(frozen=True)
class RunForward:
    """Join these payloads (in this order) into one forward of micro-batch `micro`, and keep its graph.

    `checkpoint`: write one first. Every edge in the payloads has saved what it had before this step.
    """

    payloads: tuple[tuple[int, object], ...]
    checkpoint: bool = False
    micro: int = 0


@dataclass(frozen=True)
class RunBackward:
    """Run the backward of micro-batch `micro` with these gradients; what they give B's adapter is added up by edge."""

    gradients: Mapping[int, object]
    micro: int = 0


@dataclass(frozen=True)
class ApplyStep:
    """Step B's optimizer on what these sessions gave in the joined step, in this order, and forget its graphs.

    Without any the step is only forgotten.
    """

    sessions: tuple[int, ...]


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
    micro: int = 0


@dataclass(frozen=True)
class AnswerBackward:
    """Send the gradient by smashed; `round_closes`: the edge uploads its adapter now.

    The last micro-batch's is sent when the step is applied, and only that one tells `hub_step` and `round_closes`.
    """

    session: int
    request: int
    step: int
    answer: object
    hub_step: int
    round_closes: bool
    micro: int = 0


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
    detail: int = 0


@dataclass(frozen=True)
class StartDeadline:
    """Tell when the time to gather for a joined step is over, counted from now, with this number."""

    gathering: int


@dataclass(frozen=True)
class Note:
    """A line for the screen and the log."""

    text: str


Compute = RunForward | RunBackward | ApplyStep | RunInfer | CloseRound | FreeStreams
Action = Compute | AnswerForward | AnswerBackward | AnswerInfer | AnswerRound | Refuse | StartDeadline | Note
