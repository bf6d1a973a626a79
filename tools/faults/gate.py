"""The doorkeeper fails: the allow-list raises exceptions, or the thread that answers handshakes dies.

Rows 11 and 12.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import zmq

from messaging.edge_transport import Connection
from messaging.enrol import enrol, lets_in
from messaging.joining import HubAddress, read_join
from messaging.keys import KeyPair, new_keys
from messaging.transport import Channel, Connected, ConnectFailed
from tools.faults.fault import Fault, Setting
from tools.programs import PATIENCE_S, Hub, Programs
from tools.table import Row, Skipped, at_least, at_most

#: Files by which an experiment tells the hub's process what is to go wrong now.
_FOLDER = "FEDSEA_FAULTS_GATE"
_RAISE, _DIE, _HOLD = "raise", "die", "hold"

_FAILED, _MEANWHILE = "11 allow-list raises: handshakes that it failed", "11 allow-list raises: let in meanwhile"
_NEXT = "11 allow-list raises: the next good edge is in after (s)"
_ALARM, _NOBODY = "12 ZAP thread dead: alarm on the hub's screen after (s)", "12 ZAP thread dead: let in meanwhile"
_BACK = "12 ZAP thread dead: a good edge is in again after (s)"
_UNKNOWN = "12 ZAP thread replaced: unknown keys let in"


def allow_list_raises(setting: Setting) -> Sequence[Row | Skipped]:
    """Row 11."""
    times, told = setting.count(1_000, 50), setting.folder
    with Programs(setting.folder) as programs:
        hub, address, good = _hub(programs, told)
        (told / _RAISE).touch()
        keys = cycle([new_keys(), good])
        let_in, failed = 0, 0
        # A handshake that a busy machine holds up is given up before the allow-list is asked: dial again.
        deadline = time.monotonic() + times + PATIENCE_S
        while failed < times and time.monotonic() < deadline:
            let_in += _dial(address, [next(keys)])
            failed = len((told / _RAISE).read_text())
        (told / _RAISE).unlink()
        took = _in_after(address, good)
        hub.process.until_says("ALARM: the allow-list failed")
    return [
        at_least(_FAILED, failed, times),
        at_most(_MEANWHILE, let_in, 0),
        at_most(_NEXT, took, setting.limit(1.0, 20.0)),
    ]


def thread_dies(setting: Setting) -> Sequence[Row | Skipped]:
    """Row 12. Between the death and the other thread, which is held back for a while, nobody may get in."""
    tries, told = setting.count(20, 3), setting.folder
    with Programs(setting.folder) as programs:
        hub, address, good = _hub(programs, told)
        (told / _HOLD).touch()
        (told / _DIE).touch()
        begun = time.monotonic()
        let_in, deadline = 0, time.monotonic() + PATIENCE_S
        while (told / _DIE).exists() and time.monotonic() < deadline:
            let_in += _dial(address, [good])
        hub.process.until_says("ALARM: the gatekeeper failed")
        alarm = time.monotonic() - begun
        let_in += _dial(address, [good if number % 2 else new_keys() for number in range(tries)])
        (told / _HOLD).unlink()
        took = _in_after(address, good)
        unknown = _dial(address, [new_keys() for _ in range(tries)])
        hub.process.until_says("another one is at work now")
    return [
        at_most(_ALARM, alarm, setting.limit(10.0, 40.0)),
        at_most(_NOBODY, let_in, 0),
        at_most(_BACK, took, setting.limit(10.0, 40.0)),
        at_most(_UNKNOWN, unknown, 0),
    ]


def break_on_demand() -> None:
    """In the hub's process: let the gatekeeper fail as the files of the experiment say."""
    from hub.store.access import AccessList
    from messaging.access import Gate, Gatekeeper

    folder = Path(os.environ[_FOLDER])
    name_of, answer, replaced = AccessList.name_of, Gatekeeper._answer_one, Gate._replace

    def raising(access: AccessList, key: str) -> str | None:
        if (folder / _RAISE).exists():
            with (folder / _RAISE).open("a") as file:
                file.write("x")
            raise OSError("the disk is gone")
        return name_of(access, key)

    def dying(keeper: Gatekeeper) -> None:
        if (folder / _DIE).exists():
            (folder / _DIE).unlink()
            raise RuntimeError("a fault that nobody thought of")
        answer(keeper)

    def held_back(gate: Gate) -> bool:
        return not (folder / _HOLD).exists() and replaced(gate)

    AccessList.name_of = raising  # type: ignore[method-assign, assignment]
    Gatekeeper._answer_one = dying  # type: ignore[method-assign, assignment]
    Gate._replace = held_back  # type: ignore[method-assign, assignment]


def _hub(programs: Programs, told: Path) -> tuple[Hub, HubAddress, KeyPair]:
    """A hub that can be broken, and the keys of an edge that it knows."""
    hub = programs.serve(prepare=break_on_demand, env={_FOLDER: str(told)})
    join, good = read_join(hub.join), new_keys()
    enrol(join, good, "good", PATIENCE_S)
    assert lets_in(join.hub, good, PATIENCE_S)
    return hub, join.hub, good


def _dial(address: HubAddress, keys: Sequence[KeyPair]) -> int:
    """Dial once with each of these keys; how many were let in. One that hears nothing within 1 s counts as out."""
    context, let_in = zmq.Context(), 0
    try:
        for each in keys:
            connection = Connection(context, address, each, Channel.CTL)
            try:
                let_in += _outcome(connection)
            finally:
                connection.close()
    finally:
        context.term()
    return let_in


def _outcome(connection: Connection) -> bool:
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        connection.monitor.poll(100)
        for event in connection.events():
            if isinstance(event, Connected | ConnectFailed):
                return isinstance(event, Connected)
    return False


def _in_after(address: HubAddress, keys: KeyPair) -> float:
    """Seconds until an edge that the hub knows is in."""
    begun = time.monotonic()
    assert lets_in(address, keys, PATIENCE_S), "the hub does not know the edge any more"
    return time.monotonic() - begun


FAULTS = (
    Fault("11", "the allow-list raises exceptions", (_FAILED, _MEANWHILE, _NEXT), allow_list_raises),
    Fault("12", "the ZAP thread dies", (_ALARM, _NOBODY, _BACK, _UNKNOWN), thread_dies),
)
