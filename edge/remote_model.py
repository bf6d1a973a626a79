"""The hub's model, fetched from it as far as it is used, and kept on disk.

    CACHE/<model hash>/manifest.json               what the model consists of
    CACHE/<model hash>/files/NAME                  config and tokenizer, by the names of SMALL_FILES
    CACHE/<model hash>/tensors/<sha256 of NAME>    one safetensors file for each tensor that was read

A second start fetches nothing. No name off the wire becomes a path.
"""

from __future__ import annotations

import hashlib
import json
import struct
import threading
from collections.abc import Iterable
from pathlib import Path

import torch

from blocks.manifest import (
    DTYPE_NAMES,
    MAX_MANIFEST_BYTES,
    Manifest,
    is_hash,
    parse_manifest,
    sample,
)
from blocks.source import ModelFiles, read_config, small_files
from blocks.weights import FileSource, TensorInfo
from edge.fetch import Asker, Resource, Wanted, fetch_file, fetch_files
from edge.pace import Pace
from messaging.console import Journal
from messaging.errors import InputError, ProtocolError


class RemoteModel:
    """The model that a hub serves under this hash. Fetches the manifest at once, all else when it is used."""

    def __init__(
        self, asker: Asker, cache: Path, model_hash: str, journal: Journal | None = None, pace: Pace | None = None
    ) -> None:
        if not is_hash(model_hash):
            raise ProtocolError("the hub describes its model by a hash that is none")
        self._asker = asker
        self._folder = cache / model_hash
        self._journal = journal or Journal()
        self._pace = pace or Pace()
        resource = Resource("manifest", MAX_MANIFEST_BYTES, sha256=model_hash)
        self.manifest = parse_manifest(_fetch_intact(asker, resource, self._folder / "manifest.json", self._pace))

    def open(self) -> ModelFiles:
        """Fetch config and tokenizer; weights come when they are read."""
        folder = self._folder / "files"
        wanted = [
            Wanted(Resource(f"file/{name}", entry.size, entry.size, entry.sha256), folder / name)
            for name, entry in self.manifest.files.items()
        ]
        with self._journal.task("fetching config and tokenizer", sum(item.resource.most for item in wanted)) as task:
            fetch_files(self._asker, folder, wanted, task, self._pace)
        for item in wanted:
            _fetch_intact(self._asker, item.resource, item.path, self._pace)
        source = RemoteSource(self._asker, self.manifest, self._folder / "tensors", self._journal, self._pace)
        name = "the hub's model"
        return ModelFiles(name, folder, read_config(folder, name), source, small_files(folder))


class RemoteSource:
    """The hub's weights: a tensor is fetched when it is first read, and read from disk ever after."""

    def __init__(self, asker: Asker, manifest: Manifest, folder: Path, journal: Journal, pace: Pace) -> None:
        self._asker = asker
        self._manifest = manifest
        self._folder = folder
        self._journal = journal
        self._pace = pace
        self._opened: dict[str, FileSource] = {}
        # One read at a time: a second would only share the link, and double the memory of conversions.
        self._reading = threading.Lock()

    def names(self) -> Iterable[str]:
        """See WeightSource."""
        return self._manifest.tensors.keys()

    def info(self, name: str) -> TensorInfo:
        """See WeightSource. Fetches nothing."""
        return self._manifest.tensors[name].info

    def fetch(self, names: Iterable[str]) -> None:
        """Fetch these tensors ahead of their use, in one transfer: one by one, each would wait for a round trip."""
        wanted = [self._wanted(name) for name in names if name not in self._opened]
        with self._reading, self._journal.task("fetching blocks", sum(item.resource.most for item in wanted)) as task:
            for item in wanted:
                if item.path.exists():
                    task.found(item.resource.most)
            fetch_files(self._asker, self._folder, wanted, task, self._pace)

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """See WeightSource. Any number of threads may read."""
        with self._reading:
            return self._file(name).read(name, dtype)

    def read_bytes(self, name: str, offset: int, buffer: memoryview) -> None:
        """See RawSource."""
        with self._reading:
            self._file(name).read_bytes(name, offset, buffer)

    def _file(self, name: str) -> FileSource:
        if name not in self._opened:
            self._opened[name] = self._cached(name)
        return self._opened[name]

    def _cached(self, name: str) -> FileSource:
        """The tensor's file, fetched if it is not there, or if what is there was damaged."""
        wanted = self._wanted(name)
        for _ in range(2):
            fetch_file(self._asker, wanted.resource, wanted.path, wanted.prefix, pace=self._pace)
            file = self._intact(wanted.path, name)
            if file is not None:
                return file
            wanted.path.unlink(missing_ok=True)
        raise ProtocolError(f"the hub's {wanted.resource.name[:200]} is not the one in its manifest: restart the hub")

    def _wanted(self, name: str) -> Wanted:
        info = self.info(name)
        resource = Resource(f"tensor/{name}", info.nbytes, info.nbytes, element=info.dtype.itemsize)
        return Wanted(resource, self._folder / hashlib.sha256(name.encode()).hexdigest(), _header(info))

    def _intact(self, path: Path, name: str) -> FileSource | None:
        entry = self._manifest.tensors[name]
        try:
            file = FileSource([path])
            same = file.info(name) == entry.info and sample(file, entry.info) == entry.sample
        except (InputError, KeyError):
            return None
        return file if same else None


def _fetch_intact(asker: Asker, resource: Resource, path: Path, pace: Pace) -> bytes:
    """A small file of the cache, fetched again where its hash says that it was damaged."""
    for _ in range(2):
        fetch_file(asker, resource, path, pace=pace)
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == resource.sha256:
            return data
        path.unlink(missing_ok=True)
    raise InputError(f"{path} does not hold what was just written there: check the disk")


def _header(info: TensorInfo) -> bytes:
    """What makes a safetensors file of a tensor's bytes, when it stands before them."""
    entry = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [0, info.nbytes]}
    text = json.dumps({info.name: entry}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
