"""The commands' life cycle and access: stopping, restarting, going on, leaving, dying; tokens, keys, sessions."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import messaging.messages as m
from edge.state import EdgeState
from messaging.edge_transport import EdgeTransport
from messaging.enrol import enrol as enrol_key
from messaging.errors import ErrorCode, Refused
from messaging.framing import decode, encode
from messaging.joining import read_join
from messaging.keys import load_keys, new_keys
from messaging.transport import Channel, Connected, ConnectFailed, FailReason
from tests.support.pacing import paced
from tests.support.pausing import pause_between_steps
from tests.support.sites import write_notes
from tools.programs import Hub, Process, Programs, free_ports

STOP_S = 60.0
ENROL_ONLY = ("--max-new-tokens", 1, "--noise", 0)


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_notes(tmp_path_factory.mktemp("data"), "clinic", 1, 30)


@pytest.fixture(scope="module")
def hub(module_programs: Programs) -> Hub:
    """A hub for the tests of access, which train nothing."""
    return module_programs.serve()


def steps_said(process: Process) -> int:
    """The latest step in an edge's log."""
    return max((int(step) for step in re.findall(r"step (\d+)", process.out)), default=0)


def report(programs: Programs, name: str) -> dict[str, Any]:
    return json.loads((programs.folder / name / "report.json").read_text())


def finish(*processes: Process) -> None:
    for process in processes:
        done = process.wait()
        assert done.code == 0, str(process)
        assert "Traceback" not in done.err + done.out, str(process)


# -- life cycle ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_both_signals_end_a_hub_in_order(programs: Programs, number: signal.Signals, code: int) -> None:
    hub = programs.serve(installed=number == signal.SIGTERM)
    done = hub.process.end(number, STOP_S)
    assert done.code == code, str(hub.process)
    assert "checkpoint written at step 0" in done.out
    assert "Traceback" not in done.err + done.out, str(hub.process)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_both_signals_end_an_edge_that_waits_for_its_cohort(
    programs: Programs, notes: Path, number: signal.Signals, code: int
) -> None:
    hub = programs.serve("--cohort", 2)
    process = programs.edge(hub, "ward", notes, "--partition", "1:1")
    process.until_says("held-out loss")
    time.sleep(0.5)
    done = process.end(number, STOP_S)
    assert done.code == code, str(process)
    assert "interrupted at step 0" in done.out
    assert "Traceback" not in done.err + done.out, str(process)
    hub.until(lambda live: live["cohort_joined"] == 0, "an empty cohort")


def test_second_serve_on_one_state(programs: Programs, hub: Hub) -> None:
    done = programs.run("hub", "serve", "--state", hub.state, "--headless", code=2)
    assert "another" in done.err or "running" in done.err
    assert str(hub.state) in done.err
    assert hub.process.running


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_edges_go_on_by_themselves_when_the_hub_is_back(programs: Programs, notes: Path, how: str) -> None:
    where = free_ports()
    options = ("--cohort", 2, "--round-steps", 5, "--grace", 30, *where)
    hub = programs.serve(*options)
    edges = [
        programs.edge(hub, name, notes, "--partition", partition, "--steps", 30, prepare=paced)
        for name, partition in (("one", "1:1"), ("two", "2:1"))
    ]
    hub.until(lambda live: live["hub_step"] >= 7, "seven steps")
    done = hub.process.end(signal.Signals[how], STOP_S)
    saved = re.search(r"checkpoint written at step (\d+); start `hub serve` with the same --state", done.out)
    assert done.code == (0 if how == "SIGTERM" else -9), str(hub.process)
    assert (saved is not None) == (how == "SIGTERM"), str(hub.process)
    back = programs.serve(*options)
    going_on = re.search(r"going on from the checkpoint at step (\d+), round (\d+)", back.process.out)
    assert going_on is not None, str(back.process)
    assert int(going_on[1]) >= (int(saved[1]) if saved else 5)
    finish(*edges)
    for name in ("one", "two"):
        assert report(programs, name)["steps"] == 30
    status = back.status()["stored"]
    assert status["checkpoint"]["hub_step"] >= 30
    assert status["adapter"]["version"] >= 6
    assert status["epoch"] == 2


def test_ctrl_c_on_an_edge_and_going_on_without_a_join_string(programs: Programs, notes: Path) -> None:
    hub = programs.serve("--round-steps", 50)
    first = programs.edge(hub, "ward", notes, "--partition", "2:1")
    hub.until(lambda live: live["hub_step"] >= 3, "three steps")
    done = first.end(signal.SIGINT, STOP_S)
    assert done.code == 130, str(first)
    interrupted = re.search(r"interrupted at step (\d+); saved in (\S+)", done.out)
    assert interrupted is not None, str(first)
    assert Path(interrupted[2]).exists()
    assert f"edge join --state {programs.folder / 'ward'}" in done.out
    assert "Traceback" not in done.err + done.out, str(first)
    steps = int(interrupted[1])
    hub.until(lambda live: live["cohort_joined"] == 0, "an empty cohort")
    again = programs.edge(None, "ward", notes, "--partition", "2:1", "--steps", steps + 4)
    finish(again)
    assert f"resumed at step {steps}, nothing lost" in again.out
    assert report(programs, "ward")["steps"] == steps + 4
    hub.until(lambda live: live["hub_step"] == steps + 4, "the steps of both runs, each once")


@pytest.mark.slow
def test_a_hub_that_is_killed_does_not_wait_for_who_left_after_its_checkpoint(programs: Programs, notes: Path) -> None:
    """However long it would wait for those who have not."""
    options = ("--cohort", 2, "--round-steps", 500, "--grace", "inf", "--checkpoint-every", 3600, *free_ports())
    hub = programs.serve(*options)
    leaving = programs.edge(hub, "leaving", notes, "--partition", "1:1")
    staying = programs.edge(hub, "staying", notes, "--partition", "1:1")
    hub.until(lambda live: live["hub_step"] >= 3, "three steps")
    # The checkpoint of an orderly stop knows both.
    assert hub.process.end(signal.SIGTERM, STOP_S).code == 0, str(hub.process)
    hub = programs.serve(*options)
    hub.until(lambda live: live["cohort_joined"] == 2, "both edges")
    leaving.until_says("resumed at step")
    assert leaving.end(signal.SIGINT, STOP_S).code == 130, str(leaving)
    hub.until(lambda live: live["cohort_joined"] == 1, "one edge")
    hub.process.kill()
    back = programs.serve(*options)
    assert "waiting for staying to come back" in back.process.out, str(back.process)
    at = back.status()["stored"]["checkpoint"]["hub_step"]
    back.until(lambda live: live["hub_step"] >= at + 3, "steps of who stays")
    assert staying.end(signal.SIGINT, STOP_S).code == 130, str(staying)


def test_edge_with_fewer_steps_finishes_while_another_goes_on(programs: Programs, notes: Path) -> None:
    hub = programs.serve("--cohort", 2, "--rounds", 3, "--round-steps", 4)
    short = programs.edge(hub, "short", notes, "--partition", "1:1", "--steps", 6)
    long = programs.edge(hub, "long", notes, "--partition", "1:1")
    finish(short, long)
    assert report(programs, "short")["steps"] == 6
    assert report(programs, "long")["steps"] == 12
    assert hub.status()["stored"]["adapter"]["version"] == 3


@pytest.mark.slow
def test_killed_edge_holds_the_others_up_for_its_grace_only(programs: Programs, notes: Path) -> None:
    hub = programs.serve("--cohort", 2, "--round-steps", 200, "--grace", 6)
    dying = programs.edge(hub, "dying", notes, "--partition", "1:1")
    other = programs.edge(hub, "other", notes, "--partition", "1:1")
    hub.until(lambda live: live["hub_step"] >= 3, "three steps")
    dying.kill()
    hub.process.until_says("dying is silent: going on without it")
    at = hub.status()["live"]["hub_step"]
    hub.until(lambda live: live["hub_step"] >= at + 3, "steps without it")
    assert other.end(signal.SIGINT, STOP_S).code == 130, str(other)
    assert "other is silent" not in hub.process.out


@pytest.mark.slow
def test_edge_that_was_silent_for_longer_than_its_grace_takes_part_again(programs: Programs, notes: Path) -> None:
    hub = programs.serve("--cohort", 2, "--rounds", 2, "--round-steps", 40, "--grace", 6)
    pausing = programs.edge(hub, "pausing", notes, "--partition", "1:1", "--steps", 50)
    other = programs.edge(hub, "other", notes, "--partition", "1:1", prepare=paced)
    hub.until(lambda live: live["hub_step"] >= 3, "three steps")
    pausing.signal(signal.SIGSTOP)
    hub.process.until_says("pausing is silent: going on without it")
    at = hub.status()["live"]["hub_step"]
    hub.until(lambda live: live["hub_step"] >= at + 3, "steps without it")
    pausing.signal(signal.SIGCONT)
    hub.process.until_says("pausing is back")
    finish(pausing, other)
    assert pausing.out.count("is repeated") <= 2, str(pausing)
    assert "other is silent" not in hub.process.out
    assert report(programs, "other")["steps"] == 80


@pytest.mark.slow
def test_with_a_quorum_nobody_waits_for_an_edge_that_stands_still(programs: Programs, notes: Path) -> None:
    options = ("--cohort", 2, "--rounds", 2, "--round-steps", 40, "--quorum", 1, "--deadline", 0.2, "--recompute")
    hub = programs.serve(*options)
    pausing = programs.edge(hub, "pausing", notes, "--partition", "1:1", prepare=paced)
    other = programs.edge(hub, "other", notes, "--partition", "1:1", prepare=paced)
    hub.until(lambda live: live["hub_step"] >= 3, "three steps")
    pause_between_steps(hub, pausing, lambda live: [live["hub_step"]])
    pausing.signal(signal.SIGCONT)
    finish(pausing, other)
    assert "is silent" not in hub.process.out
    assert "is lost" not in pausing.out
    taken = [report(programs, name)["steps"] for name in ("pausing", "other")]
    assert 1 <= min(taken) <= max(taken) <= 80


@pytest.mark.slow
def test_edge_that_joins_late_takes_part(programs: Programs, notes: Path) -> None:
    hub = programs.serve("--rounds", 4, "--round-steps", 20)
    first = programs.edge(hub, "first", notes, "--partition", "1:1", prepare=paced)
    hub.until(lambda live: live["hub_step"] >= 3, "three steps")
    # However fast the machine is: the first takes no step more until the late one is here.
    first.signal(signal.SIGSTOP)
    late = programs.edge(hub, "late", notes, "--partition", "2:1")
    hub.process.until_says("late joined")
    first.signal(signal.SIGCONT)
    finish(first, late)
    assert report(programs, "first")["steps"] == 80
    assert 0 < report(programs, "late")["steps"] < 80
    last = {name: report(programs, name)["held_out"][-1] for name in ("first", "late")}
    assert last["first"] == pytest.approx(last["late"], abs=1e-4), "both end with the last published adapter"


def test_generation_goes_on_across_a_restart_of_the_hub(programs: Programs) -> None:
    """Greedy, in the middle of a stream: the same tokens as undisturbed, from the replay of the same bytes."""
    import edge
    from tests.support.sites import greedy, whole_model

    options = free_ports()
    hub = programs.serve(*options)
    model = edge.connect(hub.join, state=programs.folder / "edge", noise=0.0)
    restarted = []

    class Restart:
        """Called by generate() after every token, as a streamer is."""

        def __init__(self) -> None:
            self.count = 0

        def put(self, ids: object) -> None:
            self.count += 1
            if self.count in (8, 16):
                hub.process.end(signal.SIGTERM if self.count == 8 else signal.SIGKILL, STOP_S)
                if self.count == 8:
                    restarted.append(programs.serve(*options))
                else:
                    restarted[0].process.kill()
                    restarted.append(programs.serve(*options))

        def end(self) -> None:
            pass

    with model.hub:
        tokens = greedy(model, "Patient:", 24, streamer=Restart())
    assert len(restarted) == 2
    assert tokens == greedy(whole_model(), "Patient:", 24)


# -- access ----------------------------------------------------------------------------------------


def enrol(programs: Programs, state: Path, join: str | None, code: int = 0) -> str:
    """Enrol a state, by the shortest command that does; its stderr."""
    where = [] if join is None else [join]
    return programs.run("edge", "generate", *where, "--state", state, "--name", state.name, *ENROL_ONLY, code=code).err


def test_a_token_serves_so_many_keys_and_enrolled_states_need_none(hub: Hub, programs: Programs) -> None:
    join = programs.run("hub", "invite", "--state", hub.state, "--json").json["join"]
    enrol(programs, programs.folder / "first", join)
    assert "used up" in enrol(programs, programs.folder / "second", join, code=4)
    enrol(programs, programs.folder / "first", join)
    enrol(programs, programs.folder / "first", None)


def test_invite_works_while_the_hub_is_stopped(programs: Programs) -> None:
    where = free_ports()
    hub = programs.serve(*where)
    hub.process.end(signal.SIGTERM)
    done = programs.run("hub", "invite", "--state", hub.state)
    assert "the hub is stopped" in done.out
    again = programs.serve(*where)
    enrol(programs, programs.folder / "edge", done.out.splitlines()[0])
    names = [edge["name"] for edge in programs.run("hub", "edges", "--state", again.state, "--json").json["edges"]]
    assert names == ["edge"]


def test_join_file_is_private_and_status_is_readable(hub: Hub, programs: Programs) -> None:
    assert Path(hub.join[1:]).stat().st_mode & 0o777 == 0o600
    shown = programs.run("hub", "status", "--state", hub.state).out
    assert f"running (process {hub.process.pid})" in shown
    assert programs.run("hub", "status", "--state", hub.state, "--json").json["running"]


def test_revoked_edge_is_shut_out_at_once(programs: Programs, notes: Path) -> None:
    hub = programs.serve()
    training = programs.edge(hub, "ward", notes, "--partition", "1:1")
    hub.until(lambda live: live["hub_step"] >= 1, "a step")
    programs.run("hub", "revoke", "ward", "--state", hub.state)
    done = training.wait()
    assert done.code == 4, str(training)
    assert re.search("revoked|not enrolled", done.err.splitlines()[-1]), done.err
    assert re.search("revoked|not enrolled", enrol(programs, programs.folder / "ward", None, code=4))


# -- raw messages ----------------------------------------------------------------------------------


@contextmanager
def raw_edge(hub: Hub, state: Path | None) -> Iterator[EdgeTransport]:
    """The sockets of an edge, connected; `state` None: with a key that nobody knows."""
    keys = new_keys() if state is None else load_keys(state / "edge.key")
    with closing(EdgeTransport(read_join(hub.join).hub, keys)) as transport:
        yield transport


def link_event(transport: EdgeTransport) -> object:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        transport.poll(0.05)
        for event in transport.link_events():
            return event
    raise AssertionError("nothing became of the connection")


def answers(transport: EdgeTransport, *packets: m.Packet, within_s: float = 10.0, count: int = 1) -> list[m.Packet]:
    for packet in packets:
        assert transport.send(Channel.CTL, encode(packet))
    arrived: list[m.Packet] = []
    deadline = time.monotonic() + within_s
    while len(arrived) < count and time.monotonic() < deadline:
        arrived += [decode(frames, m.TO_EDGE) for _, frames in transport.poll(0.05)]
    return arrived


def hello(p: int = 1, q: int = 1) -> m.Packet:
    versions = {"min_version": m.PROTOCOL_VERSION, "max_version": m.PROTOCOL_VERSION}
    message = m.Hello(
        **versions, software="test", name="raw", train=0, model_hash="", p=p, q=q, lora_rank=0, resume=0, version=-1
    )
    return m.Packet(message, m.Envelope(request=m.UNORDERED_BASE))


@pytest.fixture(scope="module")
def members(hub: Hub, module_programs: Programs) -> list[Path]:
    """The states of two edges that are enrolled."""
    states = [module_programs.folder / name for name in ("own", "other")]
    for state in states:
        enrol(module_programs, state, hub.join)
    assert EdgeState(states[0]).membership() is not None
    return states


def test_a_pong_counts_the_sessions_that_only_generate(hub: Hub, members: list[Path]) -> None:
    ping = m.Packet(m.Ping("idle", 0, 0.0, 0.0, 0.0, 0.0, None), m.Envelope(request=m.UNORDERED_BASE + 1))
    with raw_edge(hub, members[0]) as edge:
        assert link_event(edge) == Connected(Channel.CTL)
        (before,), (welcome,), (after,) = answers(edge, ping), answers(edge, hello()), answers(edge, ping)
    assert isinstance(welcome.message, m.Welcome)
    assert isinstance(before.message, m.Pong)
    assert isinstance(after.message, m.Pong)
    assert (after.message.sessions, after.message.joined) == (before.message.sessions + 1, before.message.joined)


def test_unknown_key_gets_nothing(hub: Hub) -> None:
    with raw_edge(hub, None) as stranger:
        assert link_event(stranger) == ConnectFailed(Channel.CTL, FailReason.NOT_ENROLLED)
        assert not stranger.send(Channel.CTL, encode(hello()))
        assert stranger.poll(0.5) == []


def test_session_of_another_edge_is_refused(hub: Hub, members: list[Path]) -> None:
    with raw_edge(hub, members[0]) as own, raw_edge(hub, members[1]) as other:
        assert link_event(own) == link_event(other) == Connected(Channel.CTL)
        (opened,) = answers(own, hello())
        assert isinstance(opened.message, m.Welcome)
        ping = m.Packet(m.Ping("", 0, 0.0, 0.0, 0.0, 0.0, None), replace(opened.envelope, request=m.UNORDERED_BASE + 1))
        (refused,) = answers(other, ping)
        assert isinstance(refused.message, m.Error)
        assert refused.message.code == ErrorCode.NO_SESSION
        (taken,) = answers(own, ping)
        assert isinstance(taken.message, m.Pong)


def test_old_epoch_and_bad_shapes_are_refused(hub: Hub, members: list[Path]) -> None:
    with raw_edge(hub, members[0]) as own:
        assert link_event(own) == Connected(Channel.CTL)
        (opened,) = answers(own, hello())
        session = replace(opened.envelope, request=m.UNORDERED_BASE + 1)
        ping = m.Ping("", 0, 0.0, 0.0, 0.0, 0.0, None)
        (stale,) = answers(own, m.Packet(ping, replace(session, epoch=session.epoch - 1)))
        assert isinstance(stale.message, m.Error)
        assert stale.message.code == ErrorCode.NO_SESSION
        states = m.Tensor("f32", (1, 2, 3), (bytes(24),))
        (wrong,) = answers(own, m.Packet(m.Infer(1, 0, 0, (), (), states), session))
        assert isinstance(wrong.message, m.Error)
        assert "192" in wrong.message.text
        (unfit,) = answers(own, hello(3, 3))
        assert isinstance(unfit.message, m.Error)
        assert unfit.message.code == ErrorCode.PARTITION


def test_what_happens_at_the_door_is_in_the_audit_log(hub: Hub, programs: Programs) -> None:
    join, mine, other = read_join(hub.join), new_keys(), new_keys()
    enrol_key(join, mine, "audited", 10.0)
    enrol_key(join, other, "nosy", 10.0)
    with closing(EdgeTransport(join.hub, new_keys())) as stranger:
        assert link_event(stranger) == ConnectFailed(Channel.CTL, FailReason.NOT_ENROLLED)
    with closing(EdgeTransport(join.hub, mine)) as own, closing(EdgeTransport(join.hub, other)) as nosy:
        assert link_event(own) == link_event(nosy) == Connected(Channel.CTL)
        (opened,) = answers(own, hello())
        ping = m.Ping("", 0, 0.0, 0.0, 0.0, 0.0, None)
        answers(nosy, m.Packet(ping, replace(opened.envelope, request=m.UNORDERED_BASE + 1)))
        assert nosy.send(Channel.CTL, [b"nonsense"])
        programs.run("hub", "revoke", "audited", "--state", hub.state)
        hub.process.until_says("audited: session closed: its key is revoked")
        (refused,) = answers(own, m.Packet(ping, opened.envelope))
        assert isinstance(refused.message, m.Error)
        assert "revoked at the hub" in refused.message.text
    with pytest.raises(Refused, match="revoked at the hub"):
        enrol_key(join, mine, "audited", 10.0)
    events = programs.run("hub", "audit", "--state", hub.state, "--last", 1000, "--json").json["events"]
    seen = [(event["event"], event.get("name"), event.get("address")) for event in events]
    for expected in (
        ("enrolled", "audited", "127.0.0.1"),
        ("session opened", "audited", "127.0.0.1"),
        ("protocol violation", "nosy", "127.0.0.1"),
        ("revoked", "audited", None),
        ("session closed", "audited", None),
        ("message refused", None, "127.0.0.1"),
        ("enrolment refused", "audited", "127.0.0.1"),
        ("refused at the handshake", None, "127.0.0.1"),
    ):
        assert expected in seen, expected
    violations = [event["reason"] for event in events if event["event"] == "protocol violation"]
    assert any("belongs to another edge" in reason for reason in violations)
    assert any("msgpack" in reason or "header" in reason for reason in violations)
    assert (hub.state / "audit.jsonl").stat().st_mode & 0o777 == 0o600
