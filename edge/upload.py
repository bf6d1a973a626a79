"""Send the adapter of A and C to the hub: from where an earlier try ended, several pieces under way at a time."""

from __future__ import annotations

import hashlib
from collections import deque
from concurrent.futures import Future
from typing import Any

from edge.fetch import CHUNK_BYTES, Asker
from edge.pace import Pace
from messaging.console import Task
from messaging.errors import ProtocolError
from messaging.messages import MAX_FRAME_BYTES, Tensor, Upload, UploadAck

#: How often the hub may hold no more after a try than before it.
_TRIES = 3


class Uploading:
    """One adapter file for one round, with the target tokens behind it."""

    def __init__(self, asker: Asker, round_: int, tokens: int, data: bytes) -> None:
        self._asker = asker
        self._round = round_
        self._tokens = tokens
        self._data = data
        self._sha256 = hashlib.sha256(data).hexdigest()
        self._pace = Pace()

    def run(self, task: Task) -> None:
        """Return when the hub has all of it. ProtocolError if it does not take it."""
        here = self._received(self._ask(0, 0))
        task.found(here)
        tries = 0
        while here < len(self._data):
            before, here = here, self._send_from(here, task)
            tries += here <= before
            if tries == _TRIES:
                raise ProtocolError("the hub does not take this edge's adapter: are both of the same version?")

    def _send_from(self, start: int, task: Task) -> int:
        """Send all pieces from `start` on; returns how much the hub holds then, less if it lost some meanwhile."""
        waiting: deque[tuple[int, Future[Any]]] = deque()
        at = here = sent = start
        self._pace.begin()
        while at < len(self._data) or waiting:
            while at < len(self._data) and self._pace.more(at - sent, len(waiting)):
                size = min(CHUNK_BYTES, len(self._data) - at)
                waiting.append((size, self._ask(at, size)))
                at += size
            size, answer = waiting.popleft()
            sent += size
            here = self._received(answer)
            self._pace.arrived(size)
            task.advance(size)
        return here

    def _ask(self, at: int, size: int) -> Future[Any]:
        piece = memoryview(self._data)[at : at + size]
        chunks = tuple(piece[i : i + MAX_FRAME_BYTES] for i in range(0, size, MAX_FRAME_BYTES))
        tensor = Tensor("u8", (size,), chunks)
        return self._asker.submit(Upload(self._round, self._tokens, at, len(self._data), self._sha256, tensor))

    def _received(self, answer: Future[Any]) -> int:
        ack = answer.result()
        if not isinstance(ack, UploadAck) or ack.received > len(self._data):
            raise ProtocolError("the hub answered an upload with something that is no answer to it")
        return ack.received
