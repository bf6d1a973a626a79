"""Fetch what the hub serves: resumable, checked against its hash, as many pieces under way as fill the link."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from blocks.planes import unpack
from edge.pace import Pace
from messaging.console import Task
from messaging.errors import InputError, ProtocolError
from messaging.messages import AnyMessage, Chunk, Fetch

#: Bytes of one request. What a cut loses is a few of them.
CHUNK_BYTES = 1 << 20
_TRIES = 2
#: The most that an adapter may have: rank 64 on every linear of 70 billion parameters stays below it.
MAX_ADAPTER_BYTES = 4 << 30
#: Adapters that stay on the disk: one in use, and one that another process may just be reading.
_ADAPTERS_KEPT = 2


class Asker(Protocol):
    """Whoever gets questions to the hub and answers back."""

    def submit(self, message: AnyMessage) -> Future[Any]:
        """Ask; the future holds the answer, or the FedseaError in its place."""


@dataclass(frozen=True)
class Resource:
    """Something to fetch, and what is known of it: at most and at least so many bytes, and its hash if known.

    `element`: the bytes of one of its numbers, if it consists of numbers: then it may come packed (`blocks.planes`).
    """

    name: str
    most: int
    least: int = 0
    sha256: str | None = None
    element: int = 0


@dataclass(frozen=True)
class Wanted:
    """A file to make: `prefix`, and the resource behind it."""

    resource: Resource
    path: Path
    prefix: bytes = b""


@dataclass(eq=False)
class _Item:
    """A resource on its way: what is here of it (`done`), what is asked for (`ahead`), its size once it is known."""

    resource: Resource
    out: BinaryIO
    done: int = 0
    ahead: int = 0
    total: int | None = None
    sha256: str = ""
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    #: the file it becomes, if any, and where it begins in it
    wanted: Wanted | None = None

    def __post_init__(self) -> None:
        self.ahead = self.done
        if self.resource.least == self.resource.most:
            self.total = self.resource.most

    @property
    def sound(self) -> bool:
        """Whether all of it is here and has the hash that the hub gives."""
        return self.digest.hexdigest() == self.sha256

    def take(self, data: Sequence[bytes | memoryview]) -> None:
        for piece in data:
            self.out.write(piece)
            self.digest.update(piece)
            self.done += len(piece)


@dataclass(frozen=True, eq=False)
class _Asked:
    """A piece that is under way: of what, from where on, and its bytes (at most, while the total is not known)."""

    item: _Item
    at: int
    size: int
    answer: Future[Any]


def fetch_bytes(asker: Asker, name: str, most: int = MAX_ADAPTER_BYTES, pace: Pace | None = None) -> bytes:
    """A resource of at most so many bytes, in memory. ProtocolError if it does not have its hash, in two tries."""
    resource = Resource(name, most)
    for _ in range(_TRIES):
        out = io.BytesIO()
        item = _Item(resource, out)
        for _ in _finished(asker, iter([item]), pace or Pace(), None):
            if item.sound:
                return out.getvalue()
    raise _wrong_hash(resource)


def fetch_file(
    asker: Asker,
    resource: Resource,
    path: Path,
    prefix: bytes = b"",
    task: Task | None = None,
    pace: Pace | None = None,
) -> None:
    """Make the file `path` of `prefix` and the resource behind it; see `fetch_files`."""
    fetch_files(asker, path.parent, [Wanted(resource, path, prefix)], task, pace)


def fetch_files(
    asker: Asker, folder: Path, wanted: Sequence[Wanted], task: Task | None = None, pace: Pace | None = None
) -> None:
    """Make files, all in one folder, one transfer through. For those that are there already nothing is asked.

    What an interrupted call has left in `NAME.part` is taken up again. A file appears under its name
    complete, verified and on the disk, or not at all. Several processes may fetch into one folder: the second
    waits for the first. ProtocolError if a resource does not have its hash, in two tries.
    """
    pace = pace or Pace()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone_in(folder) as descriptor:
            left = list(wanted)
            for _ in range(_TRIES):
                left = _fetch_missing(asker, left, descriptor, pace, task)
                if not left:
                    return
    except OSError as error:
        raise InputError(
            f"cannot write into {folder}: {error.strerror}: make room, or choose another --state"
        ) from error
    raise _wrong_hash(left[0].resource)


def fetch_adapter(asker: Asker, name: str, folder: Path, task: Task, pace: Pace) -> bytes:
    """A published adapter, by way of a file in `folder` named after its hash; an interrupted fetch goes on.

    The newest two files are kept, for whoever asks again.
    """
    resource = Resource(name, MAX_ADAPTER_BYTES)
    head = _checked(asker.submit(Fetch(name, 0, 0, 0)), resource, 0, 0)
    resource = Resource(name, head.total, head.total, head.sha256, element=4)
    path, task.total = folder / head.sha256, head.total
    for _ in range(_TRIES):
        fetch_file(asker, resource, path, task=task, pace=pace)
        with suppress(FileNotFoundError):
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() == head.sha256:
                _sweep(folder, path)
                return data
            path.unlink()
    raise _wrong_hash(resource)


def _sweep(folder: Path, newest: Path) -> None:
    """Remove older adapters and what is left of interrupted fetches of them."""
    with suppress(OSError):
        newest.touch()
        others = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in others[_ADAPTERS_KEPT:]:
            path.unlink(missing_ok=True)


def _fetch_missing(asker: Asker, wanted: Sequence[Wanted], folder: int, pace: Pace, task: Task | None) -> list[Wanted]:
    """One try; those that came with another hash than the hub gives are returned, and nothing is left of them."""
    wrong = []
    with ExitStack() as opened:
        items = _opened(wanted, opened, task)
        for item in _finished(asker, items, pace, task):
            assert item.wanted is not None
            part = _part(item.wanted.path)
            item.out.flush()
            if item.sound:
                os.fsync(item.out.fileno())
                os.replace(part, item.wanted.path)
                os.fsync(folder)
            else:
                part.unlink()
                wrong.append(item.wanted)
            item.out.close()
    return wrong


def _opened(wanted: Sequence[Wanted], opened: ExitStack, task: Task | None) -> Iterator[_Item]:
    """The files that are not there yet, each opened when its turn comes."""
    for one in wanted:
        if not one.path.exists():
            out = opened.enter_context(_part(one.path).open("a+b"))
            item = _Item(one.resource, out, wanted=one)
            _resume(item, one.prefix)
            if task is not None:
                task.found(item.done)
            yield item


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _resume(item: _Item, prefix: bytes) -> None:
    """Take up what an earlier part holds; one that starts otherwise is emptied."""
    item.out.seek(0)
    if item.out.read(len(prefix)) != prefix:
        item.out.truncate(0)
        item.out.write(prefix)
        return
    while piece := item.out.read(1 << 20):
        item.digest.update(piece)
        item.done += len(piece)
    item.ahead = item.done


def _finished(asker: Asker, items: Iterator[_Item], pace: Pace, task: Task | None) -> Iterator[_Item]:
    """Fetch all items, one piece after the other, and yield each when all of it is here.

    The next pieces, of this item and of those after it, are under way while one is worked on. A resource that
    changes meanwhile does not have the hash of its last piece.
    """
    waiting: deque[_Asked] = deque()
    asking = _questions(asker, items, pace)
    pace.begin()
    while True:
        while pace.more(sum(asked.size for asked in waiting), len(waiting)):
            if (question := next(asking, None)) is None:
                break
            waiting.append(question)
        if not waiting:
            return
        asked = waiting.popleft()
        item, at = asked.item, asked.at
        chunk = _checked(asked.answer, item.resource, at, CHUNK_BYTES)
        pace.arrived(chunk.data.nbytes)
        size = min(CHUNK_BYTES, max(chunk.total - at, 0))
        item.total, item.sha256 = chunk.total, chunk.sha256
        item.take([unpack(chunk.data.chunks, chunk.element, size)] if chunk.element else chunk.data.chunks)
        if task is not None:
            task.advance(size)
        if item.done >= item.total:
            yield item


def _questions(asker: Asker, items: Iterator[_Item], pace: Pace) -> Iterator[_Asked | None]:
    """Ask for the pieces of all items in order; None while the size of an item must be known first."""
    for item in items:
        while True:
            at, element = item.ahead, item.resource.element if pace.slow else 0
            item.ahead += CHUNK_BYTES
            size = CHUNK_BYTES if item.total is None else min(CHUNK_BYTES, max(item.total - at, 0))
            yield _Asked(item, at, size, asker.submit(Fetch(item.resource.name, at, CHUNK_BYTES, element)))
            while item.total is None:
                yield None
            if item.ahead >= item.total:
                break


def _checked(answer: Future[Any], resource: Resource, offset: int, length: int) -> Chunk:
    """The answer, if it is the piece that was asked for. ProtocolError if it is anything else."""
    chunk = answer.result()
    if not isinstance(chunk, Chunk) or chunk.offset != offset or not re.fullmatch("[0-9a-f]{64}", chunk.sha256):
        raise ProtocolError(f"the hub answered something else than the piece of {resource.name} that was asked for")
    if not resource.least <= chunk.total <= resource.most:
        limits = f"{resource.least} to {resource.most}"
        raise ProtocolError(f"the hub's {resource.name} has {chunk.total} bytes, expected are {limits}")
    if resource.sha256 not in (None, chunk.sha256):
        raise ProtocolError(f"the hub's {resource.name} is not what its manifest says: restart the hub")
    size = min(length, max(chunk.total - offset, 0))
    given = chunk.data.shape[0] if len(chunk.data.shape) == 1 and chunk.data.dtype == "u8" else -1
    plain = chunk.element == 0 and given == size
    packed = chunk.element == resource.element != 0 and 0 < given < size
    if not (plain or packed):
        raise ProtocolError(f"the hub sent a piece of {resource.name} that does not have the {size} bytes asked for")
    return chunk


@contextmanager
def _alone_in(folder: Path) -> Iterator[int]:
    """A descriptor of the folder, locked against other fetches into it; freed however the process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _wrong_hash(resource: Resource) -> ProtocolError:
    return ProtocolError(
        f"the hub's {resource.name} does not have the hash that the hub gives for it, in {_TRIES} tries: "
        "did the model's files change while the hub was running? Restart it"
    )
