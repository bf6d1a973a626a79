"""Commands that are killed at an exact point while an edge's key is replaced: for `prepare=` of `Programs.start`."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

#: The environment variable that names the point.
POINT = "FEDSEA_TEST_DIES_AT"
EDGE_POINTS = ("made", "answered", "told", "adopting", "adopted")
HUB_POINTS = ("before", "after")


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _after(function: Callable[..., Any]) -> Callable[..., Any]:
    def dying(*arguments: Any) -> Any:
        result = function(*arguments)
        _die()
        return result

    return dying


def dying_edge() -> None:
    """In the process of `edge rotate-key`."""
    import edge.client
    import edge.rotation
    import messaging.messages as m
    from edge.state import EdgeState

    point = os.environ[POINT]
    if point == "made":
        EdgeState.make_next_keys = _after(EdgeState.make_next_keys)  # type: ignore[method-assign]
    elif point == "answered":
        received = edge.client.Requests.received

        def dying(table: Any, packet: m.Packet, now: float) -> Any:
            if isinstance(packet.message, m.KeyReplaced):
                _die()
            return received(table, packet, now)

        edge.client.Requests.received = dying  # type: ignore[method-assign]
    elif point == "told":
        edge.rotation._tell = _after(edge.rotation._tell)
    elif point == "adopting":
        EdgeState.adopt_next_keys = _die  # type: ignore[method-assign]
    elif point == "adopted":
        EdgeState.adopt_next_keys = _after(EdgeState.adopt_next_keys)  # type: ignore[method-assign]


def dying_hub() -> None:
    """In the process of `hub serve`: before the new key is written, or before the edge is told that it is."""
    from hub.store.access import AccessList

    replace = AccessList.replace
    AccessList.replace = _die if os.environ[POINT] == "before" else _after(replace)  # type: ignore[method-assign, assignment]
