"""What the edge keeps on disk: its keys, the hub's address, fetched blocks, and where its training stands."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from edge.snapshots import Snapshots
from messaging.errors import InputError
from messaging.joining import HubAddress
from messaging.keys import (
    KeyPair,
    load_keys,
    load_or_create_keys,
    read_private,
    sweep_private,
    take_over_keys,
    write_private,
)


@dataclass(frozen=True)
class Membership:
    """The hub that this edge is enrolled at, its name there, and the partition and noise that it trains with."""

    hub: HubAddress
    name: str
    partition: str | None = None
    noise: float | None = None
    #: the key that the hub has announced for its next start
    next_key: str | None = None


#: A temporary file of this age belongs to no living writer.
_DEAD_S = 60.0


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
        path, noise = self.folder / "edge.key", self.folder / "noise.key"
        if not path.exists() and not noise.exists():
            write_private(noise, secrets.token_hex(32).encode())
        return load_or_create_keys(path)

    def next_keys(self) -> KeyPair | None:
        """The pair that is about to take the place of the present one; None if none is."""
        path = self.folder / "edge-next.key"
        return load_keys(path) if path.exists() else None

    def make_next_keys(self) -> KeyPair:
        """The pair that is to take the place of the present one, made now if there is none yet."""
        self.noise_secret()
        return load_or_create_keys(self.folder / "edge-next.key")

    def adopt_next_keys(self) -> None:
        """Put that pair in the place of the present one, in one step."""
        take_over_keys(self.folder / "edge-next.key", self.folder / "edge.key")

    def noise_secret(self) -> bytes:
        """What this edge's noise is drawn from. It never changes: one text must never get two noises.

        A state from before noise had a secret of its own drew it from the first key, and goes on with that.
        """
        path, keys = self.folder / "noise.key", self.keys()
        if not path.exists():
            write_private(path, keys.secret.encode())
        return read_private(path)

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
            more = {name: fields.get(name) for name in ("partition", "noise", "next_key")}
            return Membership(HubAddress(**fields["hub"]), fields["name"], **more)
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
            # Only here this process is alone; beside it `edge generate` may just write into the outer folder.
            sweep_private(self.folder, older_than_s=_DEAD_S)
            sweep_private(self.folder / "training")
            yield
        finally:
            os.close(descriptor)

    def write_report(self, report: Mapping[str, object]) -> Path:
        """What a run came to, as report.json."""
        path = self.folder / "report.json"
        write_private(path, json.dumps(report, indent=2).encode() + b"\n")
        return path

    def snapshots(self) -> Snapshots:
        """Where this edge's training stands."""
        return Snapshots(self.folder / "training")
