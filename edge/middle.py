"""Blocks B as the edge sees them: requests to the hub, and a record of what was sent.

The record is what makes generation survive: when the hub no longer holds a stream (evicted, restarted), the
same bytes are sent again, never a fresh draw of noise over the same text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch

import messaging.messages as m
from blocks.codec import Rows, from_wire, to_rows, to_wire
from blocks.layout import Layout
from edge.client import HubClient
from messaging.errors import ErrorCode, HubError, LinkLost

_COMEBACK_S = 30.0
_GROW = 128


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


@dataclass(frozen=True)
class Part:
    """Micro-batch `micro` of `micros` of step `step`, with so many target tokens."""

    step: int
    micro: int
    micros: int
    tokens: int


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
        #: called before a training step is asked of the hub
        self.before_step: Callable[[], None] = lambda: None
        #: how long inference waits for a hub that was lost or is stopping, in seconds; inf for ever
        self.comeback_s = _COMEBACK_S
        #: inference requests that went to the hub and back
        self.round_trips = 0

    # -- training ------------------------------------------------------------------------------------

    def send_smashed(self, part: Part, smashed: torch.Tensor, layout: Layout) -> Future[m.AnyMessage]:
        """Ask for the forward of a micro-batch; `hidden` takes the answer. Before that the last step is on the disk."""
        self.before_step()
        states = to_wire(smashed.detach(), self._wire)
        return self._client.submit(
            m.StepForward(part.step, part.tokens, layout.to_ints(), states, part.micro, part.micros)
        )

    def send_gradient(self, part: Part, gradient: torch.Tensor) -> Future[m.AnyMessage]:
        """Ask for the backward of a micro-batch, with the gradient of the summed loss by hidden."""
        return self._client.submit(m.StepBackward(part.step, to_wire(gradient, self._wire), part.micro))

    def may_be_under_way(self, smashed: torch.Tensor) -> int:
        """How many micro-batches like this one may be at the hub at a time, with room for a gradient; 1 at least."""
        size = smashed.numel() * smashed.element_size() + m.MAX_HEADER_BYTES
        return max(self._client.credits // size - 1, 1)

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
                return received(self._ask(sent, layout, stream, order), smashed)
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


def received(tensor: m.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What came over the wire as a tensor of `like`'s shape, dtype and device. ProtocolError if it is not that."""
    return from_wire(tensor, dtype=like.dtype, shape=tuple(like.shape), device=like.device)
