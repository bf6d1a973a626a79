"""Edges that choose the dtype on the wire, through real processes and sockets."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import edge
from tests.support.sites import write_notes
from tools.faults.kills import arm_edge
from tools.programs import Hub, Programs

pytestmark = pytest.mark.slow

STEPS = 6
NEW = 24
#: In the third step, of two micro-batches each, with its last gradient on the way.
KILLED = {"KILL_POINT": "before the reply", "KILL_AFTER": "6", "KILL_VARIANT": "1"}


def train(programs: Programs, name: str, killed: bool) -> tuple[Hub, dict[str, Any], dict[str, bytes]]:
    """Two edges, one of them with int8; the hub, their reports, and the adapter that came of it. `killed`: the edge
    with int8 is, in the middle, and goes on."""
    home = programs.folder / name
    hub = programs.serve("--cohort", 2, "--rounds", 1, "--round-steps", STEPS, state=home)
    plain = programs.edge(hub, f"{name}-plain", write_notes(programs.folder, "clinic", 2, 30), "--partition", "1:1")
    notes = write_notes(programs.folder, "clinic", 1, 30)
    options = ("--partition", "1:1", "--wire", "int8")
    if killed:
        small = programs.edge(hub, f"{name}-int8", notes, *options, prepare=arm_edge, env=KILLED)
        assert small.wait().code == -signal.SIGKILL, str(small)
        small = programs.edge(None, f"{name}-int8", notes, *options)
    else:
        small = programs.edge(hub, f"{name}-int8", notes, *options)
    assert small.wait().code == 0, str(small)
    assert "partition 1:1, int8 on the wire" in small.out + small.err
    assert plain.wait().code == 0, str(plain)
    reports = {
        kind: json.loads((programs.folder / f"{name}-{kind}" / "report.json").read_text()) for kind in ("plain", "int8")
    }
    tensors = load_file(home / "adapters" / "v1.safetensors")
    return hub, reports, {key: value.numpy().tobytes() for key, value in tensors.items()}


def test_an_edge_with_int8_trains_beside_one_without_and_generates(programs: Programs) -> None:
    hub, reports, calm = train(programs, "calm", killed=False)
    for direction in ("bytes_sent", "bytes_received"):
        assert reports["int8"][direction] < reports["plain"][direction]
    assert all(report["steps"] == STEPS for report in reports.values())
    assert reports["int8"]["held_out"][1] < reports["int8"]["held_out"][0]

    found = {wire: generate(programs.folder / "calm-int8", wire) for wire in ("fp32", "int8")}
    (exact, much), (near, little) = found["fp32"], found["int8"]
    assert little < much - NEW * 192 * 2.5
    assert 0 < float((near - exact).abs().max() / exact.std()) < 0.2
    hub.process.end(signal.SIGTERM)

    # What is quantised anew after a kill has the same bytes, so the hub knows the step again.
    _, again, disturbed = train(programs, "killed", killed=True)
    assert again["int8"]["steps"] == STEPS
    assert disturbed == calm


def generate(state: Path, wire: str) -> tuple[torch.Tensor, int]:
    """Logits of a prompt, and the bytes that some tokens after it were received in."""
    model = edge.connect(state=state, noise=0.0, wire=wire)
    with model.hub as hub:
        ids = hub.tokenizer("Patient:", return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(ids).logits
        before = hub.traffic[1]
        model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        return logits, hub.traffic[1] - before
