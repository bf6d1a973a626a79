"""Many edges at once: rows 17, 18 and 19."""

from __future__ import annotations

import math
import random
import resource
import signal
import socket
import time
from collections.abc import Sequence
from itertools import cycle

import psutil

from messaging.keys import KeyPair
from messaging.liveness import interval_s
from tools.faults.fault import Fault, Setting
from tools.faults.swarm import Swarm, enrol_all, memory_mb, states
from tools.programs import Hub, Programs
from tools.table import Row, Skipped, at_most, reported

#: Descriptors that an edge takes in the process which plays them all.
_DESCRIPTORS = 3

# --- row 17: idle edges ----------------------------------------------------------------------------

#: edges: (joined within s, MB, percent of a core). The hundred are those of a quick run.
_IDLE = {100: (30.0, 40.0, 50.0), 1000: (5.0, 80.0, 3.0), 5000: (20.0, 260.0, 20.0)}


def idle(setting: Setting) -> Sequence[Row | Skipped]:
    """Edges that join, and then say no more than that they live."""
    rows: list[Row | Skipped] = []
    counts = (100,) if setting.quick else (1000, 5000)
    for count in counts:
        with Programs(setting.folder / str(count)) as programs:
            programs.folder.mkdir()
            rows += _idle(programs, count, setting.count(30, 3))
    if setting.quick:
        rows += [Skipped(name, "takes minutes: run `make faults`") for name in _rows_17(1000) + _rows_17(5000)]
    return rows


def _idle(programs: Programs, count: int, seconds: int) -> list[Row | Skipped]:
    joined, joined_mb, share = _rows_17(count)
    if not _enough_descriptors(count):
        return [Skipped(row, f"{count} edges need {_DESCRIPTORS * count} descriptors") for row in _rows_17(count)]
    most_s, most_mb, most_share = _IDLE[count]
    hub = programs.serve(prepare=room_for_all)
    keys = enrol_all(hub, [f"edge-{number}" for number in range(count)])
    base = memory_mb(hub.process.pid)
    with Swarm(hub, keys) as swarm:
        took = swarm.join(120)
        grown = memory_mb(hub.process.pid) - base
        swarm.spend(2)
        process = psutil.Process(hub.process.pid)
        before, begun = process.cpu_times(), time.monotonic()
        _ping_in_turn(swarm, seconds)
        after = process.cpu_times()
        busy = after.user + after.system - before.user - before.system
        percent = 100 * busy / (time.monotonic() - begun)
    return [at_most(joined, took, most_s), at_most(joined_mb, grown, most_mb), at_most(share, percent, most_share)]


def _rows_17(count: int) -> list[str]:
    return [
        f"17 {count} idle edges: {what}"
        for what in ("joined (s)", "the hub's memory grows by (MB)", "of a core at the hub (%)")
    ]


def _ping_in_turn(swarm: Swarm, seconds: float) -> None:
    """Pings as often as edges send them: after 0.75 to 1.0 of the interval."""
    count = len(swarm.members)
    each_s = 0.875 * interval_s(count)
    members, begun, sent = cycle(swarm.members), time.monotonic(), 0

    def turn(now: float) -> None:
        nonlocal sent
        while sent < (now - begun) / each_s * count:
            next(members).ping()
            sent += 1

    swarm.spend(seconds, turn)


# --- rows 18 and 19: traffic, and the hub's restart ----------------------------------------------------

_LOST, _SLOWEST = "18 2 x 8 KB a second from each of many edges: lost", "18 slowest answer (s)"
_RATE = "18 answers a second (share of those asked for)"
_BACK, _LOST_19 = "19 all edges back after a hub restart (s)", "19 hub restart under traffic: lost"
_TURNS_S = 0.5


def traffic(setting: Setting) -> Sequence[Row | Skipped]:
    """Requests from all, all the time; the hub is killed and started again in the middle."""
    count = setting.count(1000, 50)
    if not _enough_descriptors(count):
        reason = f"{count} edges need {_DESCRIPTORS * count} descriptors"
        return [Skipped(row, reason) for row in (_LOST, _SLOWEST, _RATE, _BACK, _LOST_19)]
    with Programs(setting.folder) as programs:
        listen = ("--listen", f"tcp://127.0.0.1:{_free_ports()}")
        hub = programs.serve(*listen, prepare=only_the_link)
        keys = enrol_all(hub, [f"edge-{number}" for number in range(count)])
        with Swarm(hub, keys) as swarm:
            swarm.join(60)
            begun, seconds = time.monotonic(), setting.count(30, 3)
            asked = _traffic(swarm, seconds)
            lost = _settle(swarm)
            took = [(at, wait) for member in swarm.members for at, wait in member.took if at > begun]
            in_time = sum(at < begun + seconds + 1 for at, _ in took)
            slowest = max(wait for _, wait in took)
            back, lost_over = _restart(programs, hub, swarm, listen, setting.count(10, 1), keys)
    return (
        at_most(_LOST, lost, 0),
        at_most(_SLOWEST, slowest, 10),
        reported(_RATE, in_time / asked),
        at_most(_BACK, back, 15),
        at_most(_LOST_19, lost_over, 0),
    )


def _restart(
    programs: Programs, hub: Hub, swarm: Swarm, listen: Sequence[str], seconds: int, keys: Sequence[KeyPair]
) -> tuple[float, float]:
    """Kill the hub under traffic: seconds from its ready line until all edges have a session, and what was lost."""
    _traffic(swarm, seconds)
    epochs = {member.session.epoch for member in swarm.members}
    hub.process.end(signal.SIGKILL)
    programs.serve(*listen, state=hub.state, prepare=only_the_link)
    begun = time.monotonic()

    def all_back() -> bool:
        for member in swarm.members:
            member.again(1.0)
            if not member.asked and member.session.epoch in epochs:
                member.hello()
        return all(member.session.session and member.session.epoch not in epochs for member in swarm.members)

    swarm.run(all_back, 60, "sessions")
    back = time.monotonic() - begun
    return back, _settle(swarm)


def _traffic(swarm: Swarm, seconds: float) -> int:
    """Each member asks 8 KB twice a second, in turn, and repeats what is not answered; how often it was asked."""
    tensor, members, asked = states(8192), cycle(swarm.members), 0
    begun = time.monotonic()

    def turn(now: float) -> None:
        nonlocal asked
        while asked < (now - begun) / _TURNS_S * len(swarm.members):
            next(members).infer(tensor)
            asked += 1

    swarm.spend(seconds, turn)
    return asked


def _settle(swarm: Swarm) -> int:
    """Wait for what is not answered yet, repeating it as edges do; how much never was, or was refused."""
    deadline, repeat_at = time.monotonic() + 30, time.monotonic() + 10
    while any(member.asked for member in swarm.members) and time.monotonic() < deadline:
        if time.monotonic() > repeat_at:
            repeat_at = math.inf
            for member in swarm.members:
                member.again(10.0)
        swarm.turn(0.02)
    return sum(len(member.asked) + len(member.errors) for member in swarm.members)


def room_for_all() -> None:
    """In the hub's process: credits for so many edges, however little memory this machine has just now."""
    import hub.serve
    from hub.credits import Credits

    hub.serve._credits = lambda: Credits(6 << 30)


def only_the_link() -> None:
    """In the hub's process: states come back as they are, since 2,000 computations a second are not what is tested."""
    from hub.engine import Engine

    Engine.infer = lambda self, items, upto: [item.smashed for item in items]  # type: ignore[method-assign, assignment, misc]
    room_for_all()


def _enough_descriptors(count: int) -> bool:
    """Raise this process's limit as far as it goes; the hub raises its own."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most == resource.RLIM_INFINITY or most > _DESCRIPTORS * count + 500


def _free_ports() -> int:
    """The first of three neighbouring ports that nobody has, below those that the kernel gives to those who dial."""
    while True:
        port = random.randrange(20_000, 32_000)
        try:
            for more in range(3):
                socket.create_server(("127.0.0.1", port + more)).close()
        except OSError:
            continue
        return port


FAULTS: tuple[Fault, ...] = (
    Fault("17", "1,000 and 5,000 idle edges", (*_rows_17(1000), *_rows_17(5000)), idle),
    Fault(
        "18",
        "1,000 edges with traffic, over a restart of the hub",
        (_LOST, _SLOWEST, _RATE, _BACK, _LOST_19),
        traffic,
    ),
)
