"""Which group an edge's session goes to: a function of how many there are in each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """Sessions of a group: those that train, and those that generate."""

    training: int
    generating: int


def place(loads: Mapping[int, Load], train: bool) -> int:
    """The least loaded of the groups that run; those who train are spread first, the lowest number breaks ties."""

    def weight(group: int) -> tuple[int, int, int]:
        load = loads[group]
        same, other = (load.training, load.generating) if train else (load.generating, load.training)
        return same, other, group

    return min(loads, key=weight)
