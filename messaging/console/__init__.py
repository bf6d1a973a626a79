"""What both sides show people: figures as text, a journal, and a live view that becomes plain lines off a terminal."""

from messaging.console.curve import Curve
from messaging.console.journal import Journal
from messaging.console.live import LiveView, View, plain_lines
from messaging.console.tasks import Task

__all__ = ["Curve", "Journal", "LiveView", "Task", "View", "plain_lines"]
