"""Which partition this edge takes: as asked for, or planned from the model, this machine and the link."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig

import messaging.messages as m
from blocks.partition import Partition
from blocks.quantize import quantizable
from blocks.source import open_model
from blocks.surgery import build_whole
from edge.connection import SOFTWARE, HubModel
from edge.fetch import fetch_bytes
from messaging.console import Journal
from messaging.console.figures import human_bytes
from messaging.errors import InputError
from profiles.errors import PlanError, ProfileError
from profiles.machine import Machine, load_machine
from profiles.model import ModelShape, shape_from_config
from profiles.planner import Plan, plan, plan_partition
from profiles.probe import probe_machine
from profiles.workload import QUANTIZED_BYTES, Link, Workload

_PINGS = 5
#: What `edge profile` plans for: a fast home connection, and the defaults of `edge join`.
_LINK = Link(0.02, 12.5e6, 12.5e6)
_BATCH, _SEQ = 4, 128


#: What `auto` cuts a batch into that fits the memory whole: two micro-batches of so many positions each at least, and
#: up to four of twice as many. The second hides most of the time that can be hidden; small ones waste it in every
#: layer (4 x 128: 1.51 s in two, 1.61 s in four, 2.04 s at once).
_AUTO_PARTS, _AUTO_POSITIONS = 4, 128


@dataclass(frozen=True)
class Planned:
    """The partition to take, the plan behind it, and how a step is taken.

    rows: of a step. micro_batches: that these go through in; under_way: how many of them at a time.
    """

    partition: Partition
    rows: int
    plan: Plan
    micro_batches: int = 1
    under_way: int = 1

    @property
    def rows_at_once(self) -> int:
        """Rows that fit the memory in one forward."""
        return -(-self.rows // self.plan.micro_batches)

    def __str__(self) -> str:
        if self.micro_batches == 1:
            return f"a step takes its {self.rows} rows at once"
        return f"a step takes its {self.rows} rows in {self.micro_batches} micro-batches, {self.under_way} under way"


def choose_partition(
    asked: str,
    profile: str | None,
    served: HubModel,
    measure: Callable[[], Link],
    device: torch.device,
    batch: int,
    seq: int,
    journal: Journal,
    bits: int | None = None,
) -> Planned:
    """Plan for the hub's model on this machine, or on the one of `profile`, with linear layers in `bits` bits.

    Raises InputError when the partition is none, or does not fit the memory.
    """
    shape = exact_shape(served.files.config)
    workload = Workload(batch, seq, served.description.dtype, bits=bits)
    try:
        with journal.task("probing this machine"):
            machine = load_machine(profile) if profile else probe_machine(device.type)
        with journal.task("measuring the link"):
            link = measure()
        journal.log(f"planning for {describe(machine)}, link {1e3 * link.round_trip_s:.1f} ms")
        if asked == "auto":
            chosen = plan(shape, machine, link, workload)
        else:
            wanted = Partition.parse(asked)
            wanted.check(shape.layers)
            chosen = plan_partition(shape, machine, link, workload, wanted.p, wanted.q)
    except (PlanError, ProfileError) as error:
        raise InputError(str(error)) from error
    for reason in chosen.reasons:
        journal.log(reason)
    rows = batch
    if chosen.micro_batches > m.MOST_MICRO_BATCHES:
        rows = -(-batch // chosen.micro_batches) * m.MOST_MICRO_BATCHES
        journal.log(f"a batch of {batch} does not fit, not in micro-batches either: taking steps of {rows} rows")
        chosen = replace(chosen, micro_batches=m.MOST_MICRO_BATCHES)
    return Planned(Partition(chosen.p, chosen.q), rows, chosen)


def in_micro_batches(planned: Planned, asked: str, before: int | None, seq: int) -> Planned:
    """How a step of at most `seq` positions a row goes through: in `asked` micro-batches, a number or "auto".

    `auto` takes what the training had `before`, as a step that is repeated has to be the same; then what the memory
    needs; and where that is no limit, enough of them to keep edge, link and hub busy at once. InputError for a
    number that is none, or that the memory does not allow.
    """
    needed, rows = planned.plan.micro_batches, planned.rows
    if asked != "auto":
        if not asked.isdecimal() or not 1 <= int(asked) <= m.MOST_MICRO_BATCHES:
            raise InputError(f"--micro-batches {asked}: give auto, or a number from 1 to {m.MOST_MICRO_BATCHES}")
        count = int(asked)
        if count < needed:
            raise InputError(
                f"--micro-batches {asked}: a batch of {rows} needs {needed} of them to fit: give that, "
                "a smaller --batch or auto"
            )
    elif before is not None and before >= needed:
        count = before
    elif needed > 1:
        count = needed
    else:
        two = min(2, rows * seq // _AUTO_POSITIONS)
        count = max(min(_AUTO_PARTS, rows, max(two, rows * seq // (2 * _AUTO_POSITIONS))), 1)
    # Where the whole batch fits, so do all of its parts.
    return replace(planned, micro_batches=count, under_way=count if needed == 1 else planned.plan.under_way)


def measure_link(asker: Any) -> Link:
    """Round trip (median) and bandwidth to the hub; the way up is taken to be as fast as the way down."""
    hello = m.Describe(m.PROTOCOL_VERSION, m.PROTOCOL_VERSION, SOFTWARE)
    trips = [_seconds(lambda: asker.ask(hello, m.Description)) for _ in range(_PINGS)]
    trip = statistics.median(trips)
    # The first fetch opens the connection for bulk; the second is timed.
    size = len(fetch_bytes(asker, "manifest"))
    seconds = _seconds(lambda: fetch_bytes(asker, "manifest"))
    rate = size / max(seconds - trip, 1e-4)
    return Link(trip, rate, rate)


def exact_shape(config: PreTrainedConfig) -> ModelShape:
    """The model's shape with its real parameter counts, taken from the model on the meta device."""
    shape = shape_from_config(config.get_text_config().to_dict())
    model, names = build_whole(config, torch.float32)
    layers = model.get_submodule(names.prefix)
    counts = tuple(sum(p.numel() for p in layer.parameters()) for layer in layers)
    linears = quantizable(model)
    prefix = f"{names.prefix}."
    by_layer = tuple(
        sum(size for name, size in linears.items() if name.startswith(f"{prefix}{number}."))
        for number in range(names.count)
    )
    head = sum(size for name, size in linears.items() if not name.startswith(prefix))
    return replace(shape, layer_params=counts, layer_linears=by_layer, head_linears=head)


def describe(machine: Machine) -> str:
    """A machine in a few words."""
    free = human_bytes(machine.free_memory_bytes)
    return f"{machine.name} ({machine.device}, {free} free, {machine.flops['float32'] / 1e9:.0f} GFLOP/s in float32)"


def show_profile(model: str | None, as_json: bool) -> None:
    """`edge profile`: this machine, and every partition of a model that fits it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = probe_machine(device)
    plans = _plans(model, machine) if model else []
    if as_json:
        rows = [{**asdict(row), "peak_memory_bytes": row.peak_memory_bytes} for row in plans]
        print(json.dumps({"machine": asdict(machine), "partitions": rows}))
        return
    console = Console()
    console.print(describe(machine), highlight=False)
    console.print(f"memory bandwidth {human_bytes(int(machine.bandwidth_bytes_per_s))}/s", highlight=False)
    if plans:
        console.print(_table(plans))


def _plans(model: str, machine: Machine) -> list[Plan]:
    shape = exact_shape(open_model(model).config)
    workload = Workload(_BATCH, _SEQ, "float32" if machine.device == "cpu" else "auto")
    plans: list[Plan] = []
    for hosted in range(1, shape.layers):
        chosen = _most_bits(shape, machine, workload, hosted - hosted // 2, hosted // 2, first=not plans)
        if chosen is None:
            break
        plans.append(chosen)
    return plans


def _most_bits(shape: ModelShape, machine: Machine, workload: Workload, p: int, q: int, first: bool) -> Plan | None:
    """The plan for p:q with as many bits for a weight as fit. None if none do; InputError if this is the `first`."""
    for bits in (None, *sorted(QUANTIZED_BYTES, reverse=True)):
        try:
            return plan_partition(shape, machine, _LINK, replace(workload, bits=bits), p, q)
        except PlanError as error:
            refused = error
    if first:
        raise InputError(str(refused)) from refused
    return None


def _table(plans: list[Plan]) -> Table:
    table = Table("partition", "weights", "peak memory", "step", "sent and received a step", box=None)
    for row in plans:
        memory, sent = human_bytes(row.peak_memory_bytes), human_bytes(row.bytes_per_step)
        held = f"--load-in {row.bits}bit" if row.bits else row.dtype
        table.add_row(f"{row.p}:{row.q}", held, memory, f"{row.step_time_s:.2f} s", sent)
    return table


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
