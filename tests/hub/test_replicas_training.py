"""Two edges in two groups, each with a replica of B; whatever dies, a round publishes the average of both."""

from __future__ import annotations

import json
import os
import re
import signal
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.support.pacing import paced
from tests.support.pausing import pause_between_steps
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


def train(programs: Programs, hub: Hub, name: str, **more: Any) -> Process:
    """The law firm takes its steps in two micro-batches."""
    notes = write_notes(programs.folder, name, 1, 12)
    return programs.edge(hub, name, notes, "--partition", "1:1", "--micro-batches", 1 + NAMES.index(name), **more)


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


def assert_same(mine: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(mine[name], value), name


def finish(*edges: Process) -> None:
    for process in edges:
        done = process.wait()
        assert done.code == 0, str(process)
        assert "learned since then is lost" not in done.out, str(process)


def connections(process: psutil.Process) -> list[Any]:
    """Those of a process that may end just now."""
    with suppress(psutil.Error):
        return list(process.net_connections())
    return []


@pytest.mark.slow
def test_a_replica_of_ray_that_is_killed_is_started_again(programs: Programs, alone: list[Alone]) -> None:
    hub = programs.serve(*options(1, "--replicas", 1, "--checkpoint-every", 0.1))
    (process,) = re.findall(r"replica 1 runs on .*, process (\d+)", hub.process.out)
    # Else a busy machine would leave it nearly nothing.
    assert psutil.Process(int(process)).nice() == psutil.Process(hub.process.pid).nice()
    edge = train(programs, hub, NAMES[0], prepare=paced)
    hub.process.until_says("(1 of 1 edges)")
    os.kill(int(process), signal.SIGKILL)
    finish(edge)
    assert_same(published(hub), alone[0].adapter)
    assert "replica 1 is gone" in hub.process.out, str(hub.process)
    assert "replica 1 is back at step" in hub.process.out, str(hub.process)
    ours = psutil.Process(hub.process.pid).children(recursive=True)
    listening = [link.laddr.ip for child in ours for link in connections(child) if link.status == "LISTEN"]
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    assert hub.process.end(signal.SIGTERM).code == 0, str(hub.process)
    _, left = psutil.wait_procs(ours, timeout=60)
    assert not left


@pytest.mark.slow
def test_whatever_dies_a_round_publishes_the_average(programs: Programs, alone: list[Alone]) -> None:
    """The hub after a step that nobody hears of; a replica within one; another as it gives its part, and once it has
    the average."""
    serve = [*options(2, "--replicas", 2), *free_ports()]
    often, seldom = ("--checkpoint-every", 0.1), ("--checkpoint-every", 60)
    first = programs.serve(*serve, *often, prepare=without_ray, env={"HUB_DIES": "replica 1#1:apply_step:3:after"})
    edges = [train(programs, first, name) for name in NAMES]
    first.process.wait()
    dies = "replica 2#1:step_backward:3:after,replica 1#1:standing:1:before,replica 1#2:begin_round:1:after"
    second = programs.serve(*serve, *seldom, prepare=without_ray, env={"DIES": dies})
    finish(*edges)
    assert_same(published(second), average(alone))
    log = second.process.out
    assert "going on from the checkpoint" in log, log
    assert log.count("starting it again") == 3, log
    second.until(lambda live: [row["training"] for row in live["replicas"]] == [0, 0], "a status with both replicas")


@pytest.mark.slow
def test_edges_of_a_replica_that_cannot_be_started_again_move(programs: Programs, alone: list[Alone]) -> None:
    """It dies as the round closes: the other group, which has closed its part of it, takes steps again."""
    env = {"DIES": "replica 2#1:standing:1:before", "REFUSES": "replica 2"}
    hub = programs.serve(*options(2, "--replicas", 2, "--checkpoint-every", 60), prepare=without_ray, env=env)
    edges = [train(programs, hub, name) for name in NAMES]
    finish(*edges)
    log = hub.process.out
    assert "it cannot be started again. Edges moved: 1 to replica 1" in log, log
    assert published(hub).keys() == alone[0].adapter.keys()


@pytest.mark.slow
def test_a_quorum_is_one_of_each_group(programs: Programs) -> None:
    """Two groups of two edges; in one an edge stands still, and the other of its group goes on."""
    serve = ["--cohort", 4, "--round-steps", 1000, "--replicas", 2, "--quorum", 1, "--deadline", 0.2]
    hub = programs.serve(*serve, prepare=without_ray)
    notes = write_notes(programs.folder, NAMES[0], 1, 12)
    names = ("one", "two", "three", "four")
    edges = [programs.edge(hub, name, notes, "--partition", "1:1", prepare=paced) for name in names]
    hub.until(lambda live: live["hub_step"] >= 4 and live["cohort_joined"] == 4, "all four")
    pause_between_steps(hub, edges[0], lambda live: [row["hub_step"] for row in live["replicas"]])
    assert "is silent" not in hub.process.out


@pytest.mark.slow
def test_a_hub_with_fewer_replicas_takes_over_what_the_others_trained(programs: Programs, alone: list[Alone]) -> None:
    at = free_ports()
    serve = [*options(2, "--checkpoint-every", 0.1), *at]
    env = {"HUB_DIES": "replica 2#1:apply_step:6:after"}
    first = programs.serve(*serve, "--replicas", 2, prepare=without_ray, env=env)
    edges = [train(programs, first, name) for name in NAMES]
    first.process.wait()
    second = programs.serve(*serve)
    finish(*edges)
    assert published(second).keys() == alone[0].adapter.keys()
