"""Every experiment of the fault bench, in the order of the table."""

from __future__ import annotations

from tools.faults.fault import Fault

FAULTS: tuple[Fault, ...] = ()
