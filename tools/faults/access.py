"""Who may do what, and how often: replays, old epochs, used tokens; strangers, and edges that are not who they say.

Rows 9 and 10.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

import messaging.messages as m
from edge.state import EdgeState, Membership
from hub import admin
from hub.store.state import HubState
from messaging.edge_transport import EdgeTransport
from messaging.enrol import enrol
from messaging.errors import ErrorCode, Refused
from messaging.framing import decode, encode
from messaging.joining import HubAddress, read_join
from messaging.keys import KeyPair, new_keys, save_keys
from messaging.transport import Channel, Connected
from tools.faults.fault import Fault, Setting
from tools.faults.raw import RawEdge
from tools.pocket.text import private_notes
from tools.programs import PATIENCE_S, Hub, Process, Programs
from tools.table import Row, Skipped, at_most, reported

_STEPS = 3
_WIDTH = 192
_HANDLED = "FEDSEA_FAULTS_HANDLED"

_APPLIED, _DIFFER = "9 steps applied more than once", "9 adapters that differ from those without replays"
_REPLAYS, _EPOCH = "9 replays of each request", "9 old epoch: requests not refused"
_TOKEN = "9 used token: keys enrolled"
_STRANGER = "10 unknown key: messages that reach a handler"
_WRONG_HUB = "10 wrong hub key: messages that reach a handler"
_FOREIGN = "10 another edge's session: messages that reach a handler"
_REVOKED = "10 revoked live key: refused after (s)"
_EXIT = "10 revoked live edge: its command ends after (s)"
_UNNAMED = "10 edges whose message does not name the cause"


# -- 9: replays ------------------------------------------------------------------------------------


def replays(setting: Setting) -> Sequence[Row | Skipped]:
    """Row 9."""
    times = setting.count(100, 20)
    with Programs(setting.folder) as programs:
        plain = programs.serve(state=setting.folder / "plain")
        hub = programs.serve(state=setting.folder / "replayed")
        with RawEdge(plain, "honest") as edge:
            _train(edge, 1)
        with RawEdge(hub, "replaying") as edge:
            _train(edge, times)
            kept = _old_epoch(edge, times)
        for each in (plain, hub):
            each.until(lambda live: live["hub_step"] >= _STEPS, "its steps")
        steps = hub.status()["live"]["hub_step"]
        enrolled = _used_token(hub, setting.count(20, 3))
        for each in (plain, hub):
            each.process.end(signal.SIGTERM)
        differ = _adapter_hash(plain) != _adapter_hash(hub)
    return [
        at_most(_APPLIED, abs(steps - _STEPS), 0),
        at_most(_DIFFER, int(differ), 0),
        at_most(_EPOCH, kept, 0),
        at_most(_TOKEN, enrolled, 0),
        reported(_REPLAYS, times),
    ]


def _train(edge: RawEdge, times: int) -> None:
    """Three training steps; every request of them is sent so many times, and the first ones once more at the end."""
    edge.hello(train=True)
    generator = torch.Generator().manual_seed(9)
    sent: list[m.Packet] = []
    for step in range(_STEPS):
        smashed, gradient = (torch.randn(2, 8, _WIDTH, generator=generator) for _ in range(2))
        for message in (
            m.StepForward(step, 14, (), _tensor(smashed)),
            m.StepBackward(step, _tensor(gradient * 1e-3)),
        ):
            sent.append(m.Packet(message, replace(edge.session, request=len(sent) + 1, ack=0)))
            answers = _replay(edge, sent[-1], times)
            done = {type(answer) for answer in answers if not isinstance(answer, m.Error)}
            assert len(done) == 1, answers[:3]
    if times > 1:
        for packet in sent:
            _replay(edge, packet, times)


def _tensor(values: torch.Tensor) -> m.Tensor:
    return m.Tensor("f32", tuple(values.shape), (values.numpy().tobytes(),))


def _replay(edge: RawEdge, packet: m.Packet, times: int) -> list[m.AnyMessage]:
    """Send the same bytes so many times; every answer to it, of which the hub gives one each."""
    frames, answers, left = encode(packet), list[m.AnyMessage](), times
    deadline = time.monotonic() + PATIENCE_S
    # The answer to the first may come after those that say "in work" to the others.
    while left or len(answers) < times or all(_says(answer, ErrorCode.BUSY) for answer in answers):
        if left and edge.transport.send(Channel.CTL, frames):
            left -= 1
        for _, arrived in edge.transport.poll(0.0 if left else 0.1):
            answer = decode(arrived, m.TO_EDGE)
            if answer.envelope.request == packet.envelope.request:
                answers.append(answer.message)
        assert time.monotonic() < deadline, f"{len(answers)} answers to {times} requests"
    return answers


def _says(message: m.AnyMessage, code: ErrorCode) -> bool:
    return isinstance(message, m.Error) and message.code == code


def _old_epoch(edge: RawEdge, times: int) -> int:
    """Requests of the epoch before; how many of them were not refused."""
    zeros = m.Tensor("f32", (1, 1, _WIDTH), (bytes(4 * _WIDTH),))
    step = m.StepForward(_STEPS, 1, (), zeros)
    old = replace(edge.session, epoch=edge.session.epoch - 1, request=2 * _STEPS + 1)
    answers = _replay(edge, m.Packet(step, old), times)
    return sum(not _says(answer, ErrorCode.NO_SESSION) for answer in answers)


def _used_token(hub: Hub, tries: int) -> int:
    """Keys that get in by a token which has let in the one that it was for."""
    join = read_join(admin.invite(hub.state)["join"])
    enrol(join, new_keys(), "first", PATIENCE_S)
    before = len(admin.edges(hub.state)["edges"])
    for _ in range(tries):
        try:
            enrol(join, new_keys(), "second", PATIENCE_S)
        except Refused:
            continue
    return len(admin.edges(hub.state)["edges"]) - before


def _adapter_hash(hub: Hub) -> str:
    """Of B's adapter in the last checkpoint of a hub that has stopped."""
    with HubState.open(hub.state, exclusive=True) as state:
        point, _ = state.checkpoints.load_latest()
        assert point is not None
        assert point.hub_step == _STEPS, point.hub_step
        digest = hashlib.sha256()
        for name in sorted(point.adapter):
            digest.update(name.encode() + point.adapter[name].numpy().tobytes())
        return digest.hexdigest()


# -- 10: strangers ---------------------------------------------------------------------------------


def strangers(setting: Setting) -> Sequence[Row | Skipped]:
    """Row 10."""
    handled = setting.folder / "handled"
    handled.touch()
    with Programs(setting.folder) as programs:
        hub = programs.serve("--cohort", 2, prepare=note_what_is_handled, env={_HANDLED: str(handled)})
        address = read_join(hub.join).hub
        notes = setting.folder / "notes.txt"
        notes.write_text("\n".join(private_notes("clinic", 0, 20)))
        known = new_keys()
        enrol(read_join(hub.join), known, "known", PATIENCE_S)
        live = programs.edge(hub, "live", notes, "--partition", "1:1")
        tries = setting.count(50, 5)
        unknown = [_knock(address, new_keys()) for _ in range(tries)]
        with RawEdge(hub, "owner") as owner, RawEdge(hub, "intruder") as intruder:
            wrong = [_knock(replace(address, key=new_keys().public), known) for _ in range(tries)]
            foreign, foreign_named = _intrude(owner, intruder, handled, tries)
            revoked = _revoke(hub, owner)
            unnamed = _messages(programs, hub, address, known, live)
        lines = handled.read_text().split()
    return [
        at_most(_STRANGER, sum(lines.count(f"took:{key}") for key in unknown), 0),
        at_most(_WRONG_HUB, sum(lines.count(f"took:{key}") for key in wrong), 0),
        at_most(_FOREIGN, foreign, 0),
        at_most(_REVOKED, revoked, setting.limit(1.0, 20.0)),
        at_most(_EXIT, unnamed[1], setting.limit(5.0, 30.0)),
        at_most(_UNNAMED, unnamed[0] + (not foreign_named), 0),
    ]


def note_what_is_handled() -> None:
    """In the hub's process: write down whose messages get past the allow-list, and which sessions are heard."""
    from hub.seating import Seating
    from hub.server import Server

    path = os.environ[_HANDLED]

    def noting(method: Callable[..., None], says: Callable[..., str]) -> Callable[..., None]:
        def noted(owner: object, *arguments: object) -> None:
            with open(path, "a") as file:
                file.write(says(*arguments) + "\n")
            method(owner, *arguments)

        return noted

    Server._take = noting(Server._take, lambda key, *_: f"took:{key}")  # type: ignore[method-assign]
    Seating.heard = noting(Seating.heard, lambda session: f"heard:{session.number}")  # type: ignore[method-assign]


def _knock(address: HubAddress, keys: KeyPair) -> str:
    """Dial with keys that do not fit, and try to say something all the same; the key."""
    transport = EdgeTransport(address, keys)
    try:
        asked = encode(m.Packet(m.Describe(m.PROTOCOL_VERSION, m.PROTOCOL_VERSION, "stranger"), m.Envelope()))
        deadline, failed = time.monotonic() + PATIENCE_S, False
        while not failed and time.monotonic() < deadline:
            for channel in (Channel.CTL, Channel.BULK):
                transport.send(channel, asked)
            assert not transport.poll(0.02), "the hub answered a stranger"
            events = transport.link_events()
            assert not any(isinstance(event, Connected) for event in events), "a stranger was let in"
            failed = bool(events)
    finally:
        transport.close()
    return keys.public


def _intrude(owner: RawEdge, intruder: RawEdge, handled: Path, tries: int) -> tuple[int, bool]:
    """Use another edge's session: messages that counted as its owner's, and whether the refusals name the cause."""
    owner.hello(train=False)
    mine = f"heard:{owner.session.session}"
    before = handled.read_text().split().count(mine)
    named = True
    for _ in range(tries):
        intruder.session = owner.session
        zeros = m.Tensor("f32", (1, 1, _WIDTH), (bytes(4 * _WIDTH),))
        for message in (m.Infer(1, 0, 0, (), (), zeros), m.Leave(0, "taken over")):
            answer = intruder.ask(message)
            named = named and isinstance(answer, m.Error) and "belongs to another edge" in answer.text
    counted = handled.read_text().split().count(mine) - before
    return counted, named


def _revoke(hub: Hub, edge: RawEdge) -> float:
    """Revoke the key of a connection that is up and talking; seconds until what it says is refused."""
    ping = encode(m.Packet(m.Ping("", 0, 0.0, 0.0, 0.0, 0.0, None), edge.session))
    begun, served = 0.0, 0
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        edge.send(ping)
        for _, frames in edge.transport.poll(0.02):
            if _says(decode(frames, m.TO_EDGE).message, ErrorCode.NOT_ENROLLED):
                return time.monotonic() - begun
            served += 1
        if served and not begun:
            admin.revoke(hub.state, "owner")
            begun = time.monotonic()
        time.sleep(0.02)
    raise TimeoutError("a revoked key is still served")


def _messages(programs: Programs, hub: Hub, address: HubAddress, known: KeyPair, live: Process) -> tuple[int, float]:
    """Real edges that are refused: how many do not say why and end with code 4; and how long the live one takes."""
    hub.until(lambda status: status["cohort_joined"] == 1, "an edge that waits for its cohort")
    admin.revoke(hub.state, "live")
    begun = time.monotonic()
    live.wait()
    took = time.monotonic() - begun
    refused = [
        (_generate(programs, "unknown", address, new_keys()), "does not know this edge's key"),
        (_generate(programs, "wrong-hub", replace(address, key=new_keys().public), known), "has another key than"),
        (live, "revoked"),
    ]
    unnamed = 0
    for process, cause in refused:
        done = process.wait()
        unnamed += done.code != 4 or cause not in done.err.splitlines()[-1]
    return unnamed, took


def _generate(programs: Programs, name: str, address: HubAddress, keys: KeyPair) -> Process:
    """`edge generate` with a state that says it belongs to this hub."""
    state = EdgeState(programs.folder / name)
    save_keys(state.folder / "edge.key", keys)
    state.set_membership(Membership(address, name))
    return programs.start("edge", "generate", "--state", state.folder, "--max-new-tokens", 1)


FAULTS = (
    Fault("9", "a request replayed, an old epoch, a used token", (_APPLIED, _DIFFER, _EPOCH, _TOKEN), replays),
    Fault(
        "10",
        "an unknown key, a wrong hub key, a revoked live key, another edge's session",
        (_STRANGER, _WRONG_HUB, _FOREIGN, _REVOKED, _EXIT, _UNNAMED),
        strangers,
    ),
)
