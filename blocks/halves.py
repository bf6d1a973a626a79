"""A training forward of the edge's model in two halves: Blocks A now, Blocks C when the hub's answer is here.

transformers runs a model from end to end. So it is called twice. The first call ends at the stand-in for B, which
keeps what A made. In the second the layers of A are passed over, and the stand-in returns what came from the hub. In
between the edge can work on other micro-batches, in one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from blocks.layout import Layout
from blocks.remote import Reached, RemoteBlocks, remote_of
from blocks.surgery import CutModel

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class FirstHalf:
    """What Blocks A made: smashed [rows, width, hidden], noise included, with A's graph, and how it is laid out."""

    smashed: torch.Tensor
    layout: Layout

    def backward(self, grad: torch.Tensor) -> None:
        """On into A with the gradient by smashed; nothing to do where nothing in A is trained."""
        if self.smashed.requires_grad:
            self.smashed.backward(grad)


class Halves:
    """Runs a cut model's training forwards by halves; `call` is the same call of the model for both."""

    def __init__(self, cut: CutModel) -> None:
        self._remote: RemoteBlocks = remote_of(cut)
        self._first = list(cut.layers)[: self._remote.local_index]

    def first(self, call: Callable[[], object]) -> FirstHalf:
        """Embedding and Blocks A."""
        try:
            with self._remote.stopping():
                call()
        except Reached as reached:
            return FirstHalf(reached.smashed, reached.layout)
        raise AssertionError("the model never came to the place of Blocks B")

    def second(self, hidden: torch.Tensor, call: Callable[[], T]) -> T:
        """Blocks C, norm and head on `hidden` in the place of B's output: what the call of the model returns."""
        with self._remote.answering(hidden), self._passed_over():
            return call()

    @contextmanager
    def _passed_over(self) -> Iterator[None]:
        before = [layer.__dict__.get("forward") for layer in self._first]
        for layer in self._first:
            layer.forward = partial(_pass, self._remote)
        try:
            yield
        finally:
            for layer, forward in zip(self._first, before, strict=True):
                _restore(layer, forward)


def _restore(layer: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        del layer.forward
    else:
        layer.forward = forward


def _pass(remote: RemoteBlocks, *args: Any, **kwargs: Any) -> Any:
    """In the place of a layer's forward: what came in goes out, in the form that the layers return."""
    return remote.as_layers_return(args[0] if args else kwargs["hidden_states"])
