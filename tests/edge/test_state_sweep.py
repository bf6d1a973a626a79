"""What a killed edge leaves half-written is gone when it trains again; what another process just writes is not."""

from __future__ import annotations

import os
from pathlib import Path

from edge.state import EdgeState
from messaging.keys import sweep_private

STRAY = ".step-3-round-1.safetensors.0123456789abcdef.tmp"


def test_strays_are_swept_when_training_begins(tmp_path: Path) -> None:
    folder = tmp_path / "edge"
    (folder / "training").mkdir(parents=True)
    for name in (STRAY, "kept.safetensors", "report.tmp"):
        (folder / "training" / name).touch()
    (folder / STRAY).touch()
    os.utime(folder / STRAY, (0, 0))
    (folder / ".hub.json.0123456789abcdef.tmp").touch()
    state = EdgeState(folder)
    assert (folder / STRAY).exists()
    with state.training():
        assert sorted(path.name for path in (folder / "training").iterdir()) == ["kept.safetensors", "report.tmp"]
        assert not (folder / STRAY).exists()
        assert (folder / ".hub.json.0123456789abcdef.tmp").exists()


def test_a_folder_that_is_not_there_has_no_strays(tmp_path: Path) -> None:
    sweep_private(tmp_path / "nothing")
