"""Two edges in two groups, each with a replica of B; whatever dies, a round publishes the average of both."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from dataclasses import dataclass

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.support.sites import write_notes
from tests.support.stand_in import without_ray
from tools.programs import Hub, Process, Programs, free_ports

NAMES = ("clinic", "lawfirm")
STEPS = 8


@dataclass(frozen=True)
class Alone:
    """What an edge and a hub of its own make of a round: the published adapter, and the target tokens in it."""

    adapter: dict[str, torch.Tensor]
    tokens: int


@pytest.fixture(scope="module")
def alone(module_programs: Programs) -> list[Alone]:
    found = []
    for name in NAMES:
        hub = module_programs.serve(*options(1), state=module_programs.folder / f"hub-{name}")
        process = train(module_programs, hub, name)
        assert process.wait().code == 0, str(process)
        hub.process.kill()
        report = json.loads((module_programs.folder / name / "report.json").read_text())
        found.append(Alone(published(hub), report["target_tokens"]))
    return found


def options(cohort: int, *more: object) -> list[object]:
    return ["--cohort", cohort, "--rounds", 1, "--round-steps", STEPS, "--lr", 5e-3, *more]


def train(programs: Programs, hub: Hub, name: str) -> Process:
    return programs.edge(hub, name, write_notes(programs.folder, name, 1, 12))


def published(hub: Hub) -> dict[str, torch.Tensor]:
    return load_file(hub.state / "adapters" / "v1.safetensors")


def average(alone: list[Alone]) -> dict[str, torch.Tensor]:
    """Token-weighted, by hand."""
    total = sum(one.tokens for one in alone)
    first, second = alone
    assert first.tokens != second.tokens
    return {
        name: value * (first.tokens / total) + second.adapter[name] * (second.tokens / total)
        for name, value in first.adapter.items()
    }


def assert_is_average(hub: Hub, alone: list[Alone]) -> None:
    mine, wanted = published(hub), average(alone)
    assert mine.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(mine[name], value), name


def finish(*edges: Process) -> None:
    for process in edges:
        done = process.wait()
        assert done.code == 0, str(process)
        assert "learned since then is lost" not in done.out, str(process)


@pytest.mark.slow
def test_a_replica_of_ray_that_is_killed_is_started_again(programs: Programs, alone: list[Alone]) -> None:
    begin = time.monotonic()
    hub = programs.serve(*options(2, "--replicas", 2, "--checkpoint-every", 0.1), env={"TMPDIR": "/tmp"})
    processes = [int(found) for found in re.findall(r"replica \d runs on .*, process (\d+)", hub.process.out)]
    assert len(processes) == 2
    edges = [train(programs, hub, name) for name in NAMES]
    hub.process.until_says("(2 of 2 edges)")
    os.kill(processes[1], signal.SIGKILL)
    finish(*edges)
    assert_is_average(hub, alone)
    assert "replica 2 is gone" in hub.process.out, str(hub.process)
    assert "replica 2 is back at step" in hub.process.out, str(hub.process)
    hub.until(lambda live: [row["training"] for row in live["replicas"]] == [0, 0], "a status with both replicas")
    ours = [child.pid for child in psutil.Process(hub.process.pid).children(recursive=True)]
    assert hub.process.end(signal.SIGTERM).code == 0, str(hub.process)
    _, left = psutil.wait_procs([psutil.Process(pid) for pid in ours if psutil.pid_exists(pid)], timeout=10)
    assert not left
    print(time.monotonic() - begin)


def test_replicas_that_die_leave_the_average_as_it_is(programs: Programs, alone: list[Alone]) -> None:
    """One after a step whose answer nobody hears; the other as it gives what it has, and as it takes the average."""
    dies = "replica 2#1:step_backward:5:after,replica 1#1:standing:3:before,replica 1#2:begin_round:1:after"
    hub = programs.serve(
        *options(2, "--replicas", 2, "--checkpoint-every", 0.1), prepare=without_ray, env={"DIES": dies}
    )
    edges = [train(programs, hub, name) for name in NAMES]
    finish(*edges)
    assert_is_average(hub, alone)
    log = hub.process.out
    assert log.count("starting it again") == 3, log
    done = hub.process.end(signal.SIGTERM)
    assert done.code == 0, str(hub.process)


def test_a_hub_that_is_killed_goes_on_with_both_replicas(programs: Programs, alone: list[Alone]) -> None:
    at = free_ports()
    serve = [*options(2, "--replicas", 2, "--checkpoint-every", 0.1), *at]
    first = programs.serve(*serve, prepare=without_ray, env={"HUB_DIES": "replica 1#1:step_backward:6:after"})
    edges = [train(programs, first, name) for name in NAMES]
    first.process.wait()
    second = programs.serve(*serve, prepare=without_ray)
    assert "going on from the checkpoint" in second.process.out
    finish(*edges)
    assert_is_average(second, alone)


@pytest.mark.parametrize(
    ("dies", "every"), [("step_backward:6:after", 0.1), ("standing:1:before", 60)], ids=["in a step", "closing"]
)
def test_edges_of_a_replica_that_cannot_be_started_again_move(
    programs: Programs, alone: list[Alone], dies: str, every: float
) -> None:
    """What it had trained when its group saved last counts with its tokens."""
    env = {"DIES": f"replica 2#1:{dies}", "REFUSES": "replica 2"}
    hub = programs.serve(*options(2, "--replicas", 2, "--checkpoint-every", every), prepare=without_ray, env=env)
    edges = [train(programs, hub, name) for name in NAMES]
    finish(*edges)
    log = hub.process.out
    assert "it cannot be started again. Edges moved: 1 to replica 1" in log, log
    assert published(hub).keys() == alone[0].adapter.keys()


def test_a_hub_with_fewer_replicas_takes_over_what_the_others_trained(programs: Programs, alone: list[Alone]) -> None:
    at = free_ports()
    serve = [*options(2, "--checkpoint-every", 0.1), *at]
    env = {"HUB_DIES": "replica 2#1:step_backward:6:after"}
    first = programs.serve(*serve, "--replicas", 2, prepare=without_ray, env=env)
    edges = [train(programs, first, name) for name in NAMES]
    first.process.wait()
    second = programs.serve(*serve)
    finish(*edges)
    assert published(second).keys() == alone[0].adapter.keys()
