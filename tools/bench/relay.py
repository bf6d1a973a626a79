"""A TCP relay that counts the bytes that pass: what crosses the socket, not what somebody computed."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from dataclasses import replace

from messaging.joining import JoinString


class Relay:
    """Listens on ports of its own and passes everything on to the hub's."""

    def __init__(self, join: str) -> None:
        ticket = JoinString.parse(join)
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
                threading.Thread(target=self._pass, args=(near, far, "to_hub"), daemon=True).start()
                threading.Thread(target=self._pass, args=(far, near, "to_edge"), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, counter: str) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                with self._lock:
                    setattr(self, counter, getattr(self, counter) + len(data))
                target.sendall(data)
        for sock in (source, target):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
