"""The planner: from model, machine, link and workload to a partition, as rules that read top to bottom.

1. The dtype is the workload's; "auto" is the fastest that the machine has a figure for, in doubt float32.
2. p and q are at least their floors (privacy asks for the one on p), and the hub keeps at least one layer.
   Linear layers are quantized only where the workload says so: it costs time and a little quality.
3. A partition fits when its predicted peak is at most 85% of the machine's free memory. Where a whole batch does
   not fit, the batch is split into as few micro-batches as do, down to one row each, with as many of them under way
   at a time as fit.
4. Among the partitions that fit: the least predicted step time, ties to the larger p, then to the smaller q.
5. Where none fits, PlanError says what the smallest one needs, what there is, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from profiles.errors import PlanError
from profiles.machine import Machine
from profiles.memory import MemoryPrediction, predict_memory
from profiles.model import ModelShape
from profiles.steptime import UNKNOWN_HUB_SPEEDUP, step_bytes, step_seconds
from profiles.workload import DTYPE_BYTES, QUANTIZED_BYTES, Link, Workload

#: The share of free memory that a plan may use.
USABLE_SHARE = 0.85

#: Step times this close, relatively, are a tie: no prediction is finer than rounding errors.
TIE = 1e-9


@dataclass(frozen=True)
class Plan:
    """Partition p:q and what it is predicted to cost: bytes, seconds, bytes on the link, each for one step.

    bits: of the edge's linear layers; None where they have the dtype.
    """

    p: int
    q: int
    dtype: str
    micro_batches: int
    #: micro-batches that may be between their forward in A and their backward there, at a time
    under_way: int
    memory: MemoryPrediction
    step_time_s: float
    bytes_per_step: int
    bits: int | None = None
    reasons: tuple[str, ...] = ()

    @property
    def peak_memory_bytes(self) -> int:
        """Predicted peak of the edge's process, less its imports."""
        return self.memory.total


@dataclass(frozen=True)
class _Task:
    """What a plan is made for; `hub` is the hub's machine, where it is known."""

    model: ModelShape
    machine: Machine
    link: Link
    workload: Workload
    hub: Machine | None

    def check(self, p: int, q: int) -> None:
        """Rule 2, the part on the hub."""
        if p < 1 or q < 0:
            raise PlanError(f"partition {p}:{q}: p must be at least 1 and q at least 0")
        if p + q >= self.model.layers:
            raise PlanError(
                f"partition {p}:{q} leaves the hub nothing: the model has {self.model.layers} layers, "
                f"so p + q may be at most {self.model.layers - 1}"
            )

    def fit(self, p: int, q: int) -> Plan | None:
        """Rule 3: p:q with as few micro-batches as fit; None where not even single rows do."""
        for micro_batches in range(1, self.workload.batch + 1):
            for under_way in range(micro_batches, 0, -1):
                memory = predict_memory(self.model, p, q, self.workload, self.machine.device, micro_batches, under_way)
                if memory.total <= usable_bytes(self.machine):
                    return self._plan(p, q, micro_batches, under_way, memory)
        return None

    def fitting(self, p_floor: int, q_floor: int) -> Iterator[Plan]:
        """Every partition at or above the floors that fits. Where q layers don't fit, no more do."""
        for p in range(p_floor, self.model.layers - q_floor):
            for q in range(q_floor, self.model.layers - p):
                candidate = self.fit(p, q)
                if candidate is None:
                    break
                yield candidate

    def _plan(self, p: int, q: int, micro_batches: int, under_way: int, memory: MemoryPrediction) -> Plan:
        seconds = step_seconds(self.model, self.machine, self.hub, self.link, self.workload, p + q, micro_batches)
        return Plan(
            p=p,
            q=q,
            dtype=self.workload.dtype,
            micro_batches=micro_batches,
            under_way=under_way,
            memory=memory,
            step_time_s=seconds,
            bytes_per_step=step_bytes(self.model, self.workload),
            bits=self.workload.bits,
        )


def plan(
    model: ModelShape,
    machine: Machine,
    link: Link,
    workload: Workload,
    p_floor: int = 1,
    q_floor: int = 1,
    hub: Machine | None = None,
) -> Plan:
    """The best partition by the rules above. `hub` is the hub's machine, where it is known.

    Raises PlanError when no partition meets the rules.
    """
    task = _Task(model, machine, link, _with_dtype(workload, machine), hub)
    task.check(p_floor, q_floor)
    fitting = list(task.fitting(p_floor, q_floor))
    if not fitting:
        raise PlanError(_refusal(task, p_floor, q_floor))
    least = min(candidate.step_time_s for candidate in fitting)
    tied = [candidate for candidate in fitting if candidate.step_time_s <= least * (1 + TIE)]
    best = max(tied, key=lambda candidate: (candidate.p, -candidate.q))
    choice = f"of {len(fitting)} partitions that fit, {best.p}:{best.q} has the shortest step; {_hub_speed(hub)}"
    return replace(best, reasons=(choice, *_reasons(best, task)))


def plan_partition(
    model: ModelShape,
    machine: Machine,
    link: Link,
    workload: Workload,
    p: int,
    q: int,
    hub: Machine | None = None,
) -> Plan:
    """The plan for a partition that somebody has chosen. Raises PlanError when it is none, or does not fit."""
    task = _Task(model, machine, link, _with_dtype(workload, machine), hub)
    task.check(p, q)
    chosen = task.fit(p, q)
    if chosen is None:
        raise PlanError(_refusal(task, p, q))
    return replace(chosen, reasons=(f"partition {p}:{q} was asked for", *_reasons(chosen, task)))


def usable_bytes(machine: Machine) -> int:
    """What a plan may use of the machine's free memory."""
    return int(USABLE_SHARE * machine.free_memory_bytes)


def fastest_dtype(machine: Machine) -> str:
    """The dtype with the machine's highest figure; float32 where another is no faster, bfloat16 before float16."""
    return max(DTYPE_BYTES, key=lambda dtype: machine.flops.get(dtype, 0.0))


def _with_dtype(workload: Workload, machine: Machine) -> Workload:
    return replace(workload, dtype=fastest_dtype(machine)) if workload.dtype == "auto" else workload


def _refusal(task: _Task, p: int, q: int) -> str:
    """Why nothing fits: what p:q needs with one row at a time, what there is, and what would help."""
    machine, workload = task.machine, task.workload
    memory = predict_memory(task.model, p, q, workload, machine.device, micro_batches=workload.batch)
    largest = sorted(memory.parts().items(), key=lambda part: part[1], reverse=True)[:3]
    advice = ["close other programs"]
    advice += _fewer_bits(task, p, q)
    if memory.weights < memory.total / 2:
        advice.append(f"use a shorter sequence than {workload.seq}")
    if workload.dtype == "float32":
        advice.append("have the hub serve bfloat16")
    if (p, q) != (1, 0):
        advice.append(f"ask for less than {p}:{q}")
    advice.append("choose a smaller model or a machine with more memory")
    return (
        f"partition {p}:{q} does not fit {machine.name}: it needs {_gib(memory.total)} with one row at a time "
        f"({', '.join(f'{name} {_gib(size)}' for name, size in largest)}), and a plan may use "
        f"{_gib(usable_bytes(machine))}, {USABLE_SHARE:.0%} of the {_gib(machine.free_memory_bytes)} that are free. "
        f"To go on: {'; '.join(advice)}."
    )


def _fewer_bits(task: _Task, p: int, q: int) -> list[str]:
    """With which bits p:q would fit: the most that do."""
    for bits in sorted(QUANTIZED_BYTES, reverse=True):
        smaller = replace(task, workload=replace(task.workload, bits=bits))
        if bits < (task.workload.bits or 16) and smaller.fit(p, q) is not None:
            return [f"hold the weights in {bits} bits (--load-in {bits}bit): then it fits"]
    return []


def _hub_speed(hub: Machine | None) -> str:
    if hub is None:
        return f"the hub is taken to be {UNKNOWN_HUB_SPEEDUP:g} times as fast as this machine"
    return f"the hub is {hub.name}"


def _reasons(chosen: Plan, task: _Task) -> tuple[str, ...]:
    """What holds for any plan, in sentences for people."""
    reasons = [
        f"it needs {_gib(chosen.memory.total)} of the {_gib(usable_bytes(task.machine))} that it may use "
        f"on {task.machine.name}"
    ]
    if chosen.bits:
        reasons.append(f"with linear layers in {chosen.bits} bits: {_gib(chosen.memory.weights)} of weights")
    if chosen.micro_batches > 1:
        reasons.append(f"a batch of {task.workload.batch} goes through in {chosen.micro_batches} parts, to fit")
    return tuple(reasons)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
