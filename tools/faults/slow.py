"""A relay that is a slow line: so many bytes a second each way, a round trip, and cuts when they are asked for."""

from __future__ import annotations

import queue
import socket
import threading
import time
from contextlib import suppress

from tools.bench.relay import Relay

_PIECE = 1 << 15


class SlowRelay(Relay):
    """`bytes_per_s` for all that goes one way through it, together; `round_trip_s` on top of what is there already."""

    def __init__(self, join: str, bytes_per_s: float = 1e12, round_trip_s: float = 0.0) -> None:
        self._rate = bytes_per_s
        self._one_way_s = round_trip_s / 2
        self._free_at = {"to_hub": 0.0, "to_edge": 0.0}
        self._pacing = threading.Lock()
        self._open: set[socket.socket] = set()
        self._closed = threading.Event()
        self._made: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        super().__init__(join)

    def close(self) -> None:
        """End everything that passes through, and take no more connections."""
        self._closed.set()
        for listener in self._listeners:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in list(self._threads):
            thread.join(5.0)
        for sock in (*self._made, *self._listeners):
            sock.close()

    def cut(self) -> None:
        """Break every connection; whatever is on its way is lost."""
        for sock in list(self._open):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket, host: str, port: int) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                self._made.append(near)
                far = self._dial(host, port)
                if far is None:
                    near.close()
                    continue
                for sock in (near, far):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._made.append(far)
                for ends in ((near, far, "to_hub"), (far, near, "to_edge")):
                    thread = threading.Thread(target=self._pass, args=ends, daemon=True)
                    self._threads.append(thread)
                    thread.start()

    def _dial(self, host: str, port: int) -> socket.socket | None:
        """The hub's end; while nobody is there, the caller waits as on a line that is dead."""
        while not self._closed.wait(0.05):
            with suppress(OSError):
                return socket.create_connection((host, port))
        return None

    def _pass(self, source: socket.socket, target: socket.socket, counter: str) -> None:
        # What waits here is the line's own length and no more: TCP pushes back on whoever sends faster.
        length = 4 + int(self._rate * self._one_way_s / _PIECE) if self._one_way_s else 4
        line: queue.Queue[tuple[float, bytes]] = queue.Queue(min(length, 1 << 12))
        self._open |= {source, target}
        source.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
        feeder = threading.Thread(target=self._take, args=(source, line, counter), daemon=True)
        feeder.start()
        with suppress(OSError):
            while True:
                at, data = line.get()
                if not data:
                    break
                time.sleep(max(0.0, at - time.monotonic()))
                with self._lock:
                    setattr(self, counter, getattr(self, counter) + len(data))
                target.sendall(data)
        for sock in (source, target):
            self._open.discard(sock)
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        while feeder.is_alive():
            with suppress(queue.Empty):
                line.get(timeout=0.05)

    def _take(self, source: socket.socket, line: queue.Queue[tuple[float, bytes]], counter: str) -> None:
        with suppress(OSError):
            while data := source.recv(_PIECE):
                line.put((self._through(counter, len(data)) + self._one_way_s, data))
        line.put((0.0, b""))

    def _through(self, counter: str, count: int) -> float:
        """When so many bytes more are through the narrow place; waits until then."""
        with self._pacing:
            begin = max(self._free_at[counter], time.monotonic())
            at = self._free_at[counter] = begin + count / self._rate
        time.sleep(max(0.0, at - time.monotonic() - 0.002))
        return at
