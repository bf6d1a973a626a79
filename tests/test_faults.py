"""The fault bench, quickly: every experiment of it, with few repetitions."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from tools.faults.fault import Fault, Setting
from tools.faults.registry import FAULTS
from tools.table import Row, Skipped


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(fault: Fault, tmp_path: Path) -> None:
    outcome = fault.run(Setting(tmp_path, Console(), quick=True))
    measured = {item.row for item in outcome}
    assert measured >= set(fault.rows)
    unmet = [item for item in outcome if isinstance(item, Row) and item.met is False]
    assert not unmet
    skipped = [item for item in outcome if isinstance(item, Skipped)]
    if len(skipped) == len(outcome):
        pytest.skip("; ".join(f"{item.row}: {item.reason}" for item in skipped))
