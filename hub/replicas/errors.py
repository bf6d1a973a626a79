"""What may happen to a replica that is another process, perhaps on another machine."""

from __future__ import annotations

from messaging.errors import FedseaError


class ReplicaLost(FedseaError):
    """The process of a replica ended, or cannot be reached: what it had in memory is gone."""
