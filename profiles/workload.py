"""What an edge is asked to do, and the link it has for it."""

from __future__ import annotations

from dataclasses import dataclass

from profiles.errors import PlanError

#: Bytes of one value, by torch's name of the dtype. The dtypes that weights and wire can have.
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

#: Bytes of one quantized weight, scales included, by its bits: int8 with 5 bytes for each row (here of 2,048), NF4
#: with one for each block of 64 and four more for each 256 of those.
QUANTIZED_BYTES = {8: 1 + 5 / 2048, 4: 0.5 + 1 / 64 + 4 / (64 * 256)}


@dataclass(frozen=True)
class Link:
    """The connection to the hub as measured: round trip in seconds, both directions in bytes per second."""

    round_trip_s: float
    bytes_per_s_up: float
    bytes_per_s_down: float

    def __post_init__(self) -> None:
        if self.round_trip_s < 0 or self.bytes_per_s_up <= 0 or self.bytes_per_s_down <= 0:
            raise PlanError(f"{self}: the round trip must not be negative, and both rates must be above 0")


@dataclass(frozen=True)
class Workload:
    """One step of an edge: `batch` rows of `seq` tokens.

    `training`: forward, loss and backward with a LoRA adapter of `lora_rank`; else generation, where a step is
    one decoded token for each row and `seq` the longest text that a row's KV cache must hold.
    `dtype`: of base weights and wire, as torch names it, or "auto" to let the planner take the machine's fastest.
    `bits`: 8 or 4 where the edge's linear layers are quantized, None where they have the dtype.
    """

    batch: int
    seq: int
    dtype: str = "auto"
    training: bool = True
    lora_rank: int = 8
    bits: int | None = None

    def __post_init__(self) -> None:
        if self.batch < 1 or self.seq < 1 or self.lora_rank < 1:
            raise PlanError(f"batch ({self.batch}), seq ({self.seq}) and LoRA rank ({self.lora_rank}) must be >= 1")
        if self.bits is not None and self.bits not in QUANTIZED_BYTES:
            raise PlanError(f"weights in {self.bits} bits: give one of {', '.join(map(str, QUANTIZED_BYTES))}, or none")
        if self.dtype != "auto" and self.dtype not in DTYPE_BYTES:
            raise PlanError(f"unknown dtype '{self.dtype}': use auto, {', '.join(DTYPE_BYTES)}")

    @property
    def value_bytes(self) -> int:
        """Bytes of one weight or one value on the wire. Raises PlanError while the dtype is "auto"."""
        if self.dtype == "auto":
            raise PlanError("the dtype is still 'auto': choose one (plan() does), then ask for bytes")
        return DTYPE_BYTES[self.dtype]

    @property
    def linear_bytes(self) -> float:
        """Bytes of one weight of the edge's linear layers. Raises PlanError while the dtype is "auto"."""
        return self.value_bytes if self.bits is None else QUANTIZED_BYTES[self.bits]
