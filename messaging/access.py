"""Who may connect: the ZAP handler (ZeroMQ RFC 27) that every CURVE handshake at the hub goes through.

Without a handler libzmq lets any key in, so start it before the hub's sockets bind; they set
ZAP_ENFORCE_DOMAIN, which lets nobody in when there is no handler.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Protocol

import zmq
from zmq.utils import z85

from messaging.sockets import Context, Waker, milliseconds

#: ZAP domains of the hub's sockets.
EDGE_DOMAIN = "edge"
ENROL_DOMAIN = "enrol"

_ADDRESS = "inproc://zeromq.zap.01"
_VERSION = b"1.0"
#: Seconds between two signs of life of the handler's thread, and how long it may be silent.
_BEAT_S = 1.0
_SILENT_S = 5.0

log = logging.getLogger(__name__)


class AllowList(Protocol):
    """The keys that are enrolled. Called from the gatekeeper's thread."""

    def name_of(self, key: str) -> str | None:
        """The name that `key` (Z85) is enrolled under; None if it is not, or was revoked."""


class Gatekeeper:
    """A thread that answers ZAP requests of one context. Bound when the constructor returns.

    On sockets of the domain "edge" only keys of the allow-list pass, on those of "enrol" every CURVE key.
    A connection's `User-Id` is its public key in Z85.
    """

    def __init__(self, context: Context, allowed: AllowList) -> None:
        self._allowed = allowed
        self._failures = 0
        self._last_beat = time.monotonic()
        self._stopping = False
        self._waker = Waker()
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(_ADDRESS)
        self._thread = threading.Thread(target=self._run, name="gatekeeper", daemon=True)
        self._thread.start()

    @property
    def failures(self) -> int:
        """How often the allow-list raised an exception instead of answering."""
        return self._failures

    def alive(self) -> bool:
        """Whether handshakes are being answered. If not, nobody new gets in: say so, and start another."""
        return self._thread.is_alive() and time.monotonic() - self._last_beat < _SILENT_S

    def stop(self) -> None:
        """End the thread; from now on nobody new gets in."""
        self._stopping = True
        self._waker.wake()
        self._thread.join()
        self._waker.close()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._waker.fileno(), zmq.POLLIN)
        try:
            while not self._stopping:
                self._last_beat = time.monotonic()
                if dict(poller.poll(milliseconds(_BEAT_S))).get(self._socket):
                    self._answer_one()
        except zmq.ContextTerminated:
            pass
        finally:
            self._socket.close()

    def _answer_one(self) -> None:
        frames = self._socket.recv_multipart()
        # [peer, empty, version, request id, domain, address, routing id, mechanism, credentials...]
        if len(frames) < 8 or frames[2] != _VERSION:
            return
        peer, empty, version, request_id, domain, _, _, mechanism, *credentials = frames
        status, text, user = self.judge(domain, mechanism, credentials)
        self._socket.send_multipart([peer, empty, version, request_id, status, text, user.encode(), b""])

    def judge(self, domain: bytes, mechanism: bytes, credentials: Sequence[bytes]) -> tuple[bytes, bytes, str]:
        """ZAP status, its text and the user id for one handshake. Never raises."""
        if mechanism != b"CURVE" or len(credentials) != 1 or len(credentials[0]) != 32:
            return b"400", b"CURVE only", ""
        key = z85.encode(credentials[0]).decode()
        if domain == ENROL_DOMAIN.encode():
            return b"200", b"OK", key
        if domain != EDGE_DOMAIN.encode():
            return b"400", b"no such domain", ""
        try:
            name = self._allowed.name_of(key)
        except Exception:  # whatever the list raises, the next edge must still get its answer
            self._failures += 1
            log.exception("the allow-list failed; the edge with key %s has to try again", key)
            return b"500", b"try again later", ""
        return (b"200", b"OK", key) if name is not None else (b"400", b"not enrolled", "")
