"""Fetch what the hub serves: resumable, checked against its hash, a few pieces under way at a time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from messaging.errors import InputError, ProtocolError
from messaging.messages import AnyMessage, Chunk, Fetch

#: Bytes of one request, and requests under way at once: enough to fill a link, little enough to hold in memory.
CHUNK_BYTES = 4 << 20
IN_FLIGHT = 2
_TRIES = 2
#: The most that an adapter may have: rank 64 on every linear of 70 billion parameters stays below it.
MAX_ADAPTER_BYTES = 4 << 30

#: Called with bytes done, bytes in all, and what is being fetched.
Progress = Callable[[int, int, str], None]


class Asker(Protocol):
    """Whoever gets questions to the hub and answers back."""

    def submit(self, message: AnyMessage) -> Future[Any]:
        """Ask; the future holds the answer, or the FedseaError in its place."""


@dataclass(frozen=True)
class Resource:
    """Something to fetch, and what is known of it: at most and at least so many bytes, and its hash if known."""

    name: str
    most: int
    least: int = 0
    sha256: str | None = None


def fetch_bytes(asker: Asker, name: str, most: int = MAX_ADAPTER_BYTES, progress: Progress | None = None) -> bytes:
    """A resource of at most so many bytes, in memory. ProtocolError if it does not have its hash, in two tries."""
    resource = Resource(name, most)
    for _ in range(_TRIES):
        data = bytearray()
        for chunk in _stream(asker, resource, 0):
            for piece in chunk.data.chunks:
                data += piece
            _report(progress, len(data), chunk, resource)
        if hashlib.sha256(data).hexdigest() == chunk.sha256:
            return bytes(data)
    raise _wrong_hash(resource)


def fetch_file(
    asker: Asker, resource: Resource, path: Path, prefix: bytes = b"", progress: Progress | None = None
) -> None:
    """Make the file `path` of `prefix` and the resource behind it. If it is there already, nothing is asked.

    What an interrupted call has left in `path.part` is taken up again. The file appears under its name
    complete, verified and on the disk, or not at all. Several processes may fetch into one folder: the second
    waits for the first. ProtocolError if the resource does not have its hash, in two tries.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone_in(path.parent) as folder:
            for _ in range(_TRIES):
                if path.exists():
                    return
                if _complete(asker, resource, part, prefix, progress):
                    os.replace(part, path)
                    os.fsync(folder)
                    return
                part.unlink()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}: make room, or choose another --state") from error
    raise _wrong_hash(resource)


def _complete(asker: Asker, resource: Resource, part: Path, prefix: bytes, progress: Progress | None) -> bool:
    """Fetch what the part lacks; whether it then is what the hub says. What was fetched stays when this fails."""
    digest = hashlib.sha256()
    with part.open("a+b") as file:
        done = _resume(file, prefix, digest)
        for chunk in _stream(asker, resource, done):
            for piece in chunk.data.chunks:
                file.write(piece)
                digest.update(piece)
                done += len(piece)
            _report(progress, done, chunk, resource)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest() == chunk.sha256


def _resume(file: BinaryIO, prefix: bytes, digest: hashlib._Hash) -> int:
    """Bytes of the resource in an earlier part, fed to `digest`; a part that starts otherwise is emptied."""
    file.seek(0)
    if file.read(len(prefix)) != prefix:
        file.truncate(0)
        file.write(prefix)
        return 0
    done = 0
    while piece := file.read(1 << 20):
        digest.update(piece)
        done += len(piece)
    return done


def _stream(asker: Asker, resource: Resource, offset: int) -> Iterator[Chunk]:
    """The resource's pieces from `offset` on, at least one; the next are under way while one is worked on.

    A resource that changes meanwhile does not have the hash of its last piece.
    """
    chunk = _checked(_ask(asker, resource, offset), resource, offset)
    waiting: deque[tuple[int, Future[Any]]] = deque()
    ahead = offset + CHUNK_BYTES
    while True:
        while ahead < chunk.total and len(waiting) < IN_FLIGHT:
            waiting.append((ahead, _ask(asker, resource, ahead)))
            ahead += CHUNK_BYTES
        yield chunk
        if not waiting:
            return
        at, answer = waiting.popleft()
        chunk = _checked(answer, resource, at)


def _ask(asker: Asker, resource: Resource, offset: int) -> Future[Any]:
    return asker.submit(Fetch(resource.name, offset, CHUNK_BYTES))


def _checked(answer: Future[Any], resource: Resource, offset: int) -> Chunk:
    """The answer, if it is the piece that was asked for. ProtocolError if it is anything else."""
    chunk = answer.result()
    if not isinstance(chunk, Chunk) or chunk.offset != offset or not re.fullmatch("[0-9a-f]{64}", chunk.sha256):
        raise ProtocolError(f"the hub answered something else than the piece of {resource.name} that was asked for")
    if not resource.least <= chunk.total <= resource.most:
        limits = f"{resource.least} to {resource.most}"
        raise ProtocolError(f"the hub's {resource.name} has {chunk.total} bytes, expected are {limits}")
    if resource.sha256 not in (None, chunk.sha256):
        raise ProtocolError(f"the hub's {resource.name} is not what its manifest says: restart the hub")
    size = min(CHUNK_BYTES, max(chunk.total - offset, 0))
    if chunk.data.dtype != "u8" or chunk.data.shape != (size,):
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


def _report(progress: Progress | None, done: int, chunk: Chunk, resource: Resource) -> None:
    if progress is not None:
        progress(done, chunk.total, resource.name)


def _wrong_hash(resource: Resource) -> ProtocolError:
    return ProtocolError(
        f"the hub's {resource.name} does not have the hash that the hub gives for it, in {_TRIES} tries: "
        "did the model's files change while the hub was running? Restart it"
    )
