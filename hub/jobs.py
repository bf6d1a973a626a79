"""What the compute thread is asked to do, and what it answers. Tensors are opaque to whoever passes these on.

`session` is the seat of a session everywhere here (`hub.sessions`): it outlives a process of the edge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from blocks.layout import Layout
from messaging.errors import FedseaError
from messaging.messages import Tensor


@dataclass(frozen=True)
class Place:
    """Where the rows of an edge enter and leave: absolute layers p and N - q."""

    enter: int
    leave: int


@dataclass(frozen=True)
class StepItem:
    """One edge's part of a joined forward: smashed [batch, seq, hidden] with `tokens` targets behind it.

    It is micro-batch `micro` of the `micros` of its step.
    """

    session: int
    place: Place
    layout: Layout
    tokens: int
    smashed: Tensor
    micro: int = 0
    micros: int = 1

    def digest(self) -> bytes:
        """Stands for everything that the answer depends on: equal for a repetition of the same step."""
        what = (
            *(self.place, self.layout.to_ints(), self.tokens, self.micro, self.micros),
            *(self.smashed.dtype, self.smashed.shape),
        )
        sum_ = hashlib.sha256(repr(what).encode())
        for chunk in self.smashed.chunks:
            sum_.update(chunk)
        return sum_.digest()


@dataclass(frozen=True)
class InferItem:
    """One request of a stream (0: no cache), [rows, new, hidden] built on `layout.past` positions."""

    session: int
    request: int
    stream: int
    place: Place
    version: int
    layout: Layout
    order: tuple[int, ...]
    smashed: Tensor
    #: the edge that may be given again what is computed of this; empty: nobody
    owner: str = ""


@dataclass(frozen=True)
class EdgeAdapter:
    """An edge's adapter for a round, checked, and the target tokens behind it."""

    session: int
    place: Place
    tokens: int
    tensors: Mapping[str, torch.Tensor]


#: What becomes of a tensor that is asked for.
Outcome = Tensor | FedseaError
