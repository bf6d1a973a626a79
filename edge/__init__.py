"""`edge join` and its like: what stays on the user's machine."""

from edge.library import connect

__all__ = ["connect"]
