"""What takes time on disk: serving pieces of files, taking in uploaded adapters. A thread of its own does it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import messaging.messages as m
from blocks.planes import pack
from hub.desk import Desk
from hub.jobs import EdgeAdapter
from hub.library import Library
from hub.post import error, refusal
from hub.sessions import Session
from messaging.console import Journal
from messaging.errors import ErrorCode, FedseaError

_FAILED = "the hub failed at this; its log says why"


class Filing:
    """Works through fetches and uploads one by one; what to do with the outcome is called on the loop's thread."""

    def __init__(
        self, library: Library, desk: Desk, journal: Journal, in_loop: Callable[[Callable[[], None]], None]
    ) -> None:
        self._library = library
        self._desk = desk
        self._journal = journal
        self._in_loop = in_loop
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="files")

    def fetch(self, message: m.Fetch, done: Callable[[m.AnyMessage], None]) -> None:
        """Read a piece of a resource; `done` gets the Chunk or the Error."""
        self._pool.submit(self._fetch, message, done)

    def upload(
        self, session: Session, message: m.Upload, done: Callable[[m.AnyMessage, EdgeAdapter | None], None]
    ) -> None:
        """Take a piece of an adapter; `done` gets the answer, and the adapter when it is whole and sound."""
        self._pool.submit(self._upload, session, message, done)

    def run(self, work: Callable[[], object]) -> None:
        """Anything else that waits for the disk."""
        self._pool.submit(work)

    def close(self) -> None:
        """Finish what is begun."""
        self._pool.shutdown()

    def _fetch(self, message: m.Fetch, done: Callable[[m.AnyMessage], None]) -> None:
        answer: m.AnyMessage
        try:
            answer = self._chunk(message)
        except FedseaError as fault:
            answer = refusal(fault, ErrorCode.NO_RESOURCE)
        except Exception as fault:  # whatever goes wrong with a file, its asker must not wait for ever
            self._journal.log(f"serving {message.resource} failed: {fault!r}")
            answer = error(ErrorCode.COMPUTE, _FAILED)
        self._in_loop(partial(done, answer))

    def _chunk(self, message: m.Fetch) -> m.Chunk:
        resource, element = self._library.open(message.resource), message.element
        data = resource.read(message.offset, message.length)
        with self._journal.task(f"hashing {message.resource}"):
            sha256 = resource.sha256
        packed = pack(data, element) if element else None
        if packed is None:
            packed, element = data, 0
        tensor = m.Tensor("u8", (len(packed),), _cut(packed))
        return m.Chunk(message.offset, resource.total, sha256, element, tensor)

    def _upload(
        self, session: Session, message: m.Upload, done: Callable[[m.AnyMessage, EdgeAdapter | None], None]
    ) -> None:
        answer: m.AnyMessage
        adapter: EdgeAdapter | None = None
        try:
            received, adapter = self._desk.receive(session, message)
            answer = m.UploadAck(received)
        except FedseaError as fault:
            answer = refusal(fault)
        except Exception as fault:  # as above
            self._journal.log(f"an upload of {session.name} failed: {fault!r}")
            answer = error(ErrorCode.COMPUTE, _FAILED)
        self._in_loop(partial(done, answer, adapter))


def _cut(data: bytes) -> tuple[memoryview, ...]:
    view = memoryview(data)
    return tuple(view[at : at + m.MAX_FRAME_BYTES] for at in range(0, len(view), m.MAX_FRAME_BYTES))
