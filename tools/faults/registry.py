"""Every experiment of the fault bench, in the order of the table."""

from __future__ import annotations

from tools.faults import access, crowd, files, flood, gate, generation, hostile, kills, links, poison, soak, transfers
from tools.faults.fault import Fault

FAULTS: tuple[Fault, ...] = (
    *kills.FAULTS,
    *links.FAULTS,
    *flood.READERS,
    *hostile.FAULTS,
    *access.FAULTS,
    *gate.FAULTS,
    *flood.FAULTS,
    *poison.FAULTS,
    *crowd.FAULTS,
    *generation.FAULTS,
    *files.FAULTS,
    *transfers.FAULTS,
    *soak.FAULTS,
)
