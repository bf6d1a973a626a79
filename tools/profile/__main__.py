"""Show where the time of one decoded token and of one training step goes.

    python -m tools.profile [--json FILE] [--picture FILE.svg] [--quick]

A hub and an edge run as real processes over real sockets, one thread and one core each (hidden 512, 16 layers,
partition 1:1, noise on), with their functions timed from outside. Every moment is charged to what ran in it, so the
parts sum to the whole. Linux only.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text


def main() -> int:
    """The command; returns the exit status."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from tools.profile.picture import draw
    from tools.profile.run import measure

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the milliseconds by part to FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw them to FILE, an SVG")
    parser.add_argument("--quick", action="store_true", help="few tokens and steps: to see that it runs, not to quote")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedsea-profile-") as folder:
        profile = measure(Path(folder), 24 if given.quick else 256, 5 if given.quick else 14)
    view = draw(profile)
    Console(width=None if sys.stdout.isatty() else 120).print(view)
    if given.json:
        given.json.write_text(json.dumps(asdict(profile), indent=1) + "\n")
    if given.picture:
        given.picture.write_text(_svg(view), encoding="utf-8")
    return 0


def _svg(view: Text) -> str:
    from tools.profile.picture import WIDTH

    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(view)
    drawn = console.export_svg(title="where the time goes", unique_id="profile")
    # rich's picture loads its font from the network; whoever looks at it has a monospace font of their own.
    return re.sub(r"\s*@font-face\s*{[^}]*}", "", drawn)


if __name__ == "__main__":
    sys.exit(main())
