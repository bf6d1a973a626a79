"""A hub without room for a request: just now, which nobody notices but by the time it takes, or ever."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.sites import write_notes
from tools.programs import Programs

pytestmark = pytest.mark.slow

_TOLD = "TOLD"
_STEPS = 3


def small() -> None:
    """In the hub's process: the least memory for requests that there may be."""
    import hub.serve
    from hub.credits import LEAST_BYTES, Credits

    hub.serve._credits = lambda: Credits(LEAST_BYTES)


def crowded() -> None:
    """In the hub's process: every second request finds the room taken by others. A file counts them."""
    import hub.serve
    from hub.credits import Account, Credits, Verdict

    class Crowded(Credits):
        asked = 0

        def take(self, account: Account, size: int) -> Verdict:
            self.asked += 1
            others = self.room if self.asked % 2 else 0
            self.hold("others", others)
            verdict = super().take(account, size)
            self.release("others", others)
            if verdict is Verdict.LATER:
                with Path(os.environ[_TOLD]).open("a") as file:
                    file.write("later\n")
            return verdict

    hub.serve._credits = lambda: Crowded(256 << 20)


def test_a_request_larger_than_the_hubs_memory_is_refused_with_what_to_do(programs: Programs) -> None:
    hub = programs.serve("--cohort", 1, prepare=small)
    notes = write_notes(programs.folder, "clinic", 1, 60)
    done = programs.edge(hub, "ward", notes, "--batch", 40, "--seq", 96).wait()
    assert done.code == 4
    assert "Traceback" not in done.err
    (error,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "the hub has 1 MB for all requests in work" in error
    assert "take a smaller batch" in error
    # The hub goes on for those who do.
    small_one = programs.edge(None, "ward", notes, "--steps", 1).wait()
    assert small_one.code == 0, small_one


def test_what_there_is_no_room_for_just_now_is_asked_again_and_nothing_is_lost(programs: Programs) -> None:
    notes = write_notes(programs.folder, "clinic", 1, 30)
    told = programs.folder / "told"
    published = {}
    for name, more in (("calm", {}), ("crowded", {"prepare": crowded, "env": {_TOLD: str(told)}})):
        state = programs.folder / f"hub-{name}"
        hub = programs.serve("--cohort", 1, "--rounds", 1, "--round-steps", _STEPS, state=state, **more)
        done = programs.edge(hub, name, notes).wait()
        assert done.code == 0, done
        hub.process.end(signal.SIGTERM)
        found = load_file(state / "adapters" / "v1.safetensors")
        published[name] = {tensor: value.numpy().tobytes() for tensor, value in found.items()}
    # A forward and a backward of each step at least.
    assert len(told.read_text().splitlines()) >= 2 * _STEPS
    assert published["crowded"] == published["calm"]


def tight() -> None:
    """In the hub's process: room for the step of one of these edges, not of two."""
    import hub.serve
    from hub.credits import Credits

    hub.serve._credits = lambda: Credits(3 << 20)


def test_a_cohort_whose_steps_need_more_than_the_hubs_memory_is_told_so(programs: Programs) -> None:
    """The steps of the others give no room before this one is here, so it would wait for ever."""
    hub = programs.serve("--cohort", 2, prepare=tight)
    notes = write_notes(programs.folder, "clinic", 1, 60)
    edges = [
        programs.edge(hub, name, notes, "--batch", 24, "--seq", 96, "--micro-batches", 1) for name in ("one", "two")
    ]
    edges[0].until(lambda: any(not edge.running for edge in edges), "the end of one of them")
    ended = next(edge for edge in edges if not edge.running)
    done = ended.wait()
    assert done.code == 4, str(ended)
    assert "the steps of its cohort need more together" in done.err
    assert "a smaller --cohort" in done.err
    assert hub.process.running
