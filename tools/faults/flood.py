"""Peers that would fill the hub's memory or its descriptors: rows 7, 13, 14 and 15."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle, pairwise

import zmq

import messaging.messages as m
from messaging.framing import encode
from messaging.joining import HubAddress
from messaging.keys import KeyPair
from messaging.sockets import MAX_WIRE_FRAME
from messaging.transport import Channel
from tools.faults.fault import Fault, Setting
from tools.faults.swarm import Member, Swarm, enrol_all, memory_mb, states
from tools.programs import Hub, Programs
from tools.table import Row, Skipped, at_most, reported

# --- row 7: a reader that does not read ------------------------------------------------------------

_BUDGET = 128 << 20
_STUCK_MB, _STUCK_P99 = "7 stuck reader: the hub's memory grows by (MB)", "7 stuck reader: p99 of the others (ratio)"
_STUCK_CUT = "7 stuck reader: cut off after (s)"


def stuck_reader(setting: Setting) -> Sequence[Row | Skipped]:
    """One of many asks all the time and never reads what it gets."""
    with Programs(setting.folder) as programs:
        hub = programs.serve(prepare=hasty if setting.quick else small_budget)
        names = [f"healthy-{number}" for number in range(setting.count(99, 19))]
        *healthy, greedy = enrol_all(hub, [*names, "greedy"])
        with Swarm(hub, healthy) as swarm:
            swarm.join(30)
            seconds = setting.count(30, 3)
            _ask_in_turn(swarm, seconds)
            base = memory_mb(hub.process.pid)
            before = _p99(swarm, _ask_in_turn(swarm, seconds))
            with _greedy(hub, greedy) as gulp:
                begun = time.monotonic()
                most = base
                cut_at = None

                def each(now: float) -> None:
                    nonlocal most, cut_at
                    gulp()
                    most = max(most, memory_mb(hub.process.pid))
                    if cut_at is None and "greedy was cut off" in hub.process.out:
                        cut_at = now

                after = _p99(swarm, _ask_in_turn(swarm, max(seconds, 5), each))
                while cut_at is None and time.monotonic() < begun + 60:
                    swarm.spend(0.2, each)
    # What the others' requests take is in the base already. Of few answers the slowest hundredth is one or none:
    # a quick run cannot hold it against anything.
    return (
        at_most(_STUCK_MB, most - base, 1.1 * _BUDGET / 1e6),
        reported(_STUCK_P99, after / before) if setting.quick else at_most(_STUCK_P99, after / before, 2),
        at_most(_STUCK_CUT, (cut_at or float("inf")) - begun, setting.limit(20, 40)),
    )


def small_budget() -> None:
    """In the hub's process: a budget that an experiment can exhaust."""
    _set_budget(_BUDGET)


def hasty() -> None:
    """The same, and a stuck reader is cut off sooner."""
    import hub.post

    hub.post._STUCK_S = 3.0
    small_budget()


def ample_budget() -> None:
    """In the hub's process: a budget that one request fits, however much memory this machine has just now."""
    _set_budget(1 << 30)


def _set_budget(budget: int) -> None:
    import hub.serve
    from hub.credits import Credits

    hub.serve._credits = lambda: Credits(budget)


def _ask_in_turn(swarm: Swarm, seconds: float, each: Callable[[float], None] = lambda now: None) -> float:
    """Every member asks 8 KB twice a second or so; the time at which this began."""
    tensor, begun = states(8192), time.monotonic()
    members, asked = cycle(swarm.members), 0
    due = time.monotonic()

    def turn(now: float) -> None:
        nonlocal asked
        while asked < (now - due) * len(swarm.members):
            asked += 1
            member = next(members)
            if not member.asked:
                member.infer(tensor)
        each(now)

    swarm.spend(seconds, turn)
    return begun


def _p99(swarm: Swarm, since: float) -> float:
    took = sorted(seconds for member in swarm.members for at, seconds in member.took if at > since)
    assert took, "the hub answers nobody"
    return took[int(len(took) * 0.99)]


@contextmanager
def _greedy(hub: Hub, keys: KeyPair) -> Iterator[Callable[[], None]]:
    """Asks for computing and for 80 MB of files a second, and never receives."""
    with Swarm(hub, [keys]) as swarm:
        swarm.join(20)
        (ctl,) = swarm.members
        bulk = swarm.add(keys, Channel.BULK, stuck=True)
        bulk.session, bulk.version = ctl.session, ctl.version
        tensor = states(8192)
        due = time.monotonic()

        def gulp() -> None:
            nonlocal due
            if time.monotonic() < due:
                return
            due = time.monotonic() + 0.05
            ctl.ping()
            bulk.infer(tensor)
            for _ in range(4):
                bulk.ask(m.Fetch("tensor/model.embed_tokens.weight", 0, 1 << 20, 0))

        yield gulp


# --- row 13: one frame too large ---------------------------------------------------------------------

_LARGE_MB = "13 frame over the limit: the hub's memory grows by (MB)"
_ANNOUNCED_MB = "13 1.5 GB announced before authentication: the hub's memory grows by (MB)"
_GOES_ON = "13 slowest answer to another edge meanwhile (s)"
_ANNOUNCED = 1_500_000_000
_GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"CURVE".ljust(20, b"\0") + b"\0" + bytes(31)


def large_frames(setting: Setting) -> Sequence[Row | Skipped]:
    """A frame over the limit, from an enrolled key and from nobody."""
    with Programs(setting.folder) as programs:
        hub = programs.serve()
        good, bad = enrol_all(hub, ["good", "bad"])
        with Swarm(hub, [good]) as swarm:
            swarm.join(20)
            _ask_in_turn(swarm, 2)
            begun = time.monotonic()
            base = memory_mb(hub.process.pid)
            times = setting.count(20, 3)
            large = max(_while(swarm, hub, lambda: _too_large(swarm.hub, bad)) for _ in range(times)) - base
            base = memory_mb(hub.process.pid)
            with ExitStack() as open_sockets:
                announced = _while(swarm, hub, lambda: _announce(swarm.hub, open_sockets, times)) - base
            slowest = max(seconds for member in swarm.members for at, seconds in member.took if at > begun)
    return (
        at_most(_LARGE_MB, large, 5),
        at_most(_ANNOUNCED_MB, announced, 5),
        at_most(_GOES_ON, slowest, setting.limit(1, 20)),
    )


def _while(swarm: Swarm, hub: Hub, act: Callable[[], None]) -> float:
    """Do something; the most memory (MB) that the hub has in the second after it, in which others ask."""
    act()
    most = 0.0

    def each(now: float) -> None:
        nonlocal most
        most = max(most, memory_mb(hub.process.pid))

    _ask_in_turn(swarm, 1.0, each)
    each(0)
    return most


def _too_large(hub: HubAddress, keys: KeyPair) -> None:
    with zmq.Context() as context:
        member = Member(context, hub, keys, Channel.BULK, set())
        member.sock.send(bytes(MAX_WIRE_FRAME[Channel.BULK]), copy=False)
        time.sleep(0.3)
        member.close()


def _announce(hub: HubAddress, opened: ExitStack, count: int) -> None:
    """Before any key is proved: the head of a huge frame, and as much of the rest as is taken."""
    for _ in range(count):
        sock = opened.enter_context(socket.create_connection((hub.host, hub.ctl), timeout=30))
        sock.sendall(_GREETING)
        sock.recv(64, socket.MSG_WAITALL)
        sock.settimeout(0.2)
        try:
            sock.sendall(b"\x06" + struct.pack(">Q", _ANNOUNCED))
            for _ in range(32):
                sock.sendall(bytes(1 << 20))
        except OSError:
            continue


# --- row 14: a message without an end -----------------------------------------------------------------

#: Of the 20 GB that are sent. A request to the pocket model may have 403 MB; the rest is what a fast loopback brings in
#: between two looks, which are 0.1 s apart.
_MOST_MB, _MOST_QUICK_MB = 1000, 4000
#: The sender lets the others have their turn so often.
_FRAMES_A_TURN = 100
_KINDS = ("fresh connection", "with a session")
_ROWS_14 = tuple(
    f"14 endless frames, {kind}: {what}"
    for kind in _KINDS
    for what in ("the hub's memory grows by (MB)", "others wait at most (s)", "key revoked (0 or 1)", "given back (MB)")
)


def endless(setting: Setting) -> Sequence[Row | Skipped]:
    """An enrolled key sends frames of one message for ever."""
    rows: list[Row | Skipped] = []
    with Programs(setting.folder) as programs:
        hub = programs.serve(prepare=ample_budget)
        keys = enrol_all(hub, [*(f"good-{number}" for number in range(8)), "fresh", "known"])
        with Swarm(hub, keys[:8]) as swarm:
            swarm.join(20)
            _ask_in_turn(swarm, 2)
            for kind, name, pair in zip(_KINDS, ("fresh", "known"), keys[8:], strict=True):
                rows += _flooded(setting, swarm, hub, kind, name, pair)
    return rows


def _flooded(setting: Setting, swarm: Swarm, hub: Hub, kind: str, name: str, keys: KeyPair) -> list[Row | Skipped]:
    base = most = memory_mb(hub.process.pid)
    begun, revoked = time.monotonic(), f"{name} was cut off and its key revoked"

    def each(now: float) -> None:
        nonlocal most
        most = max(most, memory_mb(hub.process.pid))

    with zmq.Context() as context:
        member = Member(context, swarm.hub, keys, Channel.BULK, set())
        member.sock.setsockopt(zmq.SNDTIMEO, 5000)
        if name == "known":
            member.hello()
            deadline = time.monotonic() + 30
            while not member.session.session:
                assert time.monotonic() < deadline, "the hub gives no session"
                time.sleep(0.05)
                member.receive()
        frame = zmq.Frame(bytes(m.MAX_FRAME_BYTES))
        head = encode(m.Packet(m.Infer(0, 0, 0, (), (), states(8192)), member.session))[0]
        member.sock.send(head, zmq.SNDMORE)
        for number in range(20_000):  # 20 GB, all of them the same megabyte here
            member.sock.send(frame, zmq.SNDMORE, copy=False)
            if number % _FRAMES_A_TURN == 0:
                _ask_in_turn(swarm, 0.01, each)
        member.sock.send(b"")
        deadline = time.monotonic() + 30
        while revoked not in hub.process.out and time.monotonic() < deadline:
            _ask_in_turn(swarm, 0.5, each)
        _ask_in_turn(swarm, 3, each)
        member.close()
    longest, most_mb = _longest_wait(swarm, begun), setting.limit(_MOST_MB, _MOST_QUICK_MB)
    return [
        at_most(f"14 endless frames, {kind}: the hub's memory grows by (MB)", most - base, most_mb),
        at_most(f"14 endless frames, {kind}: others wait at most (s)", longest, setting.limit(5, 30)),
        Row(
            f"14 endless frames, {kind}: key revoked (0 or 1)",
            float(revoked in hub.process.out), "1", revoked in hub.process.out,
        ),
        reported(f"14 endless frames, {kind}: given back (MB)", most - memory_mb(hub.process.pid)),
    ]  # fmt: skip


def _longest_wait(swarm: Swarm, since: float) -> float:
    """The longest time without an answer to any of the members."""
    answered = sorted(at for member in swarm.members for at, _ in member.took if at > since)
    times = [since, *answered, time.monotonic()]
    return max(later - earlier for earlier, later in pairwise(times))


# --- row 15: connections that say nothing -------------------------------------------------------------

_SILENT = "15 silent connections: descriptors back to baseline after (s)"
_HANDSHAKE_S = 5.0


def silent(setting: Setting) -> Sequence[Row | Skipped]:
    """TCP connections that never begin a handshake."""
    with Programs(setting.folder) as programs, ExitStack() as opened:
        hub = programs.serve()
        (keys,) = enrol_all(hub, ["somebody"])
        with Swarm(hub, [keys]) as swarm:
            swarm.join(10)
            base = _descriptors(hub)
            count = setting.count(500, 50)
            for _ in range(count):
                opened.enter_context(socket.create_connection((swarm.hub.host, swarm.hub.ctl), timeout=30))
            begun = time.monotonic()
            most = base
            while time.monotonic() < begun + 40 and (most < base + count or _descriptors(hub) > base):
                most = max(most, _descriptors(hub))
                time.sleep(0.05)
            took = time.monotonic() - begun
            deadline = time.monotonic() + 30
            while not any(at > begun + took for at, _ in swarm.members[0].took):
                assert time.monotonic() < deadline, "the hub does not go on"
                _ask_in_turn(swarm, 0.5)
    return (at_most(_SILENT, took, setting.limit(_HANDSHAKE_S + 3, 30)),)


def _descriptors(hub: Hub) -> int:
    return len(os.listdir(f"/proc/{hub.process.pid}/fd"))


READERS: tuple[Fault, ...] = (
    Fault("7", "one stuck reader among healthy edges", (_STUCK_MB, _STUCK_P99, _STUCK_CUT), stuck_reader),
)
FAULTS: tuple[Fault, ...] = (
    Fault("13", "frames over the limit", (_LARGE_MB, _ANNOUNCED_MB, _GOES_ON), large_frames),
    Fault("14", "endless frames from an enrolled key", _ROWS_14, endless),
    Fault("15", "silent connections", (_SILENT,), silent),
)
