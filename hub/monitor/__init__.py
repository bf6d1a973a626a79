"""The hub's screen: what it shows, and how."""

from hub.monitor.snapshot import EdgeRow, HubSnapshot, ReplicaRow
from hub.monitor.view import VIEW

__all__ = ["VIEW", "EdgeRow", "HubSnapshot", "ReplicaRow"]
