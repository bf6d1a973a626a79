"""How long a training edge waits for a hub that is away: without end, unless told otherwise, and Ctrl-C ends it."""

from __future__ import annotations

import signal

import pytest

from tests.support.sites import write_notes
from tools.programs import Hub, Process, Programs

pytestmark = pytest.mark.slow


def alone(programs: Programs, *options: object) -> tuple[Hub, Process]:
    """A hub, and an edge that trains there; then the hub is killed."""
    hub = programs.serve("--cohort", 1)
    data = write_notes(programs.folder, "clinic", 1, 30)
    edge = programs.edge(hub, "ward", data, *options)
    hub.until(lambda live: live["hub_step"] >= 2, "two steps")
    hub.process.kill()
    return hub, edge


def test_an_edge_gives_up_after_the_time_it_was_given(programs: Programs) -> None:
    _, edge = alone(programs, "--give-up", 10)
    done = edge.wait()
    assert done.code == 3
    assert "nothing heard from the hub for 10 s" in done.err
    assert "saved in" in done.out
    assert "Traceback" not in done.err


def test_ctrl_c_ends_the_wait_for_a_hub_at_once(programs: Programs) -> None:
    _, edge = alone(programs)
    edge.until_says("hub silent for")
    # What is done whole holds an interrupt back for 5 s at most.
    done = edge.end(signal.SIGINT, 60)
    assert done.code == 130
    assert "saved in" in done.out
