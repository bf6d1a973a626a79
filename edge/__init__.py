"""`edge join` and its like: what stays on the user's machine.

As a library: `model = edge.connect(join)` gives a transformers model whose middle runs at the hub.
"""

from typing import Any


def connect(*args: Any, **kwargs: Any) -> Any:
    """See `edge.library.connect` (imported when called: torch takes seconds)."""
    from edge.library import connect as connect_

    return connect_(*args, **kwargs)


__all__ = ["connect"]
