"""The hub's state folder, opened.

    hub.db                          keys, tokens, epoch, what is served, and the list of the files below
    hub.key                         the hub's CURVE key pair
    hub-next.key                    the pair that takes its place at the next start, if there is to be one
    audit.jsonl                     who was let in, who was not and why; see `audit.py`
    lock                            held while a hub runs
    status.json                     what a running hub says of itself, each second
    checkpoints/ckpt-N.safetensors  the newest two
    adapters/vN.safetensors         the newest five

`hub serve` opens it exclusively, the other commands beside it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from hub.store.access import AccessList
from hub.store.audit import AuditLog
from hub.store.checkpoints import CheckpointStore
from hub.store.database import Database, create_database
from hub.store.files import make_private_folder, sweep_temporaries, write_bytes_atomic
from hub.store.lock import StateLock, is_locked
from hub.store.published import AdapterStore, recipe_from_json
from hub.store.series import Series
from messaging.errors import InputError, KeyFileError
from messaging.joining import HubAddress
from messaging.keys import KeyPair, load_keys, load_or_create_keys, take_over_keys
from messaging.messages import Recipe


@dataclass(frozen=True)
class ModelInfo:
    """The model that a state trains: what other tools load it by, the hash of its weights, dtype, layers.

    `fan_in_fan_out` is peft's word for linear modules that keep their weight transposed (GPT-2).
    """

    name: str
    hash: str
    dtype: str
    num_layers: int
    fan_in_fan_out: bool


class HubState:
    """Made by `open`. Threads: everything but checkpoints and adapters may be used from any of them."""

    def __init__(self, folder: Path, exclusive: bool, clock: Callable[[], float], owned: ExitStack) -> None:
        """For `open`: whatever this opens, `owned` closes."""
        self.folder = folder
        self._exclusive = exclusive
        self._clock = clock
        self._owned = owned
        self._database = self._connect()
        self.audit = AuditLog(folder / "audit.jsonl", clock)
        owned.callback(self.audit.flush, everything=True)
        self.access = AccessList(self._database, self._connect(), self.audit, clock)
        checkpoints = Series(self._database, folder / "checkpoints", "ckpt-", clock)
        adapters = Series(self._database, folder / "adapters", "v", clock)
        self.checkpoints = CheckpointStore(checkpoints)
        self.adapters = AdapterStore(adapters)
        if exclusive:
            sweep_temporaries(folder)
            checkpoints.sweep()
            adapters.sweep()

    @classmethod
    def open(cls, folder: Path, exclusive: bool, clock: Callable[[], float] = time.time) -> HubState:
        """Open a state; exclusively, making it if need be, or else beside a hub that may be running on it.

        InputError if another process has it exclusively, if there is none to open beside, or if the disk fails.
        """
        owned = ExitStack()
        try:
            if exclusive:
                make_private_folder(folder)
                owned.callback(StateLock(folder / "lock").release)
                create_database(folder / "hub.db")
            elif not (folder / "hub.db").is_file():
                raise InputError(f"{folder} is no state of a hub: give --state the folder that `hub serve` was given")
            return cls(folder, exclusive, clock, owned)
        except BaseException:
            owned.close()
            raise

    def __enter__(self) -> HubState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the database and, if held, give the lock back. Repeating it does no harm."""
        self._owned.close()

    def running(self) -> bool:
        """Whether a hub runs on this state at this instant."""
        return self._exclusive or is_locked(self.folder / "lock")

    def keys(self) -> KeyPair:
        """The hub's key pair, made at the first call. KeyFileError if the file cannot be used."""
        return load_or_create_keys(self.folder / "hub.key")

    def refused_at_the_handshake(self, key: str, address: str, why: str) -> None:
        """Note in the audit log whom the gatekeeper turned away; it calls this on its own thread."""
        reason = f"{self.access.standing(key)} key: {why}"
        self.audit.write_often("refused at the handshake", key=key, address=address, reason=reason)

    # --- the hub's next key -------------------------------------------------------------------

    def rotate_keys(self) -> tuple[str, float]:
        """Have a new key pair take the present one's place at the next start: its public key, and since when.

        Repeating it changes nothing. The running hub tells its edges of the new key.
        """
        path = self.folder / "hub-next.key"
        announced = self._get("next_key")
        if announced is None:
            # The file first: what is announced must be there when the hub starts.
            announced = [load_or_create_keys(path).public, self._clock()]
            self._set(next_key=announced)
            self.audit.write("new hub key announced", key=announced[0], reason="in use from the next start on")
        return announced[0], announced[1]

    def next_key(self) -> str | None:
        """The public key that the hub has from its next start on, if it is to be another."""
        announced = self._get("next_key")
        return None if announced is None else str(announced[0])

    def adopt_next_keys(self) -> bool:
        """At a start: put the announced key pair in the place of the present one. False if none is announced.

        Wherever this is killed, the next start completes it. KeyFileError if the announced pair is lost.
        """
        announced = self.next_key()
        if announced is None:
            return False
        path = self.folder / "hub-next.key"
        if self.keys().public != announced:
            if load_keys(path).public != announced:
                raise KeyFileError(f"{path} is not the key that the edges were told of: restore it")
            take_over_keys(path, self.folder / "hub.key")
            self.audit.write("hub key replaced", key=announced)
        with self._database.transaction() as db:
            db.execute("DELETE FROM meta WHERE name = 'next_key'")
        return True

    # --- facts --------------------------------------------------------------------------------

    def next_epoch(self) -> int:
        """Raise the epoch. It is on the disk on return: call this before binding."""
        with self._database.transaction() as db:
            sql = "INSERT INTO meta VALUES ('epoch', '1') ON CONFLICT (name) DO UPDATE SET value = value + 1"
            db.execute(sql)
            return int(db.execute("SELECT value FROM meta WHERE name = 'epoch'").fetchone()[0])

    def epoch(self) -> int:
        """The epoch of the hub that runs or ran last; 0 before the first."""
        return int(self._get("epoch") or 0)

    def set_address(self, address: HubAddress) -> None:
        """Where edges reach this hub, for the join strings of `hub invite`."""
        self._set(address=asdict(address))

    def address(self) -> HubAddress | None:
        """What `set_address` was given last."""
        fields = self._get("address")
        return None if fields is None else HubAddress(**fields)

    def set_training(self, model: ModelInfo, recipe: Recipe) -> None:
        """Which model this state trains, and how."""
        self._set(model=asdict(model), recipe=asdict(recipe))

    def model(self) -> ModelInfo | None:
        """The model of `set_training`."""
        fields = self._get("model")
        return None if fields is None else ModelInfo(**fields)

    def recipe(self) -> Recipe | None:
        """The recipe of `set_training`."""
        fields = self._get("recipe")
        return None if fields is None else recipe_from_json(fields)

    def _set(self, **values: Any) -> None:
        rows = [(name, json.dumps(value)) for name, value in values.items()]
        with self._database.transaction() as db:
            db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows)

    def _get(self, name: str) -> Any:
        rows = self._database.rows("SELECT value FROM meta WHERE name = ?", name)
        return json.loads(rows[0][0]) if rows else None

    # --- status.json --------------------------------------------------------------------------

    def write_status(self, status: dict[str, Any]) -> None:
        """Let `hub status` see this (JSON), with the time and this process. Whole for readers; not worth an fsync."""
        full = {**status, "written_at": self._clock(), "process": os.getpid()}
        write_bytes_atomic(self.folder / "status.json", json.dumps(full).encode(), durable=False)

    def read_status(self) -> dict[str, Any] | None:
        """What a hub wrote last; None if nothing readable is there."""
        try:
            status = json.loads((self.folder / "status.json").read_bytes())
        except (OSError, ValueError):
            return None
        return status if isinstance(status, dict) else None

    def _connect(self) -> Database:
        database = Database(self.folder / "hub.db")
        self._owned.callback(database.close)
        return database
