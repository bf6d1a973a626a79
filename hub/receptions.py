"""Adapter files on their way in: kept by edge, so that an upload goes on after a cut, or a restart of the edge."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from messaging.errors import ProtocolError
from messaging.messages import Upload


@dataclass
class _Reception:
    """A file that grows piece by piece, in order."""

    round: int
    total: int
    sha256: str
    data: bytearray = field(default_factory=bytearray)

    def is_of(self, message: Upload) -> bool:
        return (self.round, self.total, self.sha256) == (message.round, message.total, message.sha256)


class Receptions:
    """At most one file of `most` bytes for each edge, until the round is over. One thread uses it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._by_key: dict[str, _Reception] = {}
        #: rounds below this are over
        self._open_round = 0

    def take(self, key: str, message: Upload) -> tuple[int, bytes | None]:
        """Add a piece: the bytes held now, and the file when it is whole and has its hash.

        A piece that does not begin where the last one ended is left out. Of a round that is over nothing is wanted
        any more: all of the file counts as held. ProtocolError for what cannot be an adapter of this model.
        """
        if message.total > self._most:
            raise ProtocolError(f"an adapter of {message.total} bytes is larger than this model's can be")
        if message.round < self._open_round:
            return message.total, None
        reception = self._by_key.get(key)
        if reception is None or not reception.is_of(message):
            reception = self._by_key[key] = _Reception(message.round, message.total, message.sha256)
        self._append(reception, message)
        if len(reception.data) < reception.total:
            return len(reception.data), None
        data = bytes(reception.data)
        if hashlib.sha256(data).hexdigest() != reception.sha256:
            del self._by_key[key]
            raise ProtocolError("the uploaded adapter is damaged: upload it again")
        return len(data), data

    def _append(self, reception: _Reception, message: Upload) -> None:
        if message.offset != len(reception.data):
            return
        if message.data.dtype != "u8" or message.offset + message.data.nbytes > reception.total:
            raise ProtocolError("a piece of an adapter reaches beyond its end")
        for chunk in message.data.chunks:
            reception.data += chunk

    def round_over(self, round_: int) -> None:
        """Forget every file; `round_` is the first round that is still open."""
        self._open_round = round_
        self._by_key.clear()
