"""One tree of named errors. Each says what to do, and the code a command exits with."""

from __future__ import annotations

from enum import IntEnum


class FedseaError(Exception):
    """Root of every error that FedSEA raises on purpose; the text tells the user what to do."""

    exit_code = 1


class InputError(FedseaError):
    """Bad usage or bad input: a file, an option, a partition."""

    exit_code = 2


class HubUnreachable(FedseaError):
    """The hub did not answer within the time that the user allowed."""

    exit_code = 3


class Refused(FedseaError):
    """The other side understood and said no: wrong key, spent token, other version, other model."""

    exit_code = 4


class NotFinite(FedseaError):
    """A loss or gradient is NaN or infinite; the last good adapter is kept."""

    exit_code = 5


class ProtocolError(FedseaError):
    """What came off the wire breaks the protocol. Nothing of it was used."""

    exit_code = 4


class VersionMismatch(ProtocolError):
    """The other side speaks another version of the protocol; `theirs` and `ours` are the numbers."""

    def __init__(self, theirs: int, ours: int) -> None:
        older = "the other side" if theirs < ours else "this side"
        super().__init__(f"the other side speaks protocol version {theirs}, this one {ours}: update {older}")
        self.theirs = theirs
        self.ours = ours


class KeyFileError(InputError):
    """A file with a secret key cannot be used: not private, not complete, or not a key at all."""


class LinkLost(FedseaError):
    """The transport under a request was closed before the answer came."""

    exit_code = 3


class ErrorCode(IntEnum):
    """Reasons that a hub may give in an `Error` message. The numbers are part of the protocol."""

    PROTOCOL = 1
    VERSION = 2
    NOT_ENROLLED = 3
    TOKEN = 4
    NO_SESSION = 5
    MODEL = 6
    PARTITION = 7
    RANK = 8
    CACHE_MISS = 9
    KV_FULL = 10
    BUSY = 11
    STALE = 12
    GAP = 13
    CREDITS = 14
    NOT_FINITE = 15
    NO_RESOURCE = 16
    TRAINING_OVER = 17
    SHUTDOWN = 18
    COMPUTE = 19
    BEHIND = 20
    FULL = 21
    LATER = 22


#: The detail of a BEHIND that says: no more steps in this round, its adapter is wanted.
ROUND_CLOSES = 1


class HubError(FedseaError):
    """The hub answered a request with an `Error` message.

    `code` says why; `detail` is one integer whose meaning depends on the code (for CACHE_MISS the
    number of positions that the hub still holds, for BEHIND perhaps ROUND_CLOSES).
    """

    def __init__(self, code: ErrorCode, text: str, detail: int = 0) -> None:
        super().__init__(text)
        self.code = code
        self.detail = detail
        self.exit_code = _EXIT_CODES.get(code, 4)


class ForeignSession(HubError):
    """A message names a session that belongs to the key of another edge."""

    def __init__(self) -> None:
        super().__init__(ErrorCode.NO_SESSION, "this session belongs to another edge: every edge opens its own")


_EXIT_CODES = {
    ErrorCode.PARTITION: 2,
    ErrorCode.NOT_FINITE: 5,
    ErrorCode.SHUTDOWN: 3,
}
