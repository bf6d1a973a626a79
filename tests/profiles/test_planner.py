"""The planner's rules, one small case each."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from profiles.errors import PlanError
from profiles.machine import Machine
from profiles.memory import predict_memory
from profiles.model import shape_from_config
from profiles.planner import fastest_dtype, plan, plan_partition, usable_bytes
from profiles.workload import Link, Workload

MODEL = shape_from_config(
    {
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "vocab_size": 8000,
    }
)
LAN = Link(round_trip_s=0.001, bytes_per_s_up=1e8, bytes_per_s_down=1e8)
STEP = Workload(batch=4, seq=128, dtype="float32")
EDGE = Machine("edge", "cpu", 2**34, 2**34, bandwidth_bytes_per_s=3e10, flops={"float32": 1e11})
FAST_HUB = replace(EDGE, name="fast", flops={"float32": 1e13}, bandwidth_bytes_per_s=1e12)
SLOW_HUB = replace(EDGE, name="slow", flops={"float32": 1e10}, bandwidth_bytes_per_s=3e9)


def with_room_for(p: int, q: int, micro_batches: int = 1, workload: Workload = STEP, under_way: int = 1) -> Machine:
    """The edge with exactly as much free memory as p:q needs."""
    needed = predict_memory(MODEL, p, q, workload, "cpu", micro_batches, under_way).total
    return replace(EDGE, free_memory_bytes=int(needed / 0.85) + 2)


@pytest.mark.parametrize(
    ("hub", "p_floor", "q_floor", "expected"),
    [
        # a faster hub gets all that it may have
        (FAST_HUB, 1, 1, (1, 1)),
        (FAST_HUB, 3, 1, (3, 1)),
        (FAST_HUB, 1, 0, (1, 0)),
        (FAST_HUB, 2, 2, (2, 2)),
        # so does one that nothing is known about
        (None, 1, 1, (1, 1)),
        # a slower one keeps a single layer, and the larger p wins the tie between 6:1, 5:2, ...
        (SLOW_HUB, 1, 1, (6, 1)),
        (SLOW_HUB, 1, 3, (4, 3)),
        # an equally fast hub makes all partitions tie
        (EDGE, 1, 1, (6, 1)),
    ],
)
def test_the_shortest_step_wins_and_ties_go_to_the_larger_p(
    hub: Machine | None, p_floor: int, q_floor: int, expected: tuple[int, int]
) -> None:
    chosen = plan(MODEL, EDGE, LAN, STEP, p_floor, q_floor, hub)
    assert (chosen.p, chosen.q) == expected
    assert chosen.micro_batches == 1
    assert chosen.peak_memory_bytes == predict_memory(MODEL, *expected, STEP, "cpu").total


@pytest.mark.parametrize(("p", "q"), [(1, 1), (2, 1), (4, 2)])
def test_memory_bounds_the_partition_however_slow_the_hub(p: int, q: int) -> None:
    machine = with_room_for(p, q, micro_batches=STEP.batch)
    chosen = plan(MODEL, machine, LAN, STEP, q_floor=q, hub=SLOW_HUB)
    assert (chosen.p, chosen.q) == (p, q)
    assert chosen.peak_memory_bytes <= usable_bytes(machine) == int(0.85 * machine.free_memory_bytes)


def test_a_batch_is_split_only_as_far_as_it_must() -> None:
    chosen = plan(MODEL, with_room_for(1, 1, micro_batches=2), LAN, STEP)
    assert (chosen.p, chosen.q, chosen.micro_batches) == (1, 1, 2)
    assert any("in 2 parts" in reason for reason in chosen.reasons)
    whole = plan(MODEL, with_room_for(1, 1), LAN, STEP)
    assert whole.micro_batches == 1
    # each part waits for the hub twice
    assert chosen.step_time_s == pytest.approx(whole.step_time_s + 2 * LAN.round_trip_s)


def test_what_fits_nowhere_is_refused_in_words_that_help() -> None:
    machine = replace(with_room_for(1, 1, micro_batches=4), name="tiny")
    machine = replace(machine, free_memory_bytes=machine.free_memory_bytes - 10)
    with pytest.raises(PlanError) as refusal:
        plan(MODEL, machine, LAN, STEP)
    message = str(refusal.value)
    needed = predict_memory(MODEL, 1, 1, STEP, "cpu", 4).total / 2**30
    assert f"partition 1:1 does not fit tiny: it needs {needed:.2f} GiB with one row at a time" in message
    assert f"85% of the {machine.free_memory_bytes / 2**30:.2f} GiB that are free" in message
    assert "To go on:" in message
    assert "bfloat16" in message
    assert isinstance(refusal.value, ValueError)


@pytest.mark.parametrize("bits", [8, 4])
def test_what_fits_in_fewer_bits_only_is_told_so(bits: int) -> None:
    machine = with_room_for(2, 2, micro_batches=4, workload=replace(STEP, bits=bits))
    with pytest.raises(PlanError, match=rf"hold the weights in {bits} bits \(--load-in {bits}bit\): then it fits"):
        plan_partition(MODEL, machine, LAN, STEP, 2, 2)
    chosen = plan_partition(MODEL, machine, LAN, replace(STEP, bits=bits), 2, 2)
    assert chosen.bits == bits
    assert any(f"with linear layers in {bits} bits" in reason for reason in chosen.reasons)


def test_fewer_bits_are_not_advised_where_they_do_not_help() -> None:
    machine = replace(with_room_for(1, 1, micro_batches=4), free_memory_bytes=2**20)
    with pytest.raises(PlanError) as refusal:
        plan(MODEL, machine, LAN, STEP)
    assert "--load-in" not in str(refusal.value)


@pytest.mark.parametrize(
    ("p", "q", "message"),
    [
        (0, 1, "p must be at least 1"),
        (1, -1, "q at least 0"),
        (7, 1, "leaves the hub nothing: the model has 8 layers, so p \\+ q may be at most 7"),
    ],
)
def test_floors_that_leave_no_partition(p: int, q: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(MODEL, EDGE, LAN, STEP, p, q)
    with pytest.raises(PlanError, match=message):
        plan_partition(MODEL, EDGE, LAN, STEP, p, q)


def test_a_partition_that_somebody_chose() -> None:
    chosen = plan_partition(MODEL, EDGE, LAN, STEP, 2, 3)
    assert (chosen.p, chosen.q) == (2, 3)
    assert chosen.reasons[0] == "partition 2:3 was asked for"
    with pytest.raises(PlanError, match=r"partition 2:3 does not fit"):
        plan_partition(MODEL, with_room_for(1, 1, micro_batches=4), LAN, STEP, 2, 3)


@pytest.mark.parametrize(
    ("flops", "expected"),
    [
        ({"float32": 1e12}, "float32"),
        ({"float32": 1e12, "bfloat16": 5e11}, "float32"),
        ({"float32": 1e12, "bfloat16": 1e12}, "float32"),
        ({"float32": 1e12, "float16": 8e12}, "float16"),
        ({"float32": 1e12, "bfloat16": 8e12, "float16": 8e12}, "bfloat16"),
    ],
)
def test_auto_is_the_fastest_dtype(flops: dict[str, float], expected: str) -> None:
    machine = replace(EDGE, flops=flops)
    assert fastest_dtype(machine) == expected
    assert plan(MODEL, machine, LAN, replace(STEP, dtype="auto")).dtype == expected


@pytest.mark.parametrize(
    ("training", "dtype", "expected"),
    [
        # smashed and hidden and the gradient of each
        (True, "float32", 4 * 4 * 128 * 512 * 4),
        (True, "bfloat16", 4 * 4 * 128 * 512 * 2),
        # one token for each row, out and back
        (False, "float32", 2 * 4 * 512 * 4),
    ],
)
def test_bytes_of_a_step(training: bool, dtype: str, expected: int) -> None:
    workload = replace(STEP, training=training, dtype=dtype)
    assert plan(MODEL, EDGE, LAN, workload).bytes_per_step == expected


def test_step_time_adds_up_by_hand() -> None:
    # one row of two tokens: reading the weights takes longer than the arithmetic
    workload = Workload(batch=1, seq=2, dtype="float32")
    link = Link(round_trip_s=0.1, bytes_per_s_up=1000, bytes_per_s_down=2000)
    chosen = plan(MODEL, EDGE, link, workload, hub=FAST_HUB)
    layer = MODEL.layer_params[0] * 4 * 2
    compute = (2 * layer + 2 * MODEL.vocab * 512 * 4) / 3e10 + 6 * layer / 1e12
    sent = 2 * 2 * 512 * 4
    assert chosen.step_time_s == pytest.approx(compute + 2 * 0.1 + sent / 1000 + sent / 2000)


def test_arithmetic_bounds_a_large_batch() -> None:
    slow, fast = (plan(MODEL, replace(EDGE, efficiency=share), LAN, STEP, hub=FAST_HUB) for share in (0.5, 1.0))
    assert slow.step_time_s > 1.5 * fast.step_time_s


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "must be >= 1"),
        ({"seq": 0}, "must be >= 1"),
        ({"lora_rank": 0}, "must be >= 1"),
        ({"bits": 3}, "weights in 3 bits: give one of 8, 4, or none"),
        ({"dtype": "int8"}, "unknown dtype 'int8': use auto, float32, bfloat16, float16"),
    ],
)
def test_impossible_workloads(changes: dict[str, int | str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        replace(STEP, **changes)  # type: ignore[arg-type]


def test_impossible_links() -> None:
    with pytest.raises(PlanError, match="must not be negative"):
        Link(round_trip_s=-1, bytes_per_s_up=1, bytes_per_s_down=1)
    with pytest.raises(PlanError, match="above 0"):
        Link(round_trip_s=0, bytes_per_s_up=0, bytes_per_s_down=1)


def test_planning_needs_no_torch() -> None:
    code = "import sys, profiles.planner, profiles.machine, profiles.probe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("under_way", [1, 2, 3])
def test_as_many_micro_batches_are_under_way_as_fit(under_way: int) -> None:
    machine = with_room_for(1, 1, micro_batches=4, under_way=under_way)
    chosen = plan_partition(MODEL, machine, LAN, STEP, 1, 1)
    least = next(n for n in range(1, 5) if predict_memory(MODEL, 1, 1, STEP, "cpu", n).total <= usable_bytes(machine))
    assert chosen.micro_batches == least
    needs = [predict_memory(MODEL, 1, 1, STEP, "cpu", least, at).total for at in range(1, least + 1)]
    assert chosen.under_way == sum(need <= usable_bytes(machine) for need in needs)
