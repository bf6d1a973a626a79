"""Which request goes where, what answers it, and how one may end."""

from __future__ import annotations

from dataclasses import dataclass

from messaging.errors import ErrorCode, FedseaError, HubError
from messaging.messages import (
    AnyMessage,
    AwaitRound,
    Bye,
    Chunk,
    Describe,
    Description,
    Error,
    Fetch,
    Hello,
    Infer,
    InferHidden,
    KeyReplaced,
    Leave,
    Message,
    Published,
    ReplaceKey,
    StepBackward,
    StepForward,
    StepGrad,
    StepHidden,
    Upload,
    UploadAck,
    Welcome,
)
from messaging.transport import Buffer, Channel

#: What each request is answered with, unless it is refused.
ANSWERS: dict[type[Message], type[Message]] = {
    Describe: Description,
    Fetch: Chunk,
    Hello: Welcome,
    Leave: Bye,
    StepForward: StepHidden,
    StepBackward: StepGrad,
    Upload: UploadAck,
    AwaitRound: Published,
    Infer: InferHidden,
    ReplaceKey: KeyReplaced,
}
#: Requests that need no session; all others go out with a session's number and epoch.
WITHOUT_SESSION = (Describe, Fetch, Hello, ReplaceKey)
_CTL_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Outgoing:
    """Frames to send now."""

    request: int
    channel: Channel
    frames: list[Buffer]


@dataclass(frozen=True, slots=True)
class Answered:
    """The reply to a request."""

    request: int
    message: AnyMessage


@dataclass(frozen=True, slots=True)
class Failed:
    """A request that ends without its reply. Request 0: the hub could not tell which one it means."""

    request: int
    error: FedseaError


def channel_of(message: AnyMessage) -> Channel:
    """Small and urgent on CTL; large, or ordered (so that the order holds), on BULK. Replies take the same way."""
    if message.ordered or isinstance(message, Fetch | Upload):
        return Channel.BULK
    large = isinstance(message, Infer) and message.smashed.nbytes > _CTL_BYTES
    return Channel.BULK if large else Channel.CTL


def hub_error(message: Error) -> HubError:
    """The exception for a refusal; a code of a newer hub that this side does not know counts as PROTOCOL."""
    known = message.code in ErrorCode.__members__.values()
    return HubError(ErrorCode(message.code) if known else ErrorCode.PROTOCOL, message.text, message.detail)
