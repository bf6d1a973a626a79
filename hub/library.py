"""What the hub serves to edges that have no copy of the model: its manifest, files, tensors, and adapters.

    manifest        file/NAME        tensor/NAME        adapter/VERSION        adapter/VERSION/P:Q

The last is the part of an adapter that belongs to the layers of an edge with that partition.
A name off the wire is looked up in a table and never used as a path. Any number of threads may read.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from blocks.adapters import layer_of
from blocks.manifest import make_manifest, model_hash, parse_manifest
from blocks.partition import Partition
from blocks.source import ModelFiles, RawSource
from blocks.surgery import LayerNames, build_whole
from blocks.weights import TensorInfo
from hub.parts import Part
from messaging.errors import ErrorCode, HubError, InputError

_PIECE = 4 << 20
_ADAPTER = re.compile(r"(adapter/(0|[1-9][0-9]{0,14}))(?:/([1-9][0-9]{0,3}):(0|[1-9][0-9]{0,3}))?")
#: Parts of adapters whose header and hash are kept.
_PARTS_KEPT = 16


class StoredAdapter(Protocol):
    """A published adapter on disk (see `hub.store.published.PublishedAdapter`)."""

    @property
    def path(self) -> Path:
        """Its file."""

    @property
    def sha256(self) -> str:
        """The file's hash."""

    @property
    def bytes(self) -> int:
        """The file's size."""


class Resource(Protocol):
    """Something that is served, piece by piece."""

    @property
    def total(self) -> int:
        """Its size in bytes."""

    @property
    def sha256(self) -> str:
        """The hash of all of it. The first call may take as long as reading it does."""

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on, fewer only at the end. HubError if it cannot be read any more."""


class Library:
    """Everything served, by name."""

    def __init__(self, files: ModelFiles, adapter: Callable[[int], StoredAdapter | None], initial: bytes) -> None:
        """`adapter` finds a published adapter by its version; `initial` is version 0, as safetensors."""
        self.manifest = make_manifest(files)
        self.hash = model_hash(self.manifest)
        self._adapter = adapter
        self._config = files.config
        self._names: LayerNames | None = None
        self._parts: dict[str, Part] = {}
        self._parts_lock = threading.Lock()
        parts = parse_manifest(self.manifest)
        self._table: dict[str, Resource] = {"manifest": _Memory(self.manifest), "adapter/0": _Memory(initial)}
        for name, file in parts.files.items():
            self._table[f"file/{name}"] = _File(files.files[name], file.size, file.sha256)
        for name, tensor in parts.tensors.items():
            self._table[f"tensor/{name}"] = _Tensor(files.source, tensor.info)

    def open(self, resource: str) -> Resource:
        """What stands under this name. HubError NO_RESOURCE if nothing does."""
        found = self._table.get(resource)
        adapter = _ADAPTER.fullmatch(resource)
        if found is None and adapter is not None:
            found = self._open_adapter(adapter[1], int(adapter[2]))
            if found is not None and adapter[3] is not None:
                found = self._part(resource, found, Partition(int(adapter[3]), int(adapter[4])))
        if found is None:
            raise HubError(ErrorCode.NO_RESOURCE, f"this hub serves nothing named {resource[:120]!r}")
        return found

    def _open_adapter(self, name: str, version: int) -> Resource | None:
        if name in self._table:
            return self._table[name]
        stored = self._adapter(version)
        return None if stored is None else _File(stored.path, stored.bytes, stored.sha256)

    def _part(self, name: str, whole: Resource, partition: Partition) -> Resource | None:
        """The tensors that an edge of this partition hosts; None where no edge can have it."""
        layers = self.layers
        try:
            partition.check(layers.count)
        except InputError:
            return None
        with self._parts_lock:
            part = self._parts.pop(name, None)
            if part is None or part.whole_sha256 != whole.sha256:
                first, last = partition.p, partition.leave(layers.count)
                part = Part(whole, lambda tensor: not first <= layer_of(tensor, layers) < last)
            self._parts[name] = part
            while len(self._parts) > _PARTS_KEPT:
                del self._parts[next(iter(self._parts))]
            return part

    @property
    def layers(self) -> LayerNames:
        """Where the model's layers stand."""
        if self._names is None:
            self._names = build_whole(self._config, torch.float32)[1]
        return self._names


class _Memory:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.total = len(data)
        self.sha256 = hashlib.sha256(data).hexdigest()

    def read(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]


@dataclass(frozen=True)
class _File:
    path: Path
    total: int
    sha256: str

    def read(self, offset: int, length: int) -> bytes:
        with _readable(self.path.name), self.path.open("rb") as file:
            file.seek(min(offset, self.total))
            return file.read(min(length, max(self.total - offset, 0)))


@dataclass
class _Tensor:
    source: RawSource
    info: TensorInfo
    _sha256: str | None = None
    _hashing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def total(self) -> int:
        return self.info.nbytes

    @property
    def sha256(self) -> str:
        with self._hashing:
            if self._sha256 is None:
                digest = hashlib.sha256()
                for offset in range(0, self.total, _PIECE):
                    digest.update(self.read(offset, _PIECE))
                self._sha256 = digest.hexdigest()
            return self._sha256

    def read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(max(min(length, self.total - offset), 0))
        with _readable(self.info.name):
            self.source.read_bytes(self.info.name, min(offset, self.total), memoryview(buffer))
        return bytes(buffer)


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """A file that went away or was cut under the hub: the edge is told, and nothing of the hub's paths with it."""
    try:
        yield
    except (OSError, InputError) as error:
        text = f"the hub cannot read {what[:120]} any more: ask whoever runs it"
        raise HubError(ErrorCode.NO_RESOURCE, text) from error
