"""When a checkpoint becomes due: never while the one before it is still on its way to the disk."""

from __future__ import annotations

import math
from typing import Any

from hub.groups import Group, Groups
from hub.keeper import CheckpointWritten
from hub.ledger import Ledger
from hub.scheduler import Scheduler
from hub.scheduler import events as ev
from hub.scheduler.state import State
from hub.server import Server


def test_the_checkpoint_of_a_round_does_not_make_another_due_beside_one_that_is() -> None:
    server = Server.__new__(Server)
    state = State(cohort=1, round_steps=1, rounds=0)
    unused: Any = None
    group = Group(0, Scheduler(state), unused, math.inf)
    server._groups, server._ledger = Groups([group], unused), Ledger({}, {})
    server._clock, server._checkpoint_s = lambda: 5.0, 60.0
    group.scheduler.handle(ev.CheckpointDue())
    # That of a round that closes meanwhile.
    server._on_kept(CheckpointWritten({}))
    assert group.checkpoint_at == math.inf
    state.checkpoint_due = False
    server._on_kept(CheckpointWritten({}, 0))
    assert group.checkpoint_at == 65.0
