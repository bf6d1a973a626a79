"""Who may connect: the ZAP handler (ZeroMQ RFC 27) that every CURVE handshake at the hub goes through.

Without a handler libzmq lets any key in, so start it before the hub's sockets bind; they set
ZAP_ENFORCE_DOMAIN, which lets nobody in when there is no handler.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
#: Approvals that are kept for whoever asks.
_MOST_APPROVALS = 8192

#: A list that goes on failing is told about this often.
_TELL_AGAIN_S = 60.0

#: Told of each handshake that was refused, on the gatekeeper's thread: key (Z85), address, why.
Witness = Callable[[str, str, str], None]


class AllowList(Protocol):
    """The keys that are enrolled. Called from the gatekeeper's thread."""

    def name_of(self, key: str) -> str | None:
        """The name that `key` (Z85) is enrolled under; None if it is not, or was revoked."""


@dataclass(frozen=True, slots=True)
class Approval:
    """A key (Z85) of the allow-list passed a handshake, coming from an IP address, at `time.monotonic()`."""

    key: str
    address: str
    at: float


class Gatekeeper:
    """A thread that answers ZAP requests of one context. Bound when the constructor returns.

    On sockets of the domain "edge" only keys of the allow-list pass, on those of "enrol" every CURVE key.
    A connection's `User-Id` is its public key in Z85. Once the thread has ended, for whatever reason, nobody
    new gets in.
    """

    def __init__(self, context: Context, allowed: AllowList, witness: Witness | None = None) -> None:
        self._allowed = allowed
        self._witness = witness
        self._failures = 0
        #: what the allow-list or the witness raised last, and what the thread died of
        self.last_failure: Exception | None = None
        self.died_of: Exception | None = None
        self._last_beat = time.monotonic()
        self._stopping = False
        self._approvals: deque[Approval] = deque(maxlen=_MOST_APPROVALS)
        self._waker = Waker()
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        try:
            self._socket.bind(_ADDRESS)
        except zmq.ZMQError:
            self._socket.close()
            self._waker.close()
            raise
        self._thread = threading.Thread(target=self._run, name="gatekeeper", daemon=True)
        self._thread.start()

    @property
    def failures(self) -> int:
        """How often the allow-list, or the witness, raised an exception."""
        return self._failures

    def alive(self) -> bool:
        """Whether handshakes are being answered. If not, nobody new gets in: say so, and start another."""
        return not self.ended() and time.monotonic() - self._last_beat < _SILENT_S

    def ended(self) -> bool:
        """Whether its thread is no more, and its place free for another."""
        return not self._thread.is_alive()

    def approvals(self) -> list[Approval]:
        """Who was let in as an edge since the last call, oldest first. For one caller."""
        return [self._approvals.popleft() for _ in range(len(self._approvals))]

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
        except Exception as error:  # whoever watches says it on the screen, and starts another
            self.died_of = error
        finally:
            # Closing alone would free the address some time later, and keep a successor from it.
            with contextlib.suppress(zmq.ZMQError):
                self._socket.unbind(_ADDRESS)
            self._socket.close()

    def _answer_one(self) -> None:
        frames = self._socket.recv_multipart()
        # [peer, empty, version, request id, domain, address, routing id, mechanism, credentials...]
        if len(frames) < 8 or frames[2] != _VERSION:
            return
        peer, empty, version, request_id, domain, address, _, mechanism, *credentials = frames
        status, text, user = self.judge(domain, mechanism, credentials)
        if status == b"200" and domain == EDGE_DOMAIN.encode():
            self._approvals.append(Approval(user, address.decode(errors="replace"), time.monotonic()))
        if status != b"200":
            self._tell(credentials, address, text)
        self._socket.send_multipart([peer, empty, version, request_id, status, text, user.encode(), b""])

    def _tell(self, credentials: Sequence[bytes], address: bytes, why: bytes) -> None:
        """Let the witness know; one that fails keeps nobody from an answer."""
        key = z85.encode(credentials[0]).decode() if credentials and len(credentials[0]) == 32 else ""
        try:
            if self._witness is not None:
                self._witness(key, address.decode("ascii", "replace"), why.decode())
        except Exception as error:
            self._failures += 1
            self.last_failure = error

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
        except Exception as error:  # whatever the list raises, the next edge must still get its answer
            self._failures += 1
            self.last_failure = error
            return b"500", b"try again later", ""
        return (b"200", b"OK", key) if name is not None else (b"400", b"not enrolled", "")


class Gate:
    """A gatekeeper that is replaced when it dies. One thread owns it, and calls `check` about every second."""

    def __init__(self, context: Context, allowed: AllowList, witness: Witness | None = None) -> None:
        self._context = context
        self._allowed = allowed
        self._witness = witness
        self._keeper = Gatekeeper(context, allowed, witness)
        self._shut = False
        self._told_failures = 0
        self._tell_at = 0.0

    def check(self) -> str | None:
        """What there is to tell on the screen: that nobody gets in, that edges get in again; None for nothing new."""
        if self._keeper.alive():
            if self._shut:
                self._shut = False
                return "handshakes are answered again: enrolled edges get in"
            return self._failures()
        why = "its thread died" if self._keeper.ended() else f"it has not answered for {_SILENT_S:g} s"
        if self._keeper.died_of is not None:
            why = f"{why} of {self._keeper.died_of!r}"
        replaced = self._keeper.ended() and self._replace()
        if replaced:
            self._shut = False
            return f"ALARM: the gatekeeper failed ({why}); nobody got in meanwhile, and another one is at work now"
        if self._shut:
            return None
        self._shut = True
        return f"ALARM: the gatekeeper failed ({why}): nobody new gets in until it is back"

    def approvals(self) -> list[Approval]:
        """Who was let in as an edge since the last call, oldest first. For one caller."""
        return self._keeper.approvals()

    def stop(self) -> None:
        """End it; from now on nobody new gets in."""
        self._keeper.stop()

    def _replace(self) -> bool:
        """Put another gatekeeper in the place of one that has ended; False if the place is not free yet."""
        try:
            successor = Gatekeeper(self._context, self._allowed, self._witness)
        except zmq.ZMQError:
            return False
        self._keeper.stop()
        self._keeper = successor
        self._told_failures = 0
        return True

    def _failures(self) -> str | None:
        failures, now = self._keeper.failures, time.monotonic()
        if failures == self._told_failures or now < self._tell_at:
            return None
        more, self._told_failures, self._tell_at = failures - self._told_failures, failures, now + _TELL_AGAIN_S
        return f"ALARM: the allow-list failed {more} times ({self._keeper.last_failure!r}); those edges try again"
