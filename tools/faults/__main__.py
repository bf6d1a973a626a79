"""Break things on purpose, and print what came of it.

    python -m tools.faults [--json FILE] [--rows NAME,...] [--quick]

Every row is an experiment with real processes and sockets on this machine. What needs root (network namespaces)
is skipped elsewhere, with the reason. SOAK_MINUTES in the environment changes the soak's half hour. Exits 0 when
every row is there and met, 1 otherwise. Linux only.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tools.table import Table


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from tools.faults.registry import FAULTS

    known = {fault.name: fault for fault in FAULTS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to FILE too")
    parser.add_argument("--rows", default=",".join(known), help=f"comma-separated: {', '.join(known)}")
    parser.add_argument("--quick", action="store_true", help="few repetitions: to see that it runs, not to quote")
    given = parser.parse_args(arguments)
    chosen = [name for name in given.rows.split(",") if name]
    if unknown := set(chosen) - set(known):
        parser.error(f"no such rows: {', '.join(sorted(unknown))}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    faults = [known[name] for name in chosen]
    table = Table("FedSEA under faults", tuple(row for fault in faults for row in fault.rows))
    with tempfile.TemporaryDirectory(prefix="fedsea-faults-") as folder:
        for fault in faults:
            _run(fault, Path(folder) / fault.name, table, console, given.quick)
            if given.json:
                table.write(given.json)
    table.show(console)
    unmet = [row for row in table.rows if row.met is False]
    return 1 if unmet or table.missing() else 0


def _run(fault: object, folder: Path, table: Table, console: Console, quick: bool) -> None:
    """Fill the table; an experiment that fails leaves its rows missing, and says why."""
    from tools.faults.fault import Fault, Setting

    assert isinstance(fault, Fault)
    folder.mkdir(parents=True)
    console.print(f"{fault.name}: {fault.title}", highlight=False)
    begun = time.monotonic()
    try:
        table.add(*fault.run(Setting(folder, console, quick)))
    except Exception:
        console.print(f"[red]{fault.name} failed:[/]")
        traceback.print_exc()
    console.print(f"  {time.monotonic() - begun:.0f} s", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
