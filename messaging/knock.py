"""Finding out at once that the hub can be reached again.

A dial into a dead link hears nothing until its packets are sent again, seconds later; and giving up on it early
would keep out those whose round trip is long. So while a dial is under way, fresh ones are tried beside it.
"""

from __future__ import annotations

import errno
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

#: A fresh attempt this often; more seldom the longer it takes: a minute's part of the outage, within limits.
_EVERY_S, _EVERY_MOST_S, _SHARE = 0.5, 5.0, 1 / 600
#: How long an attempt may take: longer than any round trip.
_ATTEMPT_S = 5.0
#: How long to leave a name alone that cannot be resolved.
_NAME_S = 2.0


class Knocker:
    """Opens TCP connections to a port and closes them, in a thread of its own, until one is accepted or `stop`.

    `answered` is called once in that thread, after `accepted` has become true.
    """

    def __init__(self, host: str, port: int, answered: Callable[[], None]) -> None:
        self._where = (host, port)
        self._answered = answered
        self._stop = threading.Event()
        self.accepted = False
        self._selector = selectors.DefaultSelector()
        threading.Thread(target=self._run, name="knock", daemon=True).start()

    def stop(self) -> None:
        """End it; does not wait."""
        self._stop.set()

    def _run(self) -> None:
        try:
            addresses = self._resolve()
            began = time.monotonic()
            while not self._stop.is_set() and not self.accepted:
                for family, address in addresses:
                    self._try(family, address)
                waited = time.monotonic() - began
                self._listen(min(max(_EVERY_S, waited * _SHARE), _EVERY_MOST_S))
        finally:
            self._close(lambda begun: True)
            self._selector.close()
        if self.accepted and not self._stop.is_set():
            self._answered()

    def _resolve(self) -> list[tuple[int, tuple[object, ...]]]:
        """Where to knock: all that the name stands for. It may take time to resolve, or need the link that is down."""
        while not self._stop.is_set():
            with suppress(OSError):
                found = socket.getaddrinfo(*self._where, type=socket.SOCK_STREAM)
                return [(family, address) for family, _, _, _, address in found]
            self._stop.wait(_NAME_S)
        return []

    def _try(self, family: int, address: tuple[object, ...]) -> None:
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError:
            # A name may stand for an address of a family that this machine lacks.
            return
        sock.setblocking(False)
        if sock.connect_ex(address) in (0, errno.EINPROGRESS):
            self._selector.register(sock, selectors.EVENT_WRITE, time.monotonic())
        else:
            sock.close()

    def _listen(self, seconds: float) -> None:
        """Wait for an answer to any attempt; the rest of the time, for the next attempt."""
        until = time.monotonic() + seconds
        while not self._stop.is_set() and (left := until - time.monotonic()) > 0:
            if not self._selector.get_map():
                self._stop.wait(left)
                return
            for key, _ in self._selector.select(min(left, _EVERY_S)):
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    self.accepted = True
                    return
                self._forget(sock)
        self._close(lambda begun: begun < until - _ATTEMPT_S)

    def _close(self, which: Callable[[float], bool]) -> None:
        for key in list(self._selector.get_map().values()):
            if which(key.data):
                assert isinstance(key.fileobj, socket.socket)
                self._forget(key.fileobj)

    def _forget(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        sock.close()
