"""The hub's screen: what it shows, and how."""

from hub.monitor.snapshot import EdgeRow, HubSnapshot
from hub.monitor.view import VIEW

__all__ = ["VIEW", "EdgeRow", "HubSnapshot"]
