"""What the edge keeps on disk: its key, the hub's address, fetched blocks, and where its training stands."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors

from messaging.errors import InputError
from messaging.joining import HubAddress
from messaging.keys import KeyPair, load_or_create_keys, write_private


@dataclass(frozen=True)
class Membership:
    """The hub that this edge is enrolled at, its name there, and the partition and noise that it trains with."""

    hub: HubAddress
    name: str
    partition: str | None = None
    noise: float | None = None


@dataclass(frozen=True, eq=False)
class Snapshot:
    """This edge's training after `steps` steps: the tensors of its adapter and optimizer, by name."""

    steps: int
    round: int
    version: int
    adapter: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    model_hash: str = ""


class EdgeState:
    """A folder of one edge, private to its owner (0700)."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the state folder {folder}: {error.strerror}") from error
        self.folder = folder

    def keys(self) -> KeyPair:
        """The edge's key pair, made at the first call; its public key is its identity."""
        return load_or_create_keys(self.folder / "edge.key")

    @property
    def cache(self) -> Path:
        """Where fetched weights and files are kept."""
        path = self.folder / "cache"
        path.mkdir(exist_ok=True)
        return path

    def membership(self) -> Membership | None:
        """Where this edge is enrolled; None before."""
        path = self.folder / "hub.json"
        if not path.exists():
            return None
        try:
            fields = json.loads(path.read_text())
            return Membership(HubAddress(**fields["hub"]), fields["name"], fields.get("partition"), fields.get("noise"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}): remove it and join again") from error

    def set_membership(self, membership: Membership) -> None:
        """Remember it."""
        write_private(self.folder / "hub.json", json.dumps(asdict(membership)).encode())

    @contextmanager
    def training(self) -> Iterator[None]:
        """Hold the folder for one training run. Raises InputError when another run has it."""
        descriptor = os.open(self.folder / "training.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise InputError(f"another `edge join` trains with {self.folder}: give this one another --state") from None
        try:
            yield
        finally:
            os.close(descriptor)

    def write_report(self, report: Mapping[str, object]) -> Path:
        """What a run came to, as report.json."""
        path = self.folder / "report.json"
        write_private(path, json.dumps(report, indent=2).encode() + b"\n")
        return path

    # -- snapshots -----------------------------------------------------------------------------------

    def save(self, snapshot: Snapshot) -> Path:
        """Write it in one piece; what was there before is replaced."""
        tensors = {f"adapter/{name}": value.contiguous() for name, value in snapshot.adapter.items()}
        tensors |= {f"optimizer/{name}": value.contiguous() for name, value in snapshot.optimizer.items()}
        facts = {
            "steps": snapshot.steps,
            "round": snapshot.round,
            "version": snapshot.version,
            "model_hash": snapshot.model_hash,
        }
        path = self.folder / "training.safetensors"
        write_private(path, save_safetensors(tensors, {"fedsea": json.dumps(facts)}))
        return path

    def snapshot(self) -> Snapshot | None:
        """What was saved last; None where nothing was. Raises InputError when it cannot be read."""
        path = self.folder / "training.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                facts = json.loads(file.metadata()["fedsea"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise InputError(f"{path} is damaged ({error}): remove it to start this edge's training anew") from error
        return Snapshot(
            steps=facts["steps"],
            round=facts["round"],
            version=facts["version"],
            model_hash=facts["model_hash"],
            adapter={name.removeprefix("adapter/"): t for name, t in tensors.items() if name.startswith("adapter/")},
            optimizer={n.removeprefix("optimizer/"): t for n, t in tensors.items() if n.startswith("optimizer/")},
        )
