"""Show where the time of one decoded token and of one training step goes.

    python -m tools.profile [--json FILE] [--picture FILE.svg] [--quick]

A hub and an edge run as real processes over real sockets, one thread and one core each (hidden 512, 16 layers,
partition 1:1, noise on), with their functions timed from outside. Every moment is charged to what ran in it, so the
parts sum to the whole. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from rich.console import Console


def main() -> int:
    """The command; returns the exit status."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from tools.profile.picture import draw, svg
    from tools.profile.run import measure, standard

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the milliseconds by part to FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw them to FILE, an SVG")
    parser.add_argument("--quick", action="store_true", help="few tokens and steps: to see that it runs, not to quote")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedsea-profile-") as folder:
        tokens, steps = (24, 5) if given.quick else (256, 14)
        profile = measure(Path(folder), standard(Path(folder)), tokens, steps)
    view = draw(profile)
    Console(width=None if sys.stdout.isatty() else 120).print(view)
    if given.json:
        given.json.write_text(json.dumps(asdict(profile), indent=1) + "\n")
    if given.picture:
        given.picture.write_text(svg(view), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
