"""The parts of the drafting bench that can be wrong by themselves: the link's delay, and what counts as a quotation."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from messaging.joining import HubAddress, JoinString
from tools.bench import drafting
from tools.bench.groups import GROUPS
from tools.bench.relay import Relay
from tools.table import Row, Skipped

KEY = "0" * 40


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what comes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]


@pytest.mark.parametrize("round_trip_s", [0.0, 0.1])
def test_the_relay_holds_what_passes_for_half_a_round_trip_each_way(echo: int, round_trip_s: float) -> None:
    join = JoinString(HubAddress("127.0.0.1", echo, echo, echo, KEY), b"t" * 16).encode()
    relay = Relay(join, round_trip_s)
    port = JoinString.parse(relay.join).hub.ctl
    with socket.create_connection(("127.0.0.1", port)) as link:
        link.settimeout(10)
        began = time.perf_counter()
        # One after the other: they travel at the same time.
        for _ in range(100):
            link.sendall(b"12345")
            time.sleep(0.001)
        assert link.makefile("rb").read(500) == b"12345" * 100
        seconds = time.perf_counter() - began
        link.shutdown(socket.SHUT_WR)
        assert link.recv(1) == b""
    relay.close()
    # Each on its own way would take 100 round trips.
    assert round_trip_s + 0.1 <= seconds < 50 * round_trip_s or not round_trip_s
    assert relay.counts == (500, 500)


@pytest.mark.parametrize(
    ("prompt", "tokens", "share"),
    [
        ([1, 2, 3, 4, 5, 6], [2, 3, 4, 5], 1.0),
        ([1, 2, 3, 4, 5, 6], [9, 2, 3, 4, 5, 9, 9, 9], 0.5),
        ([1, 2, 3, 4, 5, 6], [2, 3, 4, 9, 2, 3, 4], 0.0),
        ([1, 2], [1, 2], 0.0),
        ([1, 2, 3, 4], [], 0.0),
    ],
)
def test_what_quotes(prompt: list[int], tokens: list[int], share: float) -> None:
    assert drafting._quoted(prompt, tokens) == share


def result(new: int, trips: int, quoted: float) -> dict[str, object]:
    return {"new": new, "round_trips": trips, "seconds": new / 10, "quoted": quoted}


def test_the_rows_tell_quoting_summaries_from_all() -> None:
    results = {
        "off": [result(20, 20, 0.6), result(30, 30, 0.1)],
        "auto": [result(20, 5, 0.6), result(30, 25, 0.1)],
        "alone": [result(20, 16, 0.6), result(30, 30, 0.1)],
    }
    rows = drafting._rows(results, 0.8, 1.3)
    figures = {row.row: row.figure for row in rows if isinstance(row, Row)}
    assert figures[drafting.QUOTED] == 4.0
    assert figures[drafting.QUOTED_ALONE] == 1.25
    assert figures[drafting.ALL] == pytest.approx(50 / 30, abs=1e-3)
    assert figures[drafting.WORST] == 1.0
    assert {row.row for row in rows} | {drafting.NEAR_LARGE} == set(GROUPS["drafting"][1])
    none = {how: [{**each, "quoted": 0.0} for each in some] for how, some in results.items()}
    assert any(isinstance(row, Skipped) and row.row == drafting.QUOTED for row in drafting._rows(none, 0.8, 1.3))
