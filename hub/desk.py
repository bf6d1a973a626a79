"""The hub's clerk: checks what edges ask for and words the answers. No sockets, no threads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

import messaging.messages as m
from blocks.layout import Layout
from blocks.partition import Partition
from hub.credits import Credits
from hub.jobs import EdgeAdapter, InferItem, Place, StepItem
from hub.post import refusal
from hub.receptions import Receptions
from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.sessions import Session
from hub.worker import parse_upload
from messaging.errors import ErrorCode, HubError, InputError, ProtocolError
from messaging.replies import Replies

_MOST_ROWS = 1024
#: bytes of one number in the dtype that the hub computes in
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Served:
    """The model that a hub serves: name, hash, dtype as torch names it, layers, hidden size, longest sequence."""

    name: str
    hash: str
    dtype: str
    num_layers: int
    hidden_size: int
    max_positions: int


class Desk:
    """Knows the served model and the recipe.

    `applied` are the steps by edge key inside the last checkpoint, `round_tokens` the tokens of its open round, `home`
    the groups that took them.
    """

    def __init__(
        self,
        served: Served,
        recipe: m.Recipe,
        epoch: int,
        credits: Credits,
        applied: Mapping[str, int],
        round_tokens: Mapping[str, int],
        adapter: Mapping[str, torch.Tensor],
        software: str,
        home: Mapping[str, int] | None = None,
    ) -> None:
        self.served = served
        self.recipe = recipe
        self.epoch = epoch
        self.credits = credits
        self.applied = applied
        self.round_tokens = round_tokens
        self.home = dict(home or {})
        self.software = software
        self._adapter = adapter
        self._receptions = Receptions(2 * sum(t.numel() * 4 + 1024 for t in adapter.values()) + 65536)

    # -- opening -------------------------------------------------------------------------------------

    def check_hello(self, hello: m.Hello) -> Place:
        """Where this edge's rows enter and leave. Raises HubError with the reason and what to do."""
        if not hello.min_version <= m.PROTOCOL_VERSION <= hello.max_version:
            error = self.version_error(hello.min_version, hello.max_version, hello.software)
            raise HubError(ErrorCode.VERSION, error.text)
        if hello.model_hash and hello.model_hash != self.served.hash:
            raise HubError(
                ErrorCode.MODEL,
                f"the hub serves another model ({self.served.name}): leave --model out to take the hub's",
            )
        if hello.lora_rank not in (0, self.recipe.lora_rank):
            raise HubError(
                ErrorCode.RANK,
                f"the hub trains adapters of rank {self.recipe.lora_rank}, not {hello.lora_rank}: "
                "the hub owns the rank",
            )
        try:
            Partition(hello.p, hello.q).check(self.served.num_layers)
        except InputError as error:
            raise HubError(ErrorCode.PARTITION, str(error)) from error
        return self.place(hello.p, hello.q)

    def place(self, p: int, q: int) -> Place:
        """Where the rows of an edge with this partition enter and leave."""
        return Place(p, Partition(p, q).leave(self.served.num_layers))

    def version_error(self, low: int, high: int, software: str) -> m.Error:
        """Both versions, and what to do."""
        return m.Error(
            ErrorCode.VERSION,
            m.PROTOCOL_VERSION,
            f"the hub is {self.software} and speaks protocol {m.PROTOCOL_VERSION}, the edge is {software} and speaks "
            f"{low} to {high}: install the same version on both sides",
        )

    def new_replies(self) -> Replies:
        """The record of a fresh session."""
        return Replies()

    def welcome(self, session: Session, version: int, round_: int, durable: int) -> m.Welcome:
        """What a session is told at its start."""
        return m.Welcome(
            software=self.software,
            next=session.replies.next,
            durable=durable,
            applied=session.applied,
            model_hash=self.served.hash,
            adapter_version=version if session.version is None else session.version,
            dtype=self.served.dtype,
            credit_bytes=self.credits.tell(session.account),
            round=round_,
            recipe=self.recipe,
        )

    def description(self, version: int, round_: int) -> m.Description:
        """What an edge may know before it opens a session."""
        served = self.served
        return m.Description(
            software=self.software,
            model_name=served.name[-2048:],
            model_hash=served.hash,
            dtype=served.dtype,
            num_layers=served.num_layers,
            adapter_version=version,
            round=round_,
            rounds=self.recipe.rounds,
        )

    @property
    def largest_request(self) -> int:
        """Bytes that no request can have more of: the states of the most rows of the longest sequence."""
        states = _MOST_ROWS * self.served.max_positions * self.served.hidden_size * 4
        return m.MAX_HEADER_BYTES + min(m.MAX_TENSOR_BYTES, states)

    # -- requests ------------------------------------------------------------------------------------

    def event_of(self, session: Session, request: int, message: m.AnyMessage) -> ev.Event | None:
        """What a request means to the scheduler; None for those that the server carries out itself."""
        match message:
            case m.StepForward():
                return self._smashed(session, request, message)
            case m.StepBackward():
                micro = message.micro
                return ev.GradientReceived(session.seat, request, message.step, message.grad_hidden, micro)
            case m.Infer():
                return self._infer(session, request, message)
            case m.AwaitRound():
                return ev.RoundAwaited(session.seat, request, message.round)
            case m.Upload() | m.Leave():
                return None
            case _:
                raise ProtocolError(f"{type(message).__name__} is no request")

    def _smashed(self, session: Session, request: int, message: m.StepForward) -> ev.Event:
        if not session.train:
            raise HubError(ErrorCode.NO_SESSION, "this session does not train")
        if message.step not in (session.applied, session.applied - 1):
            raise HubError(
                ErrorCode.BEHIND, f"step {message.step} was asked for, but the hub is at {session.applied} of this edge"
            )
        micro, micros = message.micro, message.micros
        if micro >= micros:
            raise ProtocolError(f"there is no micro-batch {micro} in a step of {micros}: they are counted from 0")
        layout = self._layout(message.smashed, message.layout, 0)
        if message.tokens > layout.rows * layout.width:
            raise ProtocolError("more target tokens than positions")
        item = StepItem(session.seat, session.place, layout, message.tokens, message.smashed, micro, micros)
        again = (message.step, micro) < session.forwarded
        session.forwarded = max(session.forwarded, (message.step, micro + 1))
        digest = item.digest() if again else b""
        return ev.SmashedReceived(session.seat, request, message.step, item, digest, micro, micros)

    def _infer(self, session: Session, request: int, message: m.Infer) -> ev.Event:
        layout = self._layout(message.smashed, message.layout, message.past)
        if message.order and len(message.order) != layout.rows:
            raise ProtocolError("the row order names another number of rows than the tensor has")
        item = InferItem(
            session.seat,
            request,
            message.stream,
            session.place,
            message.version,
            layout,
            message.order,
            message.smashed,
            session.key,
        )
        # What keeps no cache is computed as a whole.
        return ev.InferReceived(session.seat, request, item, layout.rows, layout.width if message.stream else 1)

    def _layout(self, tensor: m.Tensor, ints: tuple[int, ...], past: int) -> Layout:
        if len(tensor.shape) != 3 or tensor.shape[2] != self.served.hidden_size:
            raise ProtocolError(f"states must be [rows, positions, {self.served.hidden_size}], not {tensor.shape}")
        rows, width, _ = tensor.shape
        if not (1 <= rows <= _MOST_ROWS and width >= 1):
            raise ProtocolError(f"a batch of {rows} x {width} cannot be served")
        if rows * width * self.served.hidden_size * _BYTES[self.served.dtype] > self.credits.budget:
            # Credits count bytes on the wire, which may be a quarter of what is made of them.
            text = f"{rows} x {width} positions are more than the hub has memory for: take a smaller batch"
            raise HubError(ErrorCode.CREDITS, text, self.credits.budget)
        if past + width > self.served.max_positions:
            raise ProtocolError(f"{past + width} positions are more than the model's {self.served.max_positions}")
        return Layout.from_ints(ints, rows, past, width, self.served.max_positions)

    # -- answers -------------------------------------------------------------------------------------

    def hidden(self, action: act.AnswerForward) -> m.AnyMessage:
        """The reply to a StepForward."""
        answer = action.answer
        return m.StepHidden(action.step, answer, action.micro) if isinstance(answer, m.Tensor) else refusal(answer)

    def grad(self, action: act.AnswerBackward, checkpoint: int) -> m.AnyMessage:
        """The reply to a StepBackward; `checkpoint`: the steps of this edge in the newest checkpoint begun."""
        answer = action.answer
        if not isinstance(answer, m.Tensor):
            return refusal(answer)
        return m.StepGrad(action.step, action.hub_step, int(action.round_closes), checkpoint, answer, action.micro)

    def infer_hidden(self, action: act.AnswerInfer) -> m.AnyMessage:
        """The reply to an Infer."""
        answer = action.answer
        return m.InferHidden(answer) if isinstance(answer, m.Tensor) else refusal(answer)

    # -- uploads -------------------------------------------------------------------------------------

    def receive(self, session: Session, message: m.Upload) -> tuple[int, EdgeAdapter | None]:
        """Add a piece of an adapter file: bytes held so far, and the checked adapter when it is whole."""
        if not session.train:
            raise HubError(ErrorCode.NO_SESSION, "this session does not train")
        received, data = self._receptions.take(session.key, message)
        if data is None:
            return received, None
        tensors = parse_upload(data, self._adapter)
        return received, EdgeAdapter(session.seat, session.place, message.tokens, tensors)

    def round_over(self, round_: int) -> None:
        """Forget the adapter files of closed rounds; `round_` is open. For the thread that calls `receive`."""
        self._receptions.round_over(round_)
