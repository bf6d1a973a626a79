"""An edge with its weights in fewer bits trains with a hub, goes on after a stop, and generates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import edge
from blocks.quantize import QuantizedLinear
from tests.support.sites import greedy, write_notes
from tools.programs import Programs

pytest.importorskip("torchao.quantization")
# peft asks transformers for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.slow
def test_it_trains_goes_on_and_generates(module_programs: Programs) -> None:
    programs: Programs = module_programs
    folder: Path = programs.folder
    hub = programs.serve("--cohort", 1, "--rounds", 2, "--round-steps", 5, "--lr", 5e-3)
    data, held_out = write_notes(folder, "clinic", 1, 30), write_notes(folder, "clinic", 500, 4)
    more = ("--eval", held_out, "--partition", "1:1", "--load-in", "4bit")
    first = programs.edge(hub, "clinic", data, *more, "--steps", 3).wait(120)
    assert first.code == 0, first.err + first.out
    done = programs.edge(hub, "clinic", data, *more).wait(120)
    assert done.code == 0, done.err + done.out
    for text in (first.err + first.out, done.err + done.out):
        assert "torchao" not in text
    before, *_, after = json.loads((folder / "clinic" / "report.json").read_text())["held_out"]
    assert after < 0.95 * before
    model = edge.connect(state=folder / "clinic", noise=0.0, load_in="8bit")
    with model.hub:
        assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) > 10
        assert greedy(model, "Patient:", 5) is not None
