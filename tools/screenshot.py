"""Pictures of the live views, from snapshots that `hub serve` and `edge join` wrote.

    python -m tools.screenshot HUB.json EDGE.json --out docs

writes docs/live-hub.svg and docs/live-edge.svg.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

import edge.monitor.snapshot
import edge.monitor.view
import hub.monitor.snapshot
import hub.monitor.view
from messaging.console.dump import read_snapshot

WIDTH, HEIGHT = 96, 28


def svg(view: Text, title: str) -> str:
    """The view in a drawn terminal window."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(view)
    drawn = console.export_svg(title=title, unique_id=title.replace(" ", "-"))
    # rich's picture loads its font from the network; whoever looks at a README has a monospace font of their own.
    return re.sub(r"\s*@font-face\s*{[^}]*}", "", drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw snapshots of the live views as SVG.")
    parser.add_argument("hub", type=Path, help="a snapshot of `hub serve`, as JSON")
    parser.add_argument("edge", type=Path, help="a snapshot of `edge join`, as JSON")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for the pictures")
    options = parser.parse_args()
    hub_now = hub.monitor.snapshot.from_fields(read_snapshot(options.hub))
    edge_now = edge.monitor.snapshot.from_fields(read_snapshot(options.edge))
    options.out.mkdir(parents=True, exist_ok=True)
    pictures = {
        "live-hub.svg": svg(hub.monitor.view.render(hub_now, WIDTH, HEIGHT), "hub serve"),
        "live-edge.svg": svg(edge.monitor.view.render(edge_now, WIDTH, HEIGHT), "edge join"),
    }
    for name, picture in pictures.items():
        (options.out / name).write_text(picture, encoding="utf-8")
        print(options.out / name)


if __name__ == "__main__":
    main()
