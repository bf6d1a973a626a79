"""Rows 1 and 2: the hub, or an edge, killed with SIGKILL at the worst moments; nothing may be lost or taken twice.

The killing is armed from outside, in the process that was forked to be killed: the product has no hook for it.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.faults.fault import Fault, Setting
from tools.faults.trial import Plan, Trial, differences, undisturbed
from tools.programs import Process
from tools.table import Row, at_least, at_most, reported

POINTS = ("before apply", "after apply", "in the checkpoint", "before the reply")
#: A hub is also stopped in order, in the middle of the work.
STOPPED = "stopped by SIGTERM"
#: From 1 to so many steps of a life until its end.
_LIVES = 8
_STEPS_PER_KILL = 6
_LIFE_S = 120.0
_GOING_ON_S, _GOING_ON_QUICK_S = 2.0, 30.0


# -- in the process that is to die ---------------------------------------------------------------------


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _countdown(end: Callable[..., None] = _die) -> Callable[..., None]:
    """Comes to its end at the call that the environment names; in a process without such a wish it only counts."""
    left = int(os.environ.get("KILL_AFTER", "0"))

    def count(*given: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            end(*given)

    return count


def _around(owner: Any, name: str, before: Callable[..., None] | None, after: Callable[[], None] | None) -> None:
    original = getattr(owner, name)

    def wrapped(*given: Any, **named: Any) -> Any:
        if before is not None:
            before(*given)
        result = original(*given, **named)
        if after is not None:
            after()
        return result

    setattr(owner, name, wrapped)


def arm_hub() -> None:
    """Write down when each step is applied, and die where KILL_POINT and KILL_AFTER say."""
    import hub.store.checkpoints as checkpoints
    import messaging.messages as m
    from hub.engine import Engine
    from hub.post import Post

    count, trace = _countdown(), Path(os.environ["TRACE"])

    def note(*_: Any) -> None:
        with trace.open("a") as file:
            file.write(f"{time.monotonic()}\n")

    _around(Engine, "apply_step", note, None)
    match os.environ.get("KILL_POINT"):
        case "before apply":
            _around(Engine, "apply_step", count, None)
        case "after apply":
            _around(Engine, "apply_step", None, count)
        case "in the checkpoint" if os.environ["KILL_VARIANT"] == "0":
            # The file is written under its temporary name.
            _around(checkpoints, "_write", None, count)
        case "in the checkpoint":
            # It is written and listed, and nobody was told.
            _around(checkpoints.CheckpointStore, "save", None, count)
        case "stopped by SIGTERM":
            _around(Engine, "apply_step", None, _countdown(lambda *_: os.kill(os.getpid(), signal.SIGTERM)))
        case "before the reply":
            _around(Post, "answer", lambda *given: count() if isinstance(given[3], m.StepGrad) else None, None)


def arm_edge() -> None:
    """Die where KILL_POINT and KILL_AFTER say."""
    import edge.snapshots
    import messaging.messages as m
    from blocks.optimizer import AdapterOptimizer
    from edge.client import HubClient

    count = _countdown()

    def half_written(path: Path, content: bytes) -> None:
        path.with_name(f".{path.name}.{'0' * 16}.tmp").write_bytes(content[: len(content) // 2])
        count()
        original(path, content)

    submit = HubClient.submit

    def asking(client: HubClient, message: m.StepBackward) -> None:
        submit(client, message)
        # Sometimes the hub has it by then, sometimes it has answered.
        time.sleep(0.02 * int(os.environ["KILL_VARIANT"]))
        _die()

    last = _countdown(asking)

    match os.environ["KILL_POINT"]:
        case "before apply":
            _around(AdapterOptimizer, "step", count, None)
        case "after apply":
            _around(AdapterOptimizer, "step", None, count)
        case "in the checkpoint":
            original = edge.snapshots.write_private
            edge.snapshots.write_private = half_written
        case "before the reply":
            _around(HubClient, "submit", lambda *g: last(*g[:2]) if isinstance(g[1], m.StepBackward) else None, None)


# -- the experiments ---------------------------------------------------------------------------------------


def kill_hub(setting: Setting) -> Sequence[Row]:
    """Row 1."""
    return _experiment(setting, "1 hub", (*POINTS, STOPPED), _hub_lives)


def kill_edge(setting: Setting) -> Sequence[Row]:
    """Row 2."""
    return _experiment(setting, "2 edge", POINTS, _edge_lives)


Lives = Callable[[Trial, Sequence[tuple[str, dict[str, str]]]], tuple[list[Process], list[float], list[float]]]


def _experiment(setting: Setting, row: str, points: Sequence[str], lives: Lives) -> Sequence[Row]:
    each = setting.count(100, 2)
    wishes = _wishes(points, each, random.Random(row))
    rounds = -(-_STEPS_PER_KILL * len(wishes) // 10)
    plan = Plan(edges=2, rounds=rounds, round_steps=10)
    expected = undisturbed(plan, setting.folder / "undisturbed")
    with Trial(plan, setting.folder / "killed", keys=setting.folder / "undisturbed") as trial:
        edges, cold, going_on = lives(trial, wishes)
        actual = trial.end(edges)
    wrong = differences(expected, actual)
    if wrong:
        setting.console.print(f"differs: {', '.join(wrong)}", highlight=False)
    times, same, soon = _rows(row, len(points))
    return (
        at_least(times, len(wishes) / len(points), each),
        at_most(same, len(wrong), 0),
        at_most(soon, max(going_on), setting.limit(_GOING_ON_S, _GOING_ON_QUICK_S)),
        reported(f"{row} killed: cold start until it is ready, worst (s)", max(cold)),
    )


def _wishes(points: Sequence[str], each: int, rng: random.Random) -> list[tuple[str, dict[str, str]]]:
    """How every life ends: (point, environment), shuffled."""
    wishes = [
        (point, {"KILL_POINT": point, "KILL_AFTER": str(_after(point, rng)), "KILL_VARIANT": str(rng.randrange(2))})
        for point in points
        for _ in range(each)
    ]
    rng.shuffle(wishes)
    return wishes


def _after(point: str, rng: random.Random) -> int:
    return rng.randint(1, 2) if point == "in the checkpoint" else rng.randint(1, _LIVES)


def _hub_lives(
    trial: Trial, wishes: Sequence[tuple[str, dict[str, str]]]
) -> tuple[list[Process], list[float], list[float]]:
    """Start the hub again and again; returns the edges, seconds to each ready line, and from there to the next step."""
    trace = trial.folder / "trace"
    trace.touch()
    edges: list[Process] = []
    cold, going_on = [], []
    for number, (point, wish) in enumerate(wishes):
        hub = trial.start_hub(prepare=arm_hub, env={**wish, "TRACE": str(trace)})
        ready = time.monotonic()
        cold.append(hub.start_s)
        edges = edges or [trial.start_edge(name) for name in trial.plan.names]
        _dead(hub.process, 0 if point == STOPPED else -signal.SIGKILL)
        if number:
            going_on.append(_since(trace, ready))
    trial.start_hub(prepare=arm_hub, env={"TRACE": str(trace)})
    return edges, cold, going_on


def _edge_lives(
    trial: Trial, wishes: Sequence[tuple[str, dict[str, str]]]
) -> tuple[list[Process], list[float], list[float]]:
    """Start one edge again and again; returns the edges, seconds until it is back, and from there to the next step."""
    trace = trial.folder / "trace"
    trace.touch()
    trial.start_hub(prepare=arm_hub, env={"TRACE": str(trace)})
    victim, *others = trial.plan.names
    edges = [trial.start_edge(name) for name in others]
    cold, going_on = [], []
    for number, (_, wish) in enumerate(wishes):
        begin = time.monotonic()
        process = trial.start_edge(victim, prepare=arm_edge, env=wish)
        if number:
            process.until(lambda process=process: "resumed at step" in process.out or not process.running, "resumption")  # type: ignore[misc]
            back = time.monotonic()
            cold.append(back - begin)
        _dead(process)
        if number:
            going_on.append(_since(trace, back))
    return [*edges, trial.start_edge(victim)], cold, going_on


def _dead(process: Process, expected: int = -signal.SIGKILL) -> None:
    deadline = time.monotonic() + _LIFE_S
    while process.running:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{process} lives on")
        time.sleep(0.01)
    code = process.wait().code
    if code != expected:
        raise RuntimeError(f"{process} ended with {code}, not {expected}")


def _since(trace: Path, begin: float) -> float:
    """Seconds from `begin` to the first step after it; 0 if the step came before we could look."""
    times = [float(line) for line in trace.read_text().split()]
    return min((at - begin for at in times if at > begin), default=0.0)


def _rows(row: str, points: int) -> tuple[str, str, str]:
    return (
        f"{row} killed: times at each of {points} points",
        f"{row} killed: adapters, optimizers and step counts that differ from the undisturbed run",
        f"{row} killed: going on after it is ready, worst (s)",
    )


FAULTS = (
    Fault("1", "kill -9 of the hub at four points, and SIGTERM", _rows("1 hub", 5), kill_hub),
    Fault("2", "kill -9 of an edge at four points", _rows("2 edge", 4), kill_edge),
)
