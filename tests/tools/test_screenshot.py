"""The pictures in the README are drawn from snapshots on disk."""

import sys

from edge.monitor import EdgeSnapshot
from hub.monitor import EdgeRow, HubSnapshot
from messaging.console.dump import write_snapshot
from tools import screenshot


def test_it_draws_both_views_and_asks_nothing_of_the_network(tmp_path, monkeypatch):
    hub_file, edge_file, out = tmp_path / "hub.json", tmp_path / "edge.json", tmp_path / "docs"
    write_snapshot(
        hub_file, HubSnapshot("pocket", "float32", "training", edges=(EdgeRow("ward-3", "1:1", "training"),))
    )
    write_snapshot(edge_file, EdgeSnapshot("ward-3", "tcp://10.0.0.5:7700", "training"))
    monkeypatch.setattr(sys, "argv", ["screenshot", str(hub_file), str(edge_file), "--out", str(out)])
    screenshot.main()
    for name in ("live-hub.svg", "live-edge.svg"):
        picture = (out / name).read_text(encoding="utf-8")
        assert "ward-3" in picture
        assert "url(" not in picture.replace("url(#", "")
