"""When a checkpoint becomes due: never while the one before it is still on its way to the disk."""

from __future__ import annotations

import math
from typing import Any

from hub.computing import Computing
from hub.groups import Group, Groups
from hub.keeper import CheckpointWritten
from hub.ledger import Ledger
from hub.scheduler import Scheduler
from hub.scheduler import events as ev
from hub.scheduler.state import State


def test_the_checkpoint_of_a_round_does_not_make_another_due_beside_one_that_is() -> None:
    computing = Computing.__new__(Computing)
    state = State(cohort=1, round_steps=1, rounds=0)
    unused: Any = None
    group = Group(0, Scheduler(state), unused, math.inf)
    computing._groups, computing._ledger = Groups([group], unused), Ledger({}, {})
    computing._clock, computing._checkpoint_s = lambda: 5.0, 60.0
    group.scheduler.handle(ev.CheckpointDue())
    # That of a round that closes meanwhile.
    computing.kept(CheckpointWritten({}))
    assert group.checkpoint_at == math.inf
    state.checkpoint_due = False
    computing.kept(CheckpointWritten({}, 0))
    assert group.checkpoint_at == 65.0
