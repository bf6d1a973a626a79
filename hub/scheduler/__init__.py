"""The hub's decisions: a pure state machine. Events in, actions out; no socket, no tensor, no clock."""

from hub.scheduler.core import Scheduler

__all__ = ["Scheduler"]
