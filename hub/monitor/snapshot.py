"""What the hub's screen shows, as plain data; and as one line of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from messaging.console.figures import human_bytes, joined, number, of_total


@dataclass(frozen=True)
class EdgeRow:
    """One edge as the hub sees it. `loss` is None unless the edge shares it."""

    name: str
    partition: str
    state: str
    tokens_per_s: float | None = None
    round_trip_ms: float | None = None
    loss: float | None = None
    noise_sigma: float | None = None
    noise_r: float | None = None
    sessions: int = 0
    #: Seconds since the last sign of life.
    silent_s: float = 0.0


STARTING_AGAIN, GONE = "starting again", "gone"


@dataclass(frozen=True)
class ReplicaRow:
    """One replica of B: its process, the sessions of its edges, its optimizer steps in all and in this round."""

    name: str
    where: str
    state: str
    training: int
    generating: int
    hub_step: int
    round_step: int
    streams: int

    @property
    def troubled(self) -> bool:
        """Whether its process is not there."""
        return self.state in (STARTING_AGAIN, GONE)


@dataclass(frozen=True)
class HubSnapshot:
    """One moment of `hub serve`. None: not known (yet), or, for a total, open-ended."""

    model: str
    dtype: str
    phase: str
    #: The layers hosted, first and last, of the model's count.
    first_layer: int = 0
    last_layer: int = 0
    layers: int = 0
    endpoints: tuple[str, ...] = ()
    uptime_s: float = 0.0
    adapter_version: int = 0
    round: int = 0
    rounds: int | None = None
    round_step: int = 0
    round_steps: int = 0
    #: Optimizer steps of B since the hub's first start.
    hub_step: int = 0
    cohort_joined: int = 0
    cohort_size: int = 0
    edges: tuple[EdgeRow, ...] = ()
    #: empty where B runs in the hub's own process
    replicas: tuple[ReplicaRow, ...] = ()
    #: Occupancy, averaged over the recent batches.
    edges_per_step: float | None = None
    sessions_per_decode: float | None = None
    queued: int = 0
    streams: int = 0
    kv_bytes: int = 0
    kv_budget_bytes: int = 0
    #: streams that lost their memory to others since the start
    evicted: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    bytes_in_per_s: float | None = None
    bytes_out_per_s: float | None = None
    log: tuple[str, ...] = ()


def from_fields(fields: Mapping[str, Any]) -> HubSnapshot:
    """The snapshot whose `dataclasses.asdict` went through JSON; other fields raise TypeError."""
    return HubSnapshot(
        **{
            **fields,
            "endpoints": tuple(fields["endpoints"]),
            "edges": tuple(EdgeRow(**edge) for edge in fields["edges"]),
            "replicas": tuple(ReplicaRow(**replica) for replica in fields["replicas"]),
            "log": tuple(fields["log"]),
        }
    )


def total_tokens_per_s(snapshot: HubSnapshot) -> float:
    """The speed of all edges together."""
    return sum(edge.tokens_per_s or 0.0 for edge in snapshot.edges)


def progress(snapshot: HubSnapshot) -> object:
    """What makes another plain line worth printing."""
    return snapshot.hub_step, snapshot.round


def plain_line(snapshot: HubSnapshot) -> str:
    """The state on one line, in ASCII."""
    return joined(
        [
            f"round {of_total(snapshot.round, snapshot.rounds)}",
            f"step {of_total(snapshot.round_step, snapshot.round_steps or None)}",
            f"cohort {of_total(snapshot.cohort_joined, snapshot.cohort_size)}",
            f"{number(total_tokens_per_s(snapshot))} tokens/s",
            f"KV {human_bytes(snapshot.kv_bytes)}" if snapshot.kv_bytes else "",
            f"in {human_bytes(snapshot.bytes_in)}",
            f"out {human_bytes(snapshot.bytes_out)}",
        ]
    )
