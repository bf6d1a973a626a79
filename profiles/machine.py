"""A machine as the planner sees it, and the profiles that describe the machines people have.

Profiles are YAML. Every figure carries its source, and a figure that nobody can source is left out. Vendors'
"24 GB" is read as 24 * 10^9 bytes. The chips hold up to 7% more, and about as much goes to the driver and the
desktop, so this is the better guess of what a program can get.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from profiles.errors import ProfileError
from profiles.workload import DTYPE_BYTES

MACHINES = Path(__file__).parent / "machines"
DEVICES = ("cpu", "cuda", "mps")

#: Share of a data sheet's peak that training reaches when nobody measured it on the machine. Published runs lie
#: between 0.21 and 0.46 (table 3 of "PaLM", arXiv 2204.02311: model FLOPs utilization of GPT-3, Gopher,
#: Megatron-Turing NLG and PaLM). Probed machines have 1.0: their figure is what they reached.
DATASHEET_EFFICIENCY = 0.4


@dataclass(frozen=True)
class Machine:
    """One machine. `flops` is dense floating-point operations per second by dtype name (torch's).

    `efficiency` is the share of `flops` that training can be expected to reach, `sources` says for each figure
    where it comes from. On a machine that was not probed, `free_memory_bytes` is all of its memory.
    """

    name: str
    device: str
    memory_bytes: int
    free_memory_bytes: int
    bandwidth_bytes_per_s: float
    flops: Mapping[str, float]
    efficiency: float = 1.0
    description: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)

    def reachable_flops(self, dtype: str) -> float:
        """Operations per second to expect in `dtype`; without a figure of its own it counts as float32."""
        return self.flops.get(dtype, self.flops["float32"]) * self.efficiency


def known_machines() -> list[str]:
    """The names of the shipped profiles, in alphabetical order."""
    return sorted(path.stem for path in MACHINES.glob("*.yaml"))


def load_machine(name_or_file: str | Path) -> Machine:
    """The shipped profile of that name, or the profile in that file.

    Raises ProfileError when there is no such profile (the message lists the names), or it is not valid.
    """
    path = MACHINES / f"{name_or_file}.yaml" if str(name_or_file) in known_machines() else Path(name_or_file)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise ProfileError(
            f"no machine profile '{name_or_file}': give the path of a YAML file or one of {', '.join(known_machines())}"
        ) from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ProfileError(f"{path} is not YAML: {error}") from None
    return parse_machine(path.stem, content, where=str(path))


def parse_machine(name: str, content: object, where: str) -> Machine:
    """A Machine from a profile's parsed YAML. Raises ProfileError, which names `where` and the key at fault."""
    profile = _mapping(content, where, "the profile")
    required = {"description", "device", "memory_bytes", "memory_bandwidth_bytes_per_s", "flops"}
    _check_keys(profile, where, required, optional={"free_memory_bytes", "efficiency"})
    device = profile["device"]
    if device not in DEVICES:
        raise ProfileError(f"{where}: device is '{device}', it must be one of {', '.join(DEVICES)}")
    figures, sources = _figures(profile, where)
    flops = {key.removeprefix("flops."): value for key, value in figures.items() if key.startswith("flops.")}
    if figures.get("efficiency", 1.0) > 1:
        raise ProfileError(f"{where}: efficiency is a share of the peak, at most 1")
    return Machine(
        name=name,
        device=device,
        memory_bytes=int(figures["memory_bytes"]),
        free_memory_bytes=int(figures.get("free_memory_bytes", figures["memory_bytes"])),
        bandwidth_bytes_per_s=figures["memory_bandwidth_bytes_per_s"],
        flops=flops,
        efficiency=figures.get("efficiency", DATASHEET_EFFICIENCY),
        description=str(profile["description"]),
        sources=sources,
    )


def _figures(profile: Mapping[str, Any], where: str) -> tuple[dict[str, float], dict[str, str]]:
    """Every figure of the profile and every source, by key; a dtype's flops are under `flops.<dtype>`."""
    flops = _mapping(profile["flops"], where, "flops")
    _check_keys(flops, where, {"float32"}, optional=set(DTYPE_BYTES) - {"float32"}, prefix="flops.")
    entries = {key: value for key, value in profile.items() if key not in ("description", "device", "flops")}
    entries |= {f"flops.{dtype}": value for dtype, value in flops.items()}
    figures, sources = {}, {}
    for key, entry in entries.items():
        figure = _mapping(entry, where, key)
        _check_keys(figure, where, {"value", "source"}, prefix=f"{key}.")
        value, source = figure["value"], figure["source"]
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ProfileError(f"{where}: {key}.value is {value!r}, it must be a number above 0")
        if not isinstance(source, str) or not source.strip():
            raise ProfileError(f"{where}: {key} has no source; say where the figure comes from, or leave it out")
        figures[key], sources[key] = float(value), source
    return figures, sources


def _mapping(value: object, where: str, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ProfileError(f"{where}: {what} must be a mapping of names to values, not {value!r}")
    return value


def _check_keys(
    mapping: Mapping[str, Any], where: str, required: set[str], optional: set[str] | None = None, prefix: str = ""
) -> None:
    """Refuse missing keys and unknown ones: a misspelt key would be a figure that silently counts for nothing."""
    missing = sorted(required - mapping.keys())
    if missing:
        raise ProfileError(f"{where}: {prefix}{missing[0]} is missing")
    allowed = required | (optional or set())
    unknown = sorted(mapping.keys() - allowed)
    if unknown:
        raise ProfileError(f"{where}: unknown key {prefix}{unknown[0]}; known are {', '.join(sorted(allowed))}")
