"""Requests that are computed some columns at a time: they cross to a replica once, and the replica keeps them.

Both sides keep the same account: of each stream the item whose last answer was None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hub.jobs import InferItem


class Rest(NamedTuple):
    """Stands for the item of a stream that the replica has, and a part of which it has computed."""

    session: int
    stream: int


def note_parted(account: dict[Rest, InferItem], items: Sequence[InferItem], answers: Sequence[object]) -> None:
    """After an inference: keep the items that have no answer yet, and forget those that have."""
    for item, answer in zip(items, answers, strict=True):
        if answer is None:
            account[Rest(item.session, item.stream)] = item
        else:
            account.pop(Rest(item.session, item.stream), None)


def forget_parted(account: dict[Rest, InferItem], session: int, stream: int | None = None) -> None:
    """A stream is closed, or all of a session's."""
    for key in [key for key in account if key.session == session and stream in (None, key.stream)]:
        del account[key]
