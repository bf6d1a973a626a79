"""Have an edge stand still while it owes nothing to a joined step."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from tools.programs import Hub, Process

_TRIES, _GOES_ON_S, _STEPS = 20, 4.0, 3


def pause_between_steps(hub: Hub, edge: Process, steps: Callable[[dict[str, Any]], list[int]]) -> None:
    """Stop an edge so that the hub goes on by three steps without it, in everything that `steps` counts.

    The deadline of a quorum is for steps that begin: one that an edge is inside of waits for it, up to `--grace`. Such
    an edge is woken, and stopped again.
    """
    for _ in range(_TRIES):
        edge.signal(signal.SIGSTOP)
        stopped = hub.status()["live"]["uptime_s"]
        # What it did before is in the status by then, which the hub writes twice a second.
        hub.until(lambda live: live["uptime_s"] > stopped + 1.5, "a later status")  # noqa: B023
        at = steps(hub.status()["live"])
        try:
            hub.until(lambda live: _beyond(steps(live), at, _STEPS), "steps without an edge", _GOES_ON_S)  # noqa: B023
        except AssertionError:
            edge.signal(signal.SIGCONT)
            hub.until(lambda live: _beyond(steps(live), at, 1), "steps with it again")  # noqa: B023
        else:
            return
    raise AssertionError(f"{hub.process} does not go on without an edge")


def _beyond(now: list[int], then: list[int], count: int) -> bool:
    return all(mine >= before + count for mine, before in zip(now, then, strict=True))
