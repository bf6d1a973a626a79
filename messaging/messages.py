"""Every message that FedSEA sends, in one file.

A message is a frozen dataclass. Its scalar fields cross in the header, in the order in which they stand
here; its tensors cross as raw frames behind the header. `framing.py` turns messages into frames and back
and refuses whatever does not fit the types and limits given here.

Who may send what: E = edge to hub, H = hub to edge. `ORDERED` requests are numbered per session and
applied exactly once; all others may be repeated freely.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

PROTOCOL_VERSION = 4

#: Request ids from here on are not numbered in order: those requests may be repeated without harm.
UNORDERED_BASE = 1 << 31

MAX_HEADER_BYTES = 16 * 1024
MAX_FRAME_BYTES = 1024 * 1024
MAX_TENSORS = 4
MAX_DIMS = 4
MAX_TENSOR_BYTES = 1 << 30


@dataclass(frozen=True)
class Limit:
    """The most that a field may hold: characters, bytes, items, or the value of an integer."""

    most: int
    least: int = 0


Name = Annotated[str, Limit(128)]
Text = Annotated[str, Limit(2048)]
Hash = Annotated[str, Limit(64)]
Key = Annotated[str, Limit(40)]
Count = Annotated[int, Limit((1 << 53) - 1)]
Signed = Annotated[int, Limit((1 << 53) - 1, -1)]
Flag = Annotated[int, Limit(1)]
#: The most micro-batches that a step may have: each is a graph that the hub holds.
MOST_MICRO_BATCHES = 16
Micro = Annotated[int, Limit(MOST_MICRO_BATCHES - 1)]
Micros = Annotated[int, Limit(MOST_MICRO_BATCHES)]
#: Integers that describe the rows of a batch; see `blocks.layout`.
Layout = Annotated[tuple[int, ...], Limit(4096)]
Names = Annotated[tuple[str, ...], Limit(64)]


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor as bytes: dtype name from `DTYPES`, shape, little-endian data in C order.

    `chunks` holds the data as one or more buffers whose lengths add up to `nbytes`. In `q8` each row of the last
    axis stands as its scales (bf16, one for every `q8_group` values), then its values (int8): value = scale * int8.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[bytes | memoryview, ...] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """The number of bytes that dtype and shape ask for."""
        return nbytes_of(self.dtype, self.shape)


#: dtype name -> (code in the header, bytes per element; those of q8 without its scales)
DTYPES: dict[str, tuple[int, int]] = {
    "f32": (1, 4), "f16": (2, 2), "bf16": (3, 2), "u8": (4, 1), "i32": (5, 4), "q8": (6, 1)
}  # fmt: skip


def q8_group(width: int) -> int:
    """How many values of a row of `width` share one scale: 128, or more where a row would have over 8 scales."""
    return max(128, -(-width // 8))


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """The bytes of a tensor of this dtype (of DTYPES) and shape."""
    total = DTYPES[dtype][1]
    for size in shape:
        total *= size
    if dtype == "q8":
        width = shape[-1] if shape else 1
        scales = -(-width // q8_group(width))
        total += total // width * 2 * scales if width else 0
    return total


@dataclass(frozen=True)
class Envelope:
    """What every message carries besides its own fields.

    session: number given by WELCOME, 0 before; epoch: the hub's, raised at every start; request: id that
    the reply repeats; ack: every ordered reply up to this one was received (E), every ordered request up to
    this one was taken (H); credits: bytes the edge may have unanswered (H, 0 says nothing); deadline_ms: the
    sender gives up after this long, 0 for never.
    """

    session: int = 0
    epoch: int = 0
    request: int = 0
    ack: int = 0
    credits: int = 0
    deadline_ms: int = 0


@dataclass(frozen=True)
class Recipe:
    """How the hub trains; it owns these and WELCOME carries them."""

    lr: float
    lora_rank: int
    lora_alpha: float
    target_modules: tuple[str, ...]
    round_steps: int
    rounds: int
    cohort: int
    clip_norm: float
    warmup_steps: int
    weight_decay: float
    seed: int


@dataclass(frozen=True)
class Message:
    """Base of all messages: `kind` is its number on the wire."""

    kind: ClassVar[int] = 0
    ordered: ClassVar[bool] = False


# --- enrolment, on the enrol socket ------------------------------------------------------------


@dataclass(frozen=True)
class Enrol(Message):
    """E: bind the key of this connection to the allow-list."""

    kind: ClassVar[int] = 1
    token: Annotated[bytes, Limit(64)]
    name: Name


@dataclass(frozen=True)
class Enrolled(Message):
    """H: the key is on the allow-list now, under this name."""

    kind: ClassVar[int] = 2
    name: Name


# --- keys, on a connection that the present key has proved ---------------------------------------


@dataclass(frozen=True)
class ReplaceKey(Message):
    """E: from now on this edge has the public key `key` (Z85). The key of this connection goes off the list."""

    kind: ClassVar[int] = 25
    key: Key


@dataclass(frozen=True)
class KeyReplaced(Message):
    """H: the new key is on the allow-list under this name, the old one is not."""

    kind: ClassVar[int] = 26
    name: Name


@dataclass(frozen=True)
class NextHubKey(Message):
    """H: from its next start on the hub has the public key `key` (Z85). Sent unasked, ahead of other answers."""

    kind: ClassVar[int] = 27
    key: Key


# --- without a session ----------------------------------------------------------------------


@dataclass(frozen=True)
class Describe(Message):
    """E: what do you serve? Carries the range of protocol versions that the edge speaks."""

    kind: ClassVar[int] = 3
    min_version: Count
    max_version: Count
    software: Name


@dataclass(frozen=True)
class Description(Message):
    """H: the model, the state of training and the adapter that is published."""

    kind: ClassVar[int] = 4
    software: Name
    model_name: Text
    model_hash: Hash
    dtype: Name
    num_layers: Count
    adapter_version: Count
    round: Count
    rounds: Count


@dataclass(frozen=True)
class Fetch(Message):
    """E: bytes of something that the hub serves: `manifest`, `file/NAME`, `tensor/NAME`, `adapter/VERSION`, or
    `adapter/VERSION/P:Q`, the part for an edge of that partition. `element` not 0: they are numbers of so many
    bytes, and may come packed (`blocks.planes`)."""

    kind: ClassVar[int] = 5
    resource: Annotated[str, Limit(512)]
    offset: Count
    length: Annotated[int, Limit(8 << 20)]
    element: Annotated[int, Limit(8)]


@dataclass(frozen=True)
class Chunk(Message):
    """H: `data` (u8) stands at `offset` of a resource of `total` bytes and this hash. `element` not 0: it is packed."""

    kind: ClassVar[int] = 6
    offset: Count
    total: Count
    sha256: Hash
    element: Annotated[int, Limit(8)]
    data: Tensor


@dataclass(frozen=True)
class Ping(Message):
    """E: alive; what the hub's screen shows of this edge. `loss` only if the user shares it."""

    kind: ClassVar[int] = 7
    state: Name
    step: Count
    tokens_per_s: float
    round_trip_ms: float
    noise_sigma: float
    noise_r: float
    loss: float | None


@dataclass(frozen=True)
class Pong(Message):
    """H: alive; what the edge's screen shows of the hub. `sessions`: all that are open, whether they train or generate:
    how often to ping follows from that. `joined`: those of the cohort. `busy_s`: for how many seconds the computation
    under way has gone on, if that is unusually long; else 0. (The thread that answers is not the one that computes.)"""

    kind: ClassVar[int] = 8
    sessions: Count
    joined: Count
    cohort: Count
    round: Count
    step: Count
    adapter_version: Count
    queue: Count
    stopping: Flag
    busy_s: Count


# --- sessions -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hello(Message):
    """E: open a session, or resume one. `train` 1 joins the cohort, 0 only generates.

    `model_hash` may be empty (take the hub's); `lora_rank` 0 takes the hub's; `version` is that of the adapter
    that the edge generates with already, -1 for the newest there is.
    """

    kind: ClassVar[int] = 9
    min_version: Count
    max_version: Count
    software: Name
    name: Name
    train: Flag
    model_hash: Hash
    p: Count
    q: Count
    lora_rank: Count
    resume: Count
    version: Signed


@dataclass(frozen=True)
class Welcome(Message):
    """H: the session is open. `next` is the ordered request id expected next; `durable` the number of this
    edge's steps inside the hub's last checkpoint; `applied` the number applied in all."""

    kind: ClassVar[int] = 10
    software: Name
    next: Count
    durable: Count
    applied: Count
    model_hash: Hash
    adapter_version: Count
    dtype: Name
    credit_bytes: Count
    round: Count
    recipe: Recipe


@dataclass(frozen=True)
class Leave(Message):
    """E: leave the cohort. `done` 1 when all steps are taken, 0 when the user stops."""

    kind: ClassVar[int] = 11
    ordered: ClassVar[bool] = True
    done: Flag
    reason: Text


@dataclass(frozen=True)
class Bye(Message):
    """H: the edge is out of the cohort; nothing of it is pending."""

    kind: ClassVar[int] = 12


# --- training -------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepForward(Message):
    """E: smashed [batch, seq, hidden] of micro-batch `micro` of `micros` of step `step`, with `tokens` target tokens
    behind it. The step counts when all of its micro-batches went forward and backward."""

    kind: ClassVar[int] = 13
    ordered: ClassVar[bool] = True
    step: Count
    tokens: Count
    layout: Layout
    smashed: Tensor
    micro: Micro = 0
    micros: Micros = 1


@dataclass(frozen=True)
class StepHidden(Message):
    """H: hidden [batch, seq, hidden] of that micro-batch."""

    kind: ClassVar[int] = 14
    step: Count
    hidden: Tensor
    micro: Micro = 0


@dataclass(frozen=True)
class StepBackward(Message):
    """E: gradient of the *summed* token loss with respect to hidden, [batch, seq, hidden]."""

    kind: ClassVar[int] = 15
    ordered: ClassVar[bool] = True
    step: Count
    grad_hidden: Tensor
    micro: Micro = 0


@dataclass(frozen=True)
class StepGrad(Message):
    """H: gradient with respect to smashed. That of the last micro-batch comes when the step is applied, and what it
    tells besides holds from then on: `round_closes` 1: upload the adapter now; `hub_step` counts the optimizer
    steps of B. `checkpoint`: a hub that dies goes back to so many steps of this edge, or to what it said before, so
    the edge keeps what it had then."""

    kind: ClassVar[int] = 16
    step: Count
    hub_step: Count
    round_closes: Flag
    checkpoint: Count
    grad_smashed: Tensor
    micro: Micro = 0


@dataclass(frozen=True)
class Upload(Message):
    """E: a piece of this edge's adapter file (safetensors bytes) for round `round`. Without data it asks how much of
    the file with this hash the hub holds, perhaps from an earlier session."""

    kind: ClassVar[int] = 17
    round: Count
    tokens: Count
    offset: Count
    total: Count
    sha256: Hash
    data: Tensor


@dataclass(frozen=True)
class UploadAck(Message):
    """H: the first `received` bytes of the adapter file are here; the next piece begins there."""

    kind: ClassVar[int] = 18
    received: Count


@dataclass(frozen=True)
class AwaitRound(Message):
    """E: answer when the round is published (its adapter is uploaded, or this edge has none to give)."""

    kind: ClassVar[int] = 19
    ordered: ClassVar[bool] = True
    round: Count


@dataclass(frozen=True)
class Published(Message):
    """H: the global adapter `version` is published (fetch `adapter/VERSION`); `over` 1: no more rounds."""

    kind: ClassVar[int] = 20
    version: Count
    round: Count
    over: Flag


# --- generation and evaluation --------------------------------------------------------------


@dataclass(frozen=True)
class Infer(Message):
    """E: smashed [rows, new, hidden] of `stream`, built on `past` cached positions.

    `stream` 0 keeps no cache. `version` is the adapter that the edge's own blocks use. `order` names, for
    each row, the cached row that it continues (beam search); empty for as it was.
    """

    kind: ClassVar[int] = 21
    stream: Count
    past: Count
    version: Count
    layout: Layout
    order: Annotated[tuple[int, ...], Limit(1024)]
    smashed: Tensor


@dataclass(frozen=True)
class InferHidden(Message):
    """H: hidden [rows, new, hidden]."""

    kind: ClassVar[int] = 22
    hidden: Tensor


@dataclass(frozen=True)
class CloseStream(Message):
    """E: drop the cache of `stream`. Not answered."""

    kind: ClassVar[int] = 23
    stream: Count


@dataclass(frozen=True)
class Error(Message):
    """H: the request was refused; `code` is an `ErrorCode`, `detail` depends on it."""

    kind: ClassVar[int] = 24
    code: Annotated[int, Limit(255)]
    detail: Count
    text: Text


AnyMessage = (
    Enrol
    | Enrolled
    | Describe
    | Description
    | Fetch
    | Chunk
    | Ping
    | Pong
    | Hello
    | Welcome
    | Leave
    | Bye
    | StepForward
    | StepHidden
    | StepBackward
    | StepGrad
    | Upload
    | UploadAck
    | AwaitRound
    | Published
    | Infer
    | InferHidden
    | CloseStream
    | Error
    | ReplaceKey
    | KeyReplaced
    | NextHubKey
)


#: Kinds that each socket accepts.
TO_HUB = frozenset(
    message.kind
    for message in (
        *(Describe, Fetch, Ping, Hello, Leave),
        *(StepForward, StepBackward, Upload, AwaitRound, Infer, CloseStream),
        ReplaceKey,
    )
)
TO_EDGE = frozenset(
    message.kind
    for message in (
        *(Description, Chunk, Pong, Welcome, Bye),
        *(StepHidden, StepGrad, UploadAck, Published, InferHidden, Error),
        *(KeyReplaced, NextHubKey),
    )
)
ENROL_TO_HUB = frozenset({Enrol.kind})
ENROL_TO_EDGE = frozenset({Enrolled.kind, Error.kind})


@dataclass(frozen=True)
class Packet:
    """A message with its envelope: the unit that transports carry."""

    message: AnyMessage
    envelope: Envelope = field(default_factory=Envelope)
