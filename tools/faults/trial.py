"""A training that can be run twice with the same keys, data and seeds: once left alone, once under attack.

What it comes to is compared bit by bit: the published adapter, B's adapter and optimizer in the hub's last checkpoint,
and every edge's own adapter and optimizer.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tools.pocket.text import SITES, private_notes
from tools.programs import Hub, Process, Programs, free_ports

PARTITIONS = ("1:1", "2:1", "1:2")
#: However slow the machine is: only a hang takes longer.
END_S = 7200.0


@dataclass(frozen=True)
class Plan:
    """How a trial trains. Every edge takes part in every step, however long the others wait for it."""

    edges: int
    rounds: int
    round_steps: int
    noise: float = 0.02
    checkpoint_s: float = 0.3

    @property
    def names(self) -> tuple[str, ...]:
        """The edges."""
        return tuple(f"edge{number:02}" for number in range(self.edges))

    def partition(self, name: str) -> str:
        """The cut of an edge: not all have the same."""
        return PARTITIONS[self.names.index(name) % len(PARTITIONS)]


class Trial:
    """One run of a plan in a folder. `keys`: a finished run of it, whose edges' secrets these edges take."""

    def __init__(self, plan: Plan, folder: Path, keys: Path | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.plan, self.folder, self.programs = plan, folder, Programs(folder)
        self.ports = free_ports()
        self.hub: Hub | None = None
        if keys is not None:
            for name in plan.names:
                (folder / name).mkdir(mode=0o700)
                for file in (keys / name).glob("*.key"):
                    shutil.copy(file, folder / name)

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *error: Any) -> None:
        self.programs.__exit__(None, None, None)

    def start_hub(self, **more: Any) -> Hub:
        """Begin the hub, or begin it again where it was."""
        plan = self.plan
        self.hub = self.programs.serve(
            "--cohort", plan.edges, "--rounds", plan.rounds, "--round-steps", plan.round_steps, "--grace", "inf",
            "--checkpoint-every", plan.checkpoint_s, *self.ports, **more,
        )  # fmt: skip
        return self.hub

    def start_edge(self, name: str, **more: Any) -> Process:
        """Begin an edge, or begin it again where it was."""
        enrolled = (self.folder / name / "hub.json").exists()
        return self.programs.edge(
            None if enrolled else self.hub, name, self._data(name), "--partition", self.plan.partition(name),
            "--noise", self.plan.noise, "--seed", self.plan.names.index(name), **more,
        )  # fmt: skip

    def end(self, edges: Sequence[Process], within_s: float = END_S) -> dict[str, str]:
        """Wait for the edges to finish, stop the hub, and tell what it all came to."""
        for process in edges:
            done = process.wait(within_s)
            if done.code != 0:
                raise RuntimeError(f"{process} ended with {done.code}")
        assert self.hub is not None
        done = self.hub.process.end(signal.SIGTERM)
        if done.code != 0:
            raise RuntimeError(f"{self.hub.process} ended with {done.code}")
        return self.outcome()

    def rounds_so_far(self) -> int:
        """Rounds that are published, by the disk. For a hub that is not running."""
        from hub.store.state import HubState

        assert self.hub is not None
        with HubState.open(self.hub.state, exclusive=True) as state:
            point, _ = state.checkpoints.load_latest()
        return point.round if point is not None else 0

    def outcome(self) -> dict[str, str]:
        """sha256 of everything that was trained, by name. For a trial whose processes have ended."""
        from edge.state import EdgeState
        from hub.store.state import HubState

        assert self.hub is not None
        out = {}
        with HubState.open(self.hub.state, exclusive=True) as state:
            latest, (point, warnings) = state.adapters.latest(), state.checkpoints.load_latest()
            assert latest is not None
            assert point is not None, warnings
            out["published"] = digest(latest.tensors())
            out["hub adapter"], out["hub optimizer"] = digest(point.adapter), digest(point.optimizer)
            out["hub steps"] = str(point.hub_step)
        for name in self.plan.names:
            with closing(EdgeState(self.folder / name).snapshots()) as snapshots:
                newest = snapshots.newest()
                assert newest is not None
                snapshot = snapshots.at(newest.steps, newest.round)
                assert snapshot is not None
                out[f"{name} adapter"], out[f"{name} optimizer"] = digest(snapshot.adapter), digest(snapshot.optimizer)
                out[f"{name} steps"] = str(newest.steps)
        return out

    def _data(self, name: str) -> Path:
        path = self.folder / f"{name}.jsonl"
        if not path.exists():
            number, sites = self.plan.names.index(name), sorted(SITES)
            notes = private_notes(sites[number % len(sites)], 1 + 40 * number, 30)
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in notes))
        return path


def undisturbed(plan: Plan, folder: Path, keys: Path | None = None) -> dict[str, str]:
    """What a plan comes to when nothing happens; `keys` as in Trial."""
    with Trial(plan, folder, keys) as trial:
        trial.start_hub()
        return trial.end([trial.start_edge(name) for name in plan.names])


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 of tensors, by name: equal only if every bit is."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """The names of what differs."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
