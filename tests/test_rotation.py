"""Keys are replaced, also when a kill -9 comes in between: nobody is locked out, and no old key goes on."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from edge.membership import settle
from edge.state import EdgeState, Membership
from hub import admin
from messaging.enrol import enrol, lets_in
from messaging.joining import HubAddress, read_join
from messaging.keys import KeyPair
from tests.support.dying import EDGE_POINTS, HUB_POINTS, POINT, dying_edge, dying_hub
from tests.support.pacing import paced
from tests.support.sites import write_notes
from tools.programs import Hub, Programs, free_ports

WAIT_S = 20.0


@pytest.fixture(scope="module")
def hub(module_programs: Programs) -> Hub:
    return module_programs.serve()


def member(programs: Programs, hub: Hub, name: str) -> tuple[EdgeState, KeyPair, HubAddress]:
    """The state of an edge that is enrolled, its key, and where the hub is."""
    state, join = EdgeState(programs.folder / name), read_join(hub.join)
    state.set_membership(Membership(join.hub, enrol(join, state.keys(), name, WAIT_S)))
    return state, state.keys(), join.hub


def names(hub: Hub) -> list[str]:
    return [edge["name"] for edge in admin.edges(hub.state)["edges"]]


def test_a_new_key_has_the_name_of_the_old_one_which_is_good_no_more(programs: Programs, hub: Hub) -> None:
    state, first, address = member(programs, hub, "rotating")
    done = programs.run("edge", "rotate-key", "--state", state.folder)
    assert f"rotating has a new key: {state.keys().public}" in done.out
    assert state.keys() != first
    assert lets_in(address, state.keys(), WAIT_S)
    assert not lets_in(address, first, WAIT_S)
    assert names(hub).count("rotating") == 1


@pytest.mark.parametrize("point", EDGE_POINTS)
def test_an_edge_that_is_killed_keeps_one_good_key(programs: Programs, hub: Hub, point: str) -> None:
    state, first, address = member(programs, hub, f"killed-{point}")
    process = programs.start("edge", "rotate-key", "--state", state.folder, prepare=dying_edge, env={POINT: point})
    assert process.wait().code == -signal.SIGKILL, str(process)
    membership = state.membership()
    assert membership is not None
    settle(state, membership)
    assert lets_in(address, state.keys(), WAIT_S)
    assert lets_in(address, first, WAIT_S) is (state.keys() == first) is (point == "made")
    if point == "made":
        made = state.next_keys()
        programs.run("edge", "rotate-key", "--state", state.folder)
        assert state.keys() == made
        assert not lets_in(address, first, WAIT_S)
    assert state.next_keys() is None
    assert names(hub).count(f"killed-{point}") == 1


@pytest.mark.parametrize("point", HUB_POINTS)
def test_a_hub_that_is_killed_locks_nobody_out(programs: Programs, point: str) -> None:
    where = free_ports()
    hub = programs.serve(*where, prepare=dying_hub, env={POINT: point})
    state, first, address = member(programs, hub, "edge")
    rotating = programs.start("edge", "rotate-key", "--state", state.folder)
    assert hub.process.wait().code == -signal.SIGKILL
    replaced = admin.edges(hub.state)["edges"][0]["key"] != first.public
    assert replaced is (point == "after")
    back = programs.serve(*where)
    if rotating.wait().code == 3:
        # The hub was away for longer than a command waits.
        programs.run("edge", "rotate-key", "--state", state.folder)
    else:
        assert rotating.wait().code == 0, str(rotating)
    assert lets_in(address, state.keys(), WAIT_S)
    assert not lets_in(address, first, WAIT_S)
    assert names(back) == ["edge"]


def test_a_key_is_not_replaced_under_a_run_that_trains(programs: Programs, hub: Hub) -> None:
    state, first, _ = member(programs, hub, "training")
    with state.training():
        done = programs.run("edge", "rotate-key", "--state", state.folder, code=2)
    assert "another `edge join`" in done.err
    assert state.keys() == first


@pytest.mark.slow
def test_the_hub_gets_another_key_and_its_edges_learn_it(programs: Programs, tmp_path: Path) -> None:
    """One trains through it, one learns it in passing, one was away and needs a new join string."""
    where = free_ports()
    hub = programs.serve("--round-steps", 500, "--cohort", 1, "--grace", 60, *where)
    passing, _, old = member(programs, hub, "passing")
    away, _, _ = member(programs, hub, "away")
    notes = write_notes(tmp_path, "clinic", 1, 30)
    training = programs.edge(hub, "training", notes, "--partition", "1:1")
    hub.until(lambda live: live["hub_step"] >= 1, "a step")
    announced = programs.run("hub", "rotate-key", "--state", hub.state, "--json").json["key"]
    generate = ("edge", "generate", "--max-new-tokens", 1, "--noise", 0, "--state")
    state = EdgeState(programs.folder / "training")

    def knows(edge: EdgeState, key: str) -> bool:
        membership = edge.membership()
        return membership is not None and key in (membership.hub.key, membership.next_key)

    training.until(lambda: knows(state, announced), "that it knows the next key")
    programs.run(*generate, passing.folder)
    hub.process.until(lambda: admin.rotate_key(hub.state)["untold"] == ["away"], "that one is missing")
    hub.process.end(signal.SIGTERM)
    back = programs.serve("--round-steps", 500, "--cohort", 1, "--grace", 60, *where)
    assert read_join(back.join).hub.key == announced != old.key
    at = back.status()["stored"]["checkpoint"]["hub_step"]
    back.until(lambda live: live["hub_step"] >= at + 2, "steps with the new key")
    programs.run(*generate, passing.folder)
    began = time.monotonic()
    refused = programs.run(*generate, away.folder, code=4)
    assert time.monotonic() - began < 30, "no wait for a hub that is there"
    assert "ask who runs it for a new join string" in refused.err
    tokens = admin.edges(back.state)["invitations"]
    programs.run("edge", "generate", back.join, *generate[2:], away.folder)
    programs.run(*generate, away.folder)
    assert admin.edges(back.state)["invitations"] == tokens, "an enrolled edge needs no token"
    assert training.running
    done = training.end(signal.SIGINT)
    assert "Traceback" not in done.err + done.out, str(training)


@pytest.mark.slow
def test_a_training_run_goes_on_with_a_new_key(programs: Programs, tmp_path: Path) -> None:
    """What the edge did is booked under the key that it enrolled with: no step is lost or taken twice."""
    where = free_ports()
    options = ("--round-steps", 500, "--cohort", 1, "--grace", 60, *where)
    hub = programs.serve(*options)
    notes = write_notes(tmp_path, "clinic", 1, 30)
    first = programs.edge(hub, "ward", notes, "--partition", "1:1")
    hub.until(lambda live: live["hub_step"] >= 4, "four steps")
    first.kill()
    # The status is written twice a second, and the hub may still be taking the last step.
    killed = hub.status()["live"]["uptime_s"]
    hub.until(lambda live: live["uptime_s"] > killed + 1.5, "a later status")
    at = hub.status()["live"]["hub_step"]
    state = EdgeState(programs.folder / "ward")
    noise, old = state.noise_secret(), state.keys()
    programs.run("edge", "rotate-key", "--state", state.folder)
    assert state.noise_secret() == noise
    assert state.keys() != old
    again = programs.edge(None, "ward", notes, "--partition", "1:1", "--steps", at + 30, prepare=paced)
    hub.until(lambda live: live["hub_step"] >= at + 2, "steps with the new key")
    hub.process.end(signal.SIGTERM)
    back = programs.serve(*options)
    assert again.wait().code == 0, str(again)
    assert json.loads((state.folder / "report.json").read_text())["steps"] == at + 30
    back.until(lambda live: live["hub_step"] == at + 30, "the steps of all runs, each once")
