"""Edges that take their time, for `prepare=` of `Programs.edge`.

A small model trains a hundred steps while a test reads the hub's status once. Whatever has to happen in the middle of
a training then happens in the middle of it, on any machine.
"""

from __future__ import annotations

import time

from edge.data import Batch

#: Several times as long as two looks at the hub's status, over the steps that these tests leave.
STEP_S = 0.1


def paced() -> None:
    """In the process of `edge join`: no two steps begin within STEP_S."""
    from edge.trainer import Trainer

    step = Trainer._step

    def slow(trainer: Trainer, batch: Batch) -> None:
        time.sleep(STEP_S)
        step(trainer, batch)

    Trainer._step = slow  # type: ignore[method-assign]
