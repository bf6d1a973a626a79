"""Blocks B as the edge sees them: requests to the hub, and a record of what was sent.

The record is what makes generation survive: when the hub no longer holds a stream (evicted, restarted), the
same bytes are sent again, never a fresh draw of noise over the same text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import messaging.messages as m
from blocks.codec import Rows, from_wire, to_rows, to_wire
from blocks.layout import Layout
from edge.client import HubClient
from messaging.errors import ErrorCode, HubError, LinkLost

_COMEBACK_S = 30.0
_GROW = 128


@dataclass
class StepTimes:
    """When a training step went out and came back, in seconds of the process clock."""

    smashed_sent: float = 0.0
    hidden_here: float = 0.0
    grad_sent: float = 0.0
    grad_here: float = 0.0


class _Record:
    """The bytes of smashed states that a stream has sent, [rows, length, bytes of a position]."""

    def __init__(self) -> None:
        self._states: torch.Tensor | None = None

    def add(self, sent: torch.Tensor, layout: Layout, order: tuple[int, ...]) -> None:
        """Note `sent` as the positions from layout.past on, after putting the rows in `order`."""
        rows, width, size = sent.shape
        need = layout.past + width
        states = self._states
        if states is not None and order:
            states = states[list(order)]
        if states is None or states.shape[0] != rows or layout.past == 0:
            states = sent.new_empty(rows, need + _GROW, size)
        elif states.shape[1] < need:
            grown = sent.new_empty(rows, need + need // 2 + _GROW, size)
            grown[:, : layout.past] = states[:, : layout.past]
            states = grown
        states[:, layout.past : need] = sent
        self._states = states

    def since(self, have: int, past: int) -> torch.Tensor:
        """Positions have .. past."""
        assert self._states is not None
        return self._states[:, have:past]


class HubMiddle:
    """`blocks.remote.Middle` over a HubClient.

    version: the adapter that the edge's own blocks hold; wire: the dtype of DTYPES in which states and gradients cross
    both ways (the hub answers as it is asked), by default that of the tensors.
    """

    def __init__(self, client: HubClient, version: int, wire: str | None = None) -> None:
        self._client = client
        self._wire = wire
        self.version = version
        self._records: dict[int, _Record] = {}
        self._next_stream = 1
        #: the training step under way, and its target tokens; set by the trainer
        self.step, self.tokens = 0, 0
        self.times = StepTimes()
        #: called before a training step is asked of the hub
        self.before_step: Callable[[], None] = lambda: None
        #: the hub's reply to the latest step
        self.step_grad: m.StepGrad | None = None
        #: how long inference waits for a hub that was lost or is stopping, in seconds; inf for ever
        self.comeback_s = _COMEBACK_S
        #: inference requests that went to the hub and back
        self.round_trips = 0

    # -- training ------------------------------------------------------------------------------------

    def step_forward(self, smashed: torch.Tensor, layout: Layout) -> torch.Tensor:
        """See Middle."""
        self.before_step()
        self.times = StepTimes(smashed_sent=time.perf_counter())
        message = m.StepForward(self.step, self.tokens, layout.to_ints(), to_wire(smashed, self._wire))
        reply = self._client.ask(message, m.StepHidden)
        hidden = _received(reply.hidden, smashed)
        self.times.hidden_here = time.perf_counter()
        return hidden

    def step_backward(self, grad_hidden: torch.Tensor) -> torch.Tensor:
        """See Middle."""
        self.times.grad_sent = time.perf_counter()
        reply = self._client.ask(m.StepBackward(self.step, to_wire(grad_hidden, self._wire)), m.StepGrad)
        grad = _received(reply.grad_smashed, grad_hidden)
        self.step_grad = reply
        self.times.grad_here = time.perf_counter()
        return grad

    # -- generation and evaluation -------------------------------------------------------------------

    def open_stream(self) -> int:
        """See Middle."""
        stream, self._next_stream = self._next_stream, self._next_stream + 1
        self._records[stream] = _Record()
        return stream

    def close_stream(self, stream: int) -> None:
        """See Middle."""
        self._records.pop(stream, None)
        self._client.tell(m.CloseStream(stream))

    def infer(self, smashed: torch.Tensor, layout: Layout, stream: int, order: tuple[int, ...]) -> torch.Tensor:
        """See Middle. Survives a hub that lost the stream, or was restarted, as long as it serves this version."""
        sent = to_rows(smashed, self._wire)
        if stream:
            self._records[stream].add(sent.data, layout, order)
        deadline, have = math.inf, layout.past
        while True:
            try:
                if have < layout.past:
                    self._replay(sent, layout, stream, have)
                    have, order = layout.past, ()
                return _received(self._ask(sent, layout, stream, order), smashed)
            except HubError as error:
                if error.code is ErrorCode.CACHE_MISS:
                    have = 0 if order else error.detail
                    continue
                deadline = min(deadline, time.monotonic() + self.comeback_s)
                if error.code is not ErrorCode.SHUTDOWN or time.monotonic() > deadline:
                    raise
                time.sleep(0.25)
            except LinkLost:
                deadline = min(deadline, time.monotonic() + self.comeback_s)
                if time.monotonic() > deadline:
                    raise
            self._client.wait_for_session(max(deadline - time.monotonic(), 0.0))

    def _replay(self, sent: Rows, layout: Layout, stream: int, have: int) -> None:
        """Send positions have .. past again, the same bytes; the answer was seen before."""
        before = self._records[stream].since(have, layout.past)
        self._ask(replace(sent, data=before), layout.replay(have), stream, ())

    def _ask(self, sent: Rows, layout: Layout, stream: int, order: tuple[int, ...]) -> m.Tensor:
        self.round_trips += 1
        message = m.Infer(stream, layout.past, self.version, layout.to_ints(), order, sent.to_wire())
        return self._client.ask(message, m.InferHidden).hidden


def _received(tensor: m.Tensor, like: torch.Tensor) -> torch.Tensor:
    return from_wire(tensor, dtype=like.dtype, shape=tuple(like.shape)).to(like.device)
