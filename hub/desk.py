"""The hub's clerk: checks what edges ask for and words the answers. No sockets, no threads."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

import messaging.messages as m
from blocks.layout import Layout
from blocks.partition import Partition
from hub.jobs import EdgeAdapter, InferItem, Place, StepItem
from hub.post import refusal
from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.sessions import Reception, Session
from hub.worker import parse_upload
from messaging.errors import ErrorCode, HubError, InputError, ProtocolError
from messaging.replies import Replies

_MOST_ROWS = 1024


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

    `applied` are the steps by edge key inside the last checkpoint, `round_tokens` the tokens of its open round.
    """

    def __init__(
        self,
        served: Served,
        recipe: m.Recipe,
        epoch: int,
        credit_bytes: int,
        applied: Mapping[str, int],
        round_tokens: Mapping[str, int],
        adapter: Mapping[str, torch.Tensor],
        software: str,
    ) -> None:
        self.served = served
        self.recipe = recipe
        self.epoch = epoch
        self.credit_bytes = credit_bytes
        self.applied = applied
        self.round_tokens = round_tokens
        self.software = software
        self._adapter = adapter
        self._most_upload = 2 * sum(t.numel() * 4 + 1024 for t in adapter.values()) + 65536

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
        partition = Partition(hello.p, hello.q)
        try:
            partition.check(self.served.num_layers)
        except InputError as error:
            raise HubError(ErrorCode.PARTITION, str(error)) from error
        return Place(hello.p, partition.leave(self.served.num_layers))

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

    def welcome(self, session: Session, version: int, round_: int) -> m.Welcome:
        """What a session is told at its start."""
        return m.Welcome(
            software=self.software,
            next=session.replies.next,
            durable=self.applied.get(session.key, 0),
            applied=session.applied,
            model_hash=self.served.hash,
            adapter_version=version if session.version is None else session.version,
            dtype=self.served.dtype,
            credit_bytes=self.credit_bytes,
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

    # -- requests ------------------------------------------------------------------------------------

    def event_of(self, session: Session, request: int, message: m.AnyMessage) -> ev.Event | None:
        """What a request means to the scheduler; None for those that the server carries out itself."""
        match message:
            case m.StepForward():
                return self._smashed(session, request, message)
            case m.StepBackward():
                return ev.GradientReceived(session.number, request, message.step, message.grad_hidden)
            case m.Infer():
                return self._infer(session, request, message)
            case m.AwaitRound():
                return ev.RoundAwaited(session.number, request, message.round)
            case m.Upload() | m.Leave():
                return None
            case _:
                raise ProtocolError(f"{type(message).__name__} is no request")

    def _smashed(self, session: Session, request: int, message: m.StepForward) -> ev.Event:
        if not session.train:
            raise HubError(ErrorCode.NO_SESSION, "this session does not train")
        if message.step != session.applied:
            raise HubError(
                ErrorCode.BEHIND, f"step {message.step} was asked for, but the hub is at {session.applied} of this edge"
            )
        layout = self._layout(message.smashed, message.layout, 0)
        if message.tokens > layout.rows * layout.width:
            raise ProtocolError("more target tokens than positions")
        item = StepItem(session.number, session.place, layout, message.tokens, message.smashed)
        return ev.SmashedReceived(session.number, request, message.step, item)

    def _infer(self, session: Session, request: int, message: m.Infer) -> ev.Event:
        layout = self._layout(message.smashed, message.layout, message.past)
        if message.order and len(message.order) != layout.rows:
            raise ProtocolError("the row order names another number of rows than the tensor has")
        item = InferItem(
            session.number,
            request,
            message.stream,
            session.place,
            message.version,
            layout,
            message.order,
            message.smashed,
        )
        return ev.InferReceived(session.number, request, item)

    def _layout(self, tensor: m.Tensor, ints: tuple[int, ...], past: int) -> Layout:
        if len(tensor.shape) != 3 or tensor.shape[2] != self.served.hidden_size:
            raise ProtocolError(f"states must be [rows, positions, {self.served.hidden_size}], not {tensor.shape}")
        rows, width, _ = tensor.shape
        if not (1 <= rows <= _MOST_ROWS and width >= 1):
            raise ProtocolError(f"a batch of {rows} x {width} cannot be served")
        if past + width > self.served.max_positions:
            raise ProtocolError(f"{past + width} positions are more than the model's {self.served.max_positions}")
        return Layout.from_ints(ints, rows, past, width)

    # -- answers -------------------------------------------------------------------------------------

    def hidden(self, action: act.AnswerForward) -> m.AnyMessage:
        """The reply to a StepForward."""
        answer = action.answer
        return m.StepHidden(action.step, answer) if isinstance(answer, m.Tensor) else refusal(answer)

    def grad(self, action: act.AnswerBackward) -> m.AnyMessage:
        """The reply to a StepBackward."""
        answer = action.answer
        if not isinstance(answer, m.Tensor):
            return refusal(answer)
        return m.StepGrad(action.step, action.hub_step, int(action.round_closes), answer)

    def infer_hidden(self, action: act.AnswerInfer) -> m.AnyMessage:
        """The reply to an Infer."""
        answer = action.answer
        return m.InferHidden(answer) if isinstance(answer, m.Tensor) else refusal(answer)

    # -- uploads -------------------------------------------------------------------------------------

    def receive(self, session: Session, message: m.Upload) -> tuple[int, EdgeAdapter | None]:
        """Add a piece of an adapter file: bytes held so far, and the checked adapter when it is whole."""
        if message.total > self._most_upload:
            raise ProtocolError(f"an adapter of {message.total} bytes is larger than this model's can be")
        reception = session.reception
        if reception is None or (reception.round, reception.sha256) != (message.round, message.sha256):
            reception = session.reception = Reception(message.round, message.total, message.sha256)
        if message.offset == len(reception.data):
            for chunk in message.data.chunks:
                reception.data += chunk
        if len(reception.data) < reception.total:
            return len(reception.data), None
        session.reception = None
        data = bytes(reception.data)
        if hashlib.sha256(data).hexdigest() != message.sha256:
            raise ProtocolError("the uploaded adapter is damaged: upload it again")
        tensors = parse_upload(data, self._adapter)
        return len(data), EdgeAdapter(session.number, session.place, message.tokens, tensors)
