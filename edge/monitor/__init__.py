"""The edge's screen: what it shows, and how."""

from edge.monitor.snapshot import EdgeSnapshot, TimeSpent
from edge.monitor.view import VIEW

__all__ = ["VIEW", "EdgeSnapshot", "TimeSpent"]
