"""Jobs and answers as Ray carries them to another process: bytes as arrays, which it does not copy, errors as facts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from hub.jobs import InferItem, Outcome, StepItem
from messaging.errors import ErrorCode, FedseaError, HubError, NotFinite, ProtocolError
from messaging.messages import Tensor

Item = TypeVar("Item", StepItem, InferItem)


def packed(tensor: Tensor) -> Tensor:
    """The tensor with arrays in the place of its buffers."""
    arrays = tuple(np.frombuffer(chunk, dtype=np.uint8) for chunk in tensor.chunks)
    return replace(tensor, chunks=arrays)  # type: ignore[arg-type]


def unpacked(tensor: Tensor) -> Tensor:
    """What `packed` was given; the buffers are the arrays' memory."""
    return replace(tensor, chunks=tuple(memoryview(array) for array in tensor.chunks))


def _own(tensor: Tensor) -> Tensor:
    """The same in memory of its own: answers are kept, and would fill Ray's store."""
    return replace(tensor, chunks=tuple(bytes(memoryview(array)) for array in tensor.chunks))


def packed_item(item: Item) -> Item:
    """A job whose tensor is packed."""
    return replace(item, smashed=packed(item.smashed))


def unpacked_item(item: Item) -> Item:
    """The job again."""
    return replace(item, smashed=unpacked(item.smashed))


def packed_outcome(outcome: Outcome) -> object:
    """A tensor, or what an error says; exceptions of ours do not survive pickling."""
    if isinstance(outcome, Tensor):
        return packed(outcome)
    if isinstance(outcome, HubError):
        return "hub", int(outcome.code), str(outcome), outcome.detail
    kind = "finite" if isinstance(outcome, NotFinite) else "protocol"
    return kind, 0, str(outcome), 0


def unpacked_outcome(given: Any) -> Outcome:
    """What `packed_outcome` was given."""
    if isinstance(given, Tensor):
        return _own(given)
    kind, code, text, detail = given
    if kind == "hub":
        return HubError(ErrorCode(code), text, detail)
    error: FedseaError = NotFinite(text) if kind == "finite" else ProtocolError(text)
    return error
