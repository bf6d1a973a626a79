"""A TCP relay that counts the bytes that pass: what crosses the socket, not what somebody computed.

It can hold what passes, as a longer link does.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace

from messaging.joining import JoinString


class Relay:
    """Listens on ports of its own and passes everything on to the hub's, each way half of `round_trip_s` later."""

    def __init__(self, join: str, round_trip_s: float = 0.0) -> None:
        ticket = JoinString.parse(join)
        self._delay_s = round_trip_s / 2
        self._lock = threading.Lock()
        self.to_hub = 0
        self.to_edge = 0
        self._listeners: list[socket.socket] = []
        hub = ticket.hub
        ports = [self._listen(hub.host, port) for port in (hub.ctl, hub.bulk, hub.enrol)]
        here = replace(hub, host="127.0.0.1", ctl=ports[0], bulk=ports[1], enrol=ports[2])
        #: the join string of the hub behind this relay
        self.join = JoinString(here, ticket.token).encode()

    @property
    def counts(self) -> tuple[int, int]:
        """Bytes to the hub and to the edge so far."""
        with self._lock:
            return self.to_hub, self.to_edge

    def close(self) -> None:
        """Take no more connections."""
        for listener in self._listeners:
            listener.close()

    def _listen(self, host: str, port: int) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        self._listeners.append(listener)
        threading.Thread(target=self._accept, args=(listener, host, port), daemon=True).start()
        return int(listener.getsockname()[1])

    def _accept(self, listener: socket.socket, host: str, port: int) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection((host, port))
                for sock in (near, far):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for way in ((near, far, "to_hub"), (far, near, "to_edge")):
                    target = self._pass_later if self._delay_s else self._pass
                    threading.Thread(target=target, args=way, daemon=True).start()

    def _count(self, counter: str, data: bytes) -> None:
        with self._lock:
            setattr(self, counter, getattr(self, counter) + len(data))

    def _pass(self, source: socket.socket, target: socket.socket, counter: str) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._count(counter, data)
                target.sendall(data)
        _end(source, target)

    def _pass_later(self, source: socket.socket, target: socket.socket, counter: str) -> None:
        """Reads at once and writes when the delay is over: what comes in a row is not held one after the other."""
        held: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._write, args=(held, source, target), daemon=True).start()
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._count(counter, data)
                held.put((time.monotonic() + self._delay_s, data))
        held.put((time.monotonic() + self._delay_s, b""))

    def _write(
        self, held: queue.SimpleQueue[tuple[float, bytes]], source: socket.socket, target: socket.socket
    ) -> None:
        with suppress(OSError):
            while (item := held.get())[1]:
                time.sleep(max(item[0] - time.monotonic(), 0.0))
                target.sendall(item[1])
        _end(source, target)


def _end(*sockets: socket.socket) -> None:
    for sock in sockets:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
