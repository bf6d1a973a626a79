"""The probe, and the memory limits that it must see."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from profiles import probe
from profiles.cgroup import cgroup_memory
from profiles.errors import ProfileError
from profiles.probe import probe_machine

GIB = 2**30


def tree(root: Path, files: dict[str, str | int]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/"}, None),
        # version 2: "max" is no limit
        ({"proc/self/cgroup": "0::/a", f"{V2}/a/memory.max": "max", f"{V2}/a/memory.current": GIB}, None),
        ({"proc/self/cgroup": "0::/a", f"{V2}/a/memory.max": 4 * GIB, f"{V2}/a/memory.current": GIB}, (4, 3)),
        # page cache that can be dropped is not used up
        (
            {
                "proc/self/cgroup": "0::/a",
                f"{V2}/a/memory.max": 4 * GIB,
                f"{V2}/a/memory.current": 3 * GIB,
                f"{V2}/a/memory.stat": f"anon 5\ninactive_file {2 * GIB}",
            },
            (4, 3),
        ),
        # the tightest group counts, here the outer one
        (
            {
                "proc/self/cgroup": "0::/a/b",
                f"{V2}/a/b/memory.max": 8 * GIB,
                f"{V2}/a/b/memory.current": GIB,
                f"{V2}/a/memory.max": 4 * GIB,
                f"{V2}/a/memory.current": 2 * GIB,
            },
            (4, 2),
        ),
        # in a container the group's path is the host's, and its files are at the top
        ({"proc/self/cgroup": "0::/docker/1", f"{V2}/memory.max": 2 * GIB, f"{V2}/memory.current": GIB}, (2, 1)),
        # version 1, with other controllers around it; more used than allowed leaves nothing
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/x\n0::/",
                f"{V1}/x/memory.limit_in_bytes": 2 * GIB,
                f"{V1}/x/memory.usage_in_bytes": 3 * GIB,
            },
            (2, 0),
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/x",
                f"{V1}/x/memory.limit_in_bytes": 9223372036854771712,
                f"{V1}/x/memory.usage_in_bytes": GIB,
            },
            None,
        ),
    ],
)
def test_cgroup_limits(tmp_path: Path, files: dict[str, str | int], expected: tuple[int, int] | None) -> None:
    found = cgroup_memory(tree(tmp_path, files))
    assert found == (expected and (expected[0] * GIB, expected[1] * GIB))


def test_probing_the_processor() -> None:
    started = time.perf_counter()
    machine = probe_machine("cpu")
    # three measurements of 0.35 s, with room for a machine that is busy with other tests
    assert time.perf_counter() - started < 10
    assert 0 < machine.free_memory_bytes < machine.memory_bytes
    assert machine.efficiency == 1
    assert 1e8 < machine.bandwidth_bytes_per_s < 1e13
    assert set(machine.flops) == {"float32", "bfloat16"}
    assert all(1e8 < speed < 1e15 for speed in machine.flops.values())
    assert f"with {torch.get_num_threads()} threads" in machine.sources["flops"]


def test_a_container_bounds_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "BUDGET_S", 0.0)
    monkeypatch.setattr(probe, "cgroup_memory", lambda: (64 * 2**20, 5 * 2**20))
    machine = probe_machine("cpu")
    assert (machine.memory_bytes, machine.free_memory_bytes) == (64 * 2**20, 5 * 2**20)


def test_the_median_of_the_measurements_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    # one warm-up of 9 s, then 1, 5 and 2 s until the budget of 12 s is used up
    clock = iter([0.0, 0.0, 9.0, 9.0, 10.0, 10.0, 10.0, 15.0, 11.0, 15.0, 17.0, 13.0])
    monkeypatch.setattr(probe, "BUDGET_S", 12.0)
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert probe._median_seconds(lambda: None, "cpu") == 2.0


def test_devices_that_are_not_there() -> None:
    with pytest.raises(ProfileError, match="unknown device 'tpu'"):
        probe_machine("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ProfileError, match="no CUDA device here"):
            probe_machine("cuda")
    if not torch.backends.mps.is_available():
        with pytest.raises(ProfileError, match="no Apple GPU here"):
            probe_machine("mps")
