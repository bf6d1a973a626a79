"""A TCP relay between edge and hub that counts what passes."""

from __future__ import annotations

import selectors
import socket
import threading
from types import TracebackType


class Relay:
    """Passes connections on to one port and counts their bytes, both ways."""

    def __init__(self, target_port: int) -> None:
        self.to_hub = 0
        self.to_edge = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._target_port = target_port
        self._end_near, self._end_far = socket.socketpair()
        self._pairs: dict[socket.socket, tuple[socket.socket, bool]] = {}
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_far.send(b"\0")
        self._thread.join()
        for sock in (self._listener, self._end_near, self._end_far, *self._pairs):
            sock.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._end_near, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._end_near:
                        return
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    elif key.fileobj in self._pairs:
                        # Else both ends had ended, and the first of them took the other with it.
                        self._pass_on(selector, key.fileobj)  # type: ignore[arg-type]

    def _accept(self, selector: selectors.BaseSelector) -> None:
        edge, _ = self._listener.accept()
        hub = socket.create_connection(("127.0.0.1", self._target_port))
        self._pairs |= {edge: (hub, True), hub: (edge, False)}
        for sock in (edge, hub):
            selector.register(sock, selectors.EVENT_READ)

    def _pass_on(self, selector: selectors.BaseSelector, sock: socket.socket) -> None:
        other, from_edge = self._pairs[sock]
        try:
            data = sock.recv(65536)
            if data:
                other.sendall(data)
        except OSError:
            data = b""
        if not data:
            for end in (sock, other):
                selector.unregister(end)
                self._pairs.pop(end)
                end.close()
        elif from_edge:
            self.to_hub += len(data)
        else:
            self.to_edge += len(data)
