"""A TCP relay in front of a hub that resets its connections again and again, at places drawn from a seed."""

from __future__ import annotations

import random
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import replace
from types import TracebackType

from messaging.joining import HubAddress

_PIECE = 16 * 1024


class CuttingRelay:
    """`address` is the hub's with this relay's ports. Each connection is reset after some `mean` bytes, both ways
    together; half of the cuts fall in the middle of what was just read. `calm` ends that."""

    def __init__(self, hub: HubAddress, seed: int, mean: int) -> None:
        self._hub = hub
        self._rng = random.Random(seed)
        self._mean = mean
        self._lock = threading.Lock()
        self._ends: list[socket.socket] = []
        #: connections that were reset so far
        self.cuts = 0
        self._calm = threading.Event()
        self._listeners = [self._listen(port) for port in (hub.ctl, hub.bulk, hub.enrol)]
        ports = [int(listener.getsockname()[1]) for listener in self._listeners]
        self.address = replace(hub, host="127.0.0.1", ctl=ports[0], bulk=ports[1], enrol=ports[2])

    def __enter__(self) -> CuttingRelay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sock in (*self._listeners, *self._ends):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def calm(self) -> None:
        """From now on nothing is cut."""
        self._calm.set()

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, args=(listener, port), daemon=True).start()
        return listener

    def _accept(self, listener: socket.socket, port: int) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                self._join(near, port)

    def _join(self, near: socket.socket, port: int) -> None:
        try:
            far = socket.create_connection((self._hub.host, port))
        except OSError:
            near.close()
            return
        ends = (near, far)
        for sock in ends:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._ends += ends
            left = [int(self._rng.expovariate(1 / self._mean))]
        for source, target in (ends, ends[::-1]):
            threading.Thread(target=self._pass, args=(source, target, left), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, left: list[int]) -> None:
        with suppress(OSError):
            while data := source.recv(_PIECE):
                with self._lock:
                    left[0] -= len(data)
                    over = left[0] < 0 and not self._calm.is_set()
                target.sendall(data[: len(data) // 2] if over else data)
                if over:
                    self._cut(source, target)
                    return
        for sock in (source, target):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _cut(self, *ends: socket.socket) -> None:
        """Reset both: what is under way is lost."""
        with self._lock:
            self.cuts += 1
        for sock in ends:
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.shutdown(socket.SHUT_RD)
                sock.close()
