"""What the edge's screen shows, as plain data; and as one line of text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from messaging.console.figures import human_bytes, joined, loss_text, number, of_total


@dataclass(frozen=True)
class TimeSpent:
    """Seconds that the run's steps have spent in each place, so far."""

    blocks_a: float = 0.0
    link: float = 0.0
    hub: float = 0.0
    blocks_c: float = 0.0
    other: float = 0.0


@dataclass(frozen=True)
class EdgeSnapshot:
    """One moment of `edge join`. None: not known (yet), or, for a total, open-ended."""

    name: str
    hub: str
    phase: str
    model: str = ""
    partition: str = ""
    #: The dtype on the wire, if it was chosen; empty for the model's own.
    wire: str = ""
    cohort_joined: int = 0
    cohort_size: int = 0
    step: int = 0
    steps: int | None = None
    round: int = 0
    rounds: int | None = None
    #: Steps done in this round, and of how many; 0 where the recipe is not known yet.
    round_step: int = 0
    round_steps: int = 0
    eta_s: float | None = None
    #: The last step's loss, and the curve of all, oldest first, thinned out as it grows (`Curve`).
    loss: float | None = None
    losses: tuple[float, ...] = ()
    held_out_before: float | None = None
    held_out_last: float | None = None
    tokens_per_s: float | None = None
    round_trip_ms: float | None = None
    time_spent: TimeSpent = TimeSpent()
    bytes_sent: int = 0
    bytes_received: int = 0
    #: The paper's scale (mean |noise|), its standard deviation, and r = mean |noise| / mean |state|.
    noise_scale: float = 0.0
    noise_sigma: float = 0.0
    noise_r: float | None = None
    log: tuple[str, ...] = ()
    #: What is wrong with the hub just now, in words; empty when all is well.
    trouble: str = ""


def from_fields(fields: Mapping[str, Any]) -> EdgeSnapshot:
    """The snapshot whose `dataclasses.asdict` went through JSON; other fields raise TypeError."""
    return EdgeSnapshot(
        **{
            **fields,
            "losses": tuple(math.nan if value is None else value for value in fields["losses"]),
            "time_spent": TimeSpent(**fields["time_spent"]),
            "log": tuple(fields["log"]),
        }
    )


def progress(snapshot: EdgeSnapshot) -> object:
    """What makes another plain line worth printing."""
    return snapshot.step, snapshot.round, snapshot.held_out_last


def plain_line(snapshot: EdgeSnapshot) -> str:
    """The state on one line, in ASCII."""
    held_out = snapshot.held_out_last
    return joined(
        [
            f"round {of_total(snapshot.round, snapshot.rounds)}",
            f"step {of_total(snapshot.step, snapshot.steps)}",
            f"loss {loss_text(snapshot.loss)}",
            f"held-out {loss_text(held_out)}" if held_out is not None else "",
            f"{number(snapshot.tokens_per_s)} tokens/s",
            f"sent {human_bytes(snapshot.bytes_sent)}",
            f"received {human_bytes(snapshot.bytes_received)}",
        ]
    )
