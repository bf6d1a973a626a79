"""Every experiment of the fault bench, in the order of the table."""

from __future__ import annotations

from tools.faults import access, files, gate, hostile, kills, links, poison
from tools.faults.fault import Fault

FAULTS: tuple[Fault, ...] = (
    *kills.FAULTS,
    *links.FAULTS,
    *hostile.FAULTS,
    *access.FAULTS,
    *gate.FAULTS,
    *poison.FAULTS,
    *files.FAULTS,
)
