"""One training step in micro-batches: Blocks A, the link, the hub and Blocks C at work at the same time.

One thread does the edge's part, whatever is ready next. A's and C's gradients are each added up in the order of the
micro-batches, so how fast the answers come changes no bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypeVar

import torch

import messaging.messages as m
from blocks.halves import FirstHalf, Halves
from blocks.surgery import CutModel
from edge.data import Batch
from edge.loss import summed_loss
from edge.middle import HubMiddle, Part, received
from edge.noise import GaussianNoise
from messaging.errors import NotFinite, ProtocolError

M = TypeVar("M", bound=m.Message)


@dataclass
class Times:
    """Seconds of a step in Blocks A forward, in Blocks C, in A backward, and waiting for the hub."""

    blocks_a: float = 0.0
    blocks_c: float = 0.0
    backward_a: float = 0.0
    waiting: float = 0.0


@dataclass(frozen=True)
class Taken:
    """A step that the hub has applied: the loss summed over target tokens, and the hub's last reply."""

    loss: float
    reply: m.StepGrad
    times: Times


def split(batch: Batch, micros: int) -> list[Batch]:
    """The batch's rows in at most so many micro-batches, as equal as can be, in order."""
    rows = batch.input_ids.shape[0]
    count = min(micros, rows)
    edges = [rows * at // count for at in range(count + 1)]
    return [_rows(batch, first, last) for first, last in pairwise(edges)]


def _rows(batch: Batch, first: int, last: int) -> Batch:
    labels = batch.labels[first:last]
    return Batch(
        batch.input_ids[first:last],
        labels,
        None if batch.attention_mask is None else batch.attention_mask[first:last],
        None if batch.position_ids is None else batch.position_ids[first:last],
        int((labels[:, 1:] != -100).sum()),
    )


class Pipeline:
    """Takes steps through the hub. `window`: micro-batches whose graphs of Blocks A are held at a time, at most."""

    def __init__(self, cut: CutModel, middle: HubMiddle, noise: GaussianNoise, window: int) -> None:
        self._cut = cut
        self._halves = Halves(cut)
        self._middle = middle
        self._noise = noise
        self._window = window

    def step(self, number: int, batches: Sequence[Batch], before_last: Callable[[], object]) -> Taken:
        """Forward and backward of step `number`, one micro-batch for each of `batches`.

        `before_last` is called before the last gradient leaves: from there on the hub may take the step. Raises what
        ends a request, and NotFinite at a loss that is not; what the backward left until then is the caller's.
        """
        run = _Run(self, number, batches, before_last)
        while run.done < len(batches):
            run.go_on()
        assert run.reply is not None
        return Taken(run.loss, run.reply, run.times)


class _Run:
    """A step under way: `begun` forwards of A, `answered` micro-batches through C, `done` backwards of A."""

    def __init__(
        self, pipeline: Pipeline, number: int, batches: Sequence[Batch], before_last: Callable[[], object]
    ) -> None:
        self._pipe = pipeline
        self._batches = batches
        self._parts = [Part(number, at, len(batches), batch.tokens) for at, batch in enumerate(batches)]
        self._before_last = before_last
        self._window = pipeline._window
        self._halves: dict[int, FirstHalf] = {}
        self._hiddens: dict[int, Future[m.AnyMessage]] = {}
        self._grads: dict[int, Future[m.AnyMessage]] = {}
        self.begun = self.answered = self.done = 0
        self.loss = 0.0
        self.reply: m.StepGrad | None = None
        self.times = Times()

    def go_on(self) -> None:
        """Whatever is ready, in the order that keeps the hub busy; else wait."""
        hidden, grad = self._hiddens.get(self.answered), self._grads.get(self.done)
        started = time.perf_counter()
        if self.begun < len(self._batches) and self.begun - self.done < self._window:
            self._forward()
            self.times.blocks_a += time.perf_counter() - started
        elif hidden is not None and hidden.done():
            self._loss()
            self.times.blocks_c += time.perf_counter() - started
        elif grad is not None and grad.done():
            self._backward()
            self.times.backward_a += time.perf_counter() - started
        else:
            # Waking now and then lets Ctrl-C through on every platform.
            wait([future for future in (hidden, grad) if future is not None], 1.0, FIRST_COMPLETED)
            self.times.waiting += time.perf_counter() - started

    def _call(self, at: int) -> Callable[[], torch.Tensor]:
        return partial(summed_loss, self._pipe._cut, self._batches[at])

    def _forward(self) -> None:
        at, pipe = self.begun, self._pipe
        # The noise is a function of the step and the micro-batch: one that is repeated sends the same bytes.
        pipe._noise.begin(f"step {self._parts[at].step} part {at}", self._batches[at].input_ids)
        half = self._halves[at] = pipe._halves.first(self._call(at))
        self._hiddens[at] = pipe._middle.send_smashed(self._parts[at], half.smashed, half.layout)
        self._window = min(self._window, pipe._middle.may_be_under_way(half.smashed))
        self.begun += 1

    def _loss(self) -> None:
        at, pipe = self.answered, self._pipe
        reply = _answer(self._hiddens.pop(at), m.StepHidden)
        hidden = received(reply.hidden, self._halves[at].smashed).requires_grad_()
        loss = pipe._halves.second(hidden, self._call(at))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NotFinite(f"its loss is {value}")
        loss.backward()
        assert hidden.grad is not None
        self.loss += value
        if at == len(self._batches) - 1:
            self._before_last()
        self._grads[at] = pipe._middle.send_gradient(self._parts[at], hidden.grad.contiguous())
        self.answered += 1

    def _backward(self) -> None:
        self.reply = _answer(self._grads.pop(self.done), m.StepGrad)
        half = self._halves.pop(self.done)
        half.backward(received(self.reply.grad_smashed, half.smashed))
        self.done += 1


def _answer(future: Future[m.AnyMessage], kind: type[M]) -> M:
    reply = future.result()
    if not isinstance(reply, kind):
        raise ProtocolError(f"the hub answered with {type(reply).__name__}")
    return reply
