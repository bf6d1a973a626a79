"""Run the benchmarks, print their table, write it as JSON.

    python -m tools.bench [--json FILE] [--rows GROUP,...] [--quick]

`make bench JSON=FILE` runs all groups; `--rows training` runs that one alone, and says how long it took.
Every figure is taken in one run against the unsplit model: medians of interleaved repetitions, one thread a
process, the hub on one core and the edges (or the unsplit model) on another, CURVE, noise and the live view on.
Exits 0 when the table is whole, whatever its figures; 1 when a row is missing. Linux only.
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

from messaging.commands import quiet_libraries
from messaging.console.figures import duration
from tools.table import Table


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    quiet_libraries()
    from tools.bench.groups import GROUPS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to FILE too")
    parser.add_argument("--rows", default=",".join(GROUPS), help=f"comma-separated: {', '.join(GROUPS)}")
    parser.add_argument("--quick", action="store_true", help="two repetitions: to see that it runs, not to quote")
    given = parser.parse_args(arguments)
    chosen = [name for name in given.rows.split(",") if name]
    if unknown := set(chosen) - set(GROUPS):
        parser.error(f"no such rows: {', '.join(sorted(unknown))}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table("FedSEA against the unsplit model", tuple(row for name in chosen for row in GROUPS[name][1]))
    _run(chosen, table, console, given.quick)
    table.show(console)
    if given.json:
        table.write(given.json)
    return 1 if table.missing() else 0


def _run(chosen: Sequence[str], table: Table, console: Console, quick: bool) -> None:
    """Fill the table; a group that fails leaves its rows missing, and says why."""
    from tools.bench.groups import GROUPS, Bench
    from tools.bench.models import Models
    from tools.bench.processes import conditions

    table.conditions = conditions()
    for name, value in table.conditions.items():
        console.print(f"{name.replace('_', ' ')}: {value}", highlight=False)
    with tempfile.TemporaryDirectory(prefix="fedsea-bench-") as folder:
        bench = Bench(Models(Path(folder) / "models"), Path(folder), console, quick)
        for name in chosen:
            started = time.monotonic()
            try:
                table.add(*GROUPS[name][0](bench))
            except Exception:
                console.print(f"[red]{name} failed:[/]")
                traceback.print_exc()
            console.print(f"{name}: {duration(time.monotonic() - started)}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
