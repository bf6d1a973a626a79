"""What the engine answers with, in the wire dtype that it was asked in."""

from __future__ import annotations

import torch

from blocks.codec import to_wire
from hub.jobs import Outcome
from messaging.errors import InputError
from messaging.messages import Tensor


def hidden_like(hidden: torch.Tensor, asked: Tensor) -> Outcome:
    """Hidden states for an edge that sent `asked`. An error, for that edge alone, where float16 cannot hold them."""
    try:
        return to_wire(hidden, asked.dtype)
    except InputError as error:
        return error


def gradient_like(gradient: torch.Tensor, asked: Tensor) -> Tensor:
    """The gradient by smashed for an edge that sent `asked`, from a step that B has taken already.

    So this cannot fail: what float16 cannot hold goes as bfloat16, of the same size.
    """
    try:
        return to_wire(gradient, asked.dtype)
    except InputError:
        return to_wire(gradient, "bf16")
