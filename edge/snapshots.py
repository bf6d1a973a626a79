"""Where an edge's own training stands, on disk after every step, so that a run can go on or back to any step needed.

A step's result is on the disk before the next step is asked of the hub (`wait`), and the hub keeps its answers to a
step until it sees the next one. So an edge that is killed at any moment can do again exactly what it lost. The
snapshots of those steps that the hub's checkpoints hold are kept too: a hub that is killed goes back to one of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors

from messaging.errors import InputError
from messaging.keys import write_private

_NAME = re.compile(r"step-(\d+)-round-(\d+)\.safetensors")


@dataclass(frozen=True)
class Standing:
    """Where a training stands: after `steps` steps of this edge, `round_step` of them in round `round`.

    version: of the published adapter loaded last. round_tokens: target tokens of this round's steps. closes: the
    hub has closed this round to further steps. held_out: held-out losses so far; evaluated: after how many rounds
    the last one was taken (-1: none). model_hash and partition: what the tensors belong to. micro_batches: of a step.
    """

    steps: int
    round: int
    version: int
    round_step: int
    round_tokens: int
    closes: bool
    held_out: tuple[float, ...]
    evaluated: int
    model_hash: str
    partition: str
    micro_batches: int = 1


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A training as it stands: the tensors of the edge's adapter and optimizer, by name."""

    standing: Standing
    adapter: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]


class Snapshots:
    """The snapshots in a folder. One training at a time; a thread of its own writes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self._folder = folder
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="snapshots")
        self._writing: Future[None] | None = None
        #: steps inside the hub's two newest checkpoints, as far as this process was told
        self._marks: list[int] = []
        #: what an earlier process left and this one cannot judge yet
        self._inherited = set(self._found())

    # -- writing -------------------------------------------------------------------------------------

    def put(self, snapshot: Snapshot, checkpoint: int | None) -> None:
        """Write a snapshot in the background.

        checkpoint: this edge's steps in the hub's newest checkpoint; None: nothing new is known of that.
        """
        self.wait()
        if checkpoint is not None and checkpoint not in self._marks:
            self._marks = [*self._marks, checkpoint][-2:]
            if len(self._marks) == 2:
                self._inherited.clear()
        self._writing = self._pool.submit(self._write, snapshot)

    def wait(self) -> None:
        """Return when the last snapshot is safe on the disk. InputError if the disk does not take it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Finish writing and end the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def path(self, standing: Standing) -> Path:
        """Where a snapshot is written."""
        return self._folder / f"step-{standing.steps}-round-{standing.round}.safetensors"

    def _write(self, snapshot: Snapshot) -> None:
        tensors = {f"adapter/{name}": value.contiguous() for name, value in snapshot.adapter.items()}
        tensors |= {f"optimizer/{name}": value.contiguous() for name, value in snapshot.optimizer.items()}
        facts = {"fedsea": json.dumps(asdict(snapshot.standing))}
        write_private(self.path(snapshot.standing), save_safetensors(tensors, facts))
        self._prune(snapshot.standing)

    def _prune(self, newest: Standing) -> None:
        for (steps, round_), path in self._found().items():
            wanted = (steps, round_) == (newest.steps, newest.round) or steps in self._marks
            if not wanted and (steps, round_) not in self._inherited:
                path.unlink(missing_ok=True)

    # -- reading -------------------------------------------------------------------------------------

    def newest(self) -> Standing | None:
        """The furthest standing on the disk."""
        found = self._found()
        return self._read_standing(found[max(found, key=lambda at: (at[1], at[0]))]) if found else None

    def at(self, steps: int, round_: int) -> Snapshot | None:
        """The snapshot after `steps` steps that fits a hub in round `round_`: of that round or the one before it."""
        found = self._found()
        for candidate in (round_, round_ - 1):
            if (steps, candidate) in found:
                return self._read(found[(steps, candidate)])
        return None

    def drop_after(self, standing: Standing) -> None:
        """Forget what came after a snapshot: the hub has gone back, and all that is undone."""
        self.wait()
        # A checkpoint that is undone must not count as one of the two newest.
        self._marks = [mark for mark in self._marks if mark <= standing.steps]
        for (steps, round_), path in self._found().items():
            if (round_, steps) > (standing.round, standing.steps):
                path.unlink(missing_ok=True)

    def _found(self) -> dict[tuple[int, int], Path]:
        names = ((path, _NAME.fullmatch(path.name)) for path in self._folder.iterdir())
        return {(int(match[1]), int(match[2])): path for path, match in names if match is not None}

    def _read_standing(self, path: Path) -> Standing:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return _standing(json.loads(file.metadata()["fedsea"]))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, error) from error

    def _read(self, path: Path) -> Snapshot:
        standing = self._read_standing(path)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
        return Snapshot(
            standing,
            {name.removeprefix("adapter/"): t for name, t in tensors.items() if name.startswith("adapter/")},
            {name.removeprefix("optimizer/"): t for name, t in tensors.items() if name.startswith("optimizer/")},
        )


def _standing(facts: Mapping[str, Any]) -> Standing:
    # Before steps had micro-batches, nothing was said of them.
    given = {field.name: facts[field.name] for field in fields(Standing) if field.name != "micro_batches"}
    given["micro_batches"] = facts.get("micro_batches", 1)
    return Standing(**{**given, "held_out": tuple(given["held_out"])})


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} is damaged ({error}): remove it; this edge then goes on from an older or the published one"
    )
