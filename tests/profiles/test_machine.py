"""Machine profiles: what is shipped, and what a file must look like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from profiles.errors import ProfileError
from profiles.machine import DATASHEET_EFFICIENCY, MACHINES, known_machines, load_machine, parse_machine

#: What the README promises: one pattern for each machine that people can name.
PROMISED = (
    "laptop-i5-8250u-8gb",
    "laptop-ryzen-7840u-32gb",
    "raspberry-pi-5-8gb",
    "jetson-orin-nano-8gb",
    "jetson-agx-orin-64gb",
    "rtx-3060",
    "rtx-4070",
    "rtx-4090",
    "t4",
    "l4",
    "a10",
    "a100-40gb",
    "a100-80gb",
    "h100-80gb",
    "h200-141gb",
    "apple-m1-max-64gb",
    "apple-m2-16gb",
)


def profile(**changes: Any) -> dict[str, Any]:
    """A valid profile with some top-level keys replaced; None removes a key."""
    figure = {"value": 8_000_000_000, "source": "data sheet"}
    content: dict[str, Any] = {
        "description": "a machine",
        "device": "cpu",
        "memory_bytes": figure,
        "memory_bandwidth_bytes_per_s": figure,
        "flops": {"float32": figure},
    } | changes
    return {key: value for key, value in content.items() if value is not None}


@pytest.mark.parametrize("name", known_machines())
def test_every_shipped_profile_is_valid_and_sourced(name: str) -> None:
    machine = load_machine(name)
    assert machine.name == name
    assert machine.description
    assert 10**9 <= machine.free_memory_bytes <= machine.memory_bytes < 10**12
    assert 10**10 < machine.bandwidth_bytes_per_s < 10**13
    assert 10**11 < machine.flops["float32"] <= max(machine.flops.values()) < 10**15
    figures = {"memory_bytes", "memory_bandwidth_bytes_per_s"} | {f"flops.{dtype}" for dtype in machine.flops}
    assert set(machine.sources) == figures
    assert all(machine.sources.values())


def test_the_promised_machines_are_there() -> None:
    assert set(PROMISED) <= set(known_machines())
    assert len(list(MACHINES.iterdir())) == len(known_machines()), "a file in profiles/machines that is no profile"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ProfileError, match=r"no machine profile 'rtx-9090'.*a10, .*rtx-4090"):
        load_machine("rtx-9090")


def test_a_file_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "office.yaml"
    extra = {"value": 2_000_000_000, "source": "free -b"}
    path.write_text(yaml.safe_dump(profile(free_memory_bytes=extra, efficiency={"value": 0.7, "source": "measured"})))
    machine = load_machine(path)
    assert (machine.name, machine.free_memory_bytes, machine.efficiency) == ("office", 2_000_000_000, 0.7)


def test_what_a_profile_leaves_out() -> None:
    machine = parse_machine("m", profile(), where="m.yaml")
    assert machine.free_memory_bytes == machine.memory_bytes
    assert machine.efficiency == DATASHEET_EFFICIENCY
    # no figure for bfloat16: it counts as float32
    assert machine.reachable_flops("bfloat16") == machine.reachable_flops("float32") == 8e9 * DATASHEET_EFFICIENCY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": None}, "device is missing"),
        ({"device": "tpu"}, "device is 'tpu', it must be one of cpu, cuda, mps"),
        ({"memory": {"value": 1, "source": "s"}}, "unknown key memory; known are"),
        ({"memory_bytes": 8_000_000_000}, "memory_bytes must be a mapping"),
        ({"memory_bytes": {"value": 8}}, "memory_bytes.source is missing"),
        ({"memory_bytes": {"value": 8, "source": " "}}, "memory_bytes has no source"),
        ({"memory_bytes": {"value": 0, "source": "s"}}, "memory_bytes.value is 0"),
        ({"memory_bytes": {"value": "8e9", "source": "s"}}, "memory_bytes.value is '8e9'"),
        ({"memory_bytes": {"value": True, "source": "s"}}, "memory_bytes.value is True"),
        ({"memory_bytes": {"value": 8, "source": "s", "unit": "GB"}}, "unknown key memory_bytes.unit"),
        ({"flops": {"bfloat16": {"value": 8, "source": "s"}}}, "flops.float32 is missing"),
        ({"flops": {"float32": {"value": 8, "source": "s"}, "fp8": {}}}, "unknown key flops.fp8"),
        ({"efficiency": {"value": 40, "source": "s"}}, "efficiency is a share"),
    ],
)
def test_invalid_profiles_say_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError, match=r"^m\.yaml: ") as refusal:
        parse_machine("m", profile(**changes), where="m.yaml")
    assert message in str(refusal.value)


@pytest.mark.parametrize("text", ["- a list", "a: [", ""])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ProfileError, match=r"broken\.yaml"):
        load_machine(path)
