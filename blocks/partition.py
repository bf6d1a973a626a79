"""Which layers the edge hosts and which the hub runs."""

from __future__ import annotations

from dataclasses import dataclass

from messaging.errors import InputError


@dataclass(frozen=True, order=True)
class Partition:
    """`p:q`: the edge hosts the first `p` and the last `q` layers, the hub runs layers p .. N-q."""

    p: int
    q: int

    @classmethod
    def parse(cls, text: str) -> Partition:
        """Read `p:q`. Raises InputError when the text is anything else."""
        try:
            p, q = (int(part) for part in text.split(":"))
        except ValueError:
            raise InputError(f"'{text}' is no partition: write p:q, for example 1:1 (or auto)") from None
        return cls(p, q)

    def __str__(self) -> str:
        return f"{self.p}:{self.q}"

    def leave(self, num_layers: int) -> int:
        """The absolute index of the first layer of Blocks C."""
        return num_layers - self.q

    def check(self, num_layers: int) -> None:
        """Raise InputError unless p >= 1, q >= 0 and the hub keeps at least one layer."""
        if self.p < 1 or self.q < 0:
            raise InputError(f"partition {self}: p must be at least 1 and q at least 0")
        if self.p + self.q >= num_layers:
            raise InputError(
                f"partition {self} leaves the hub nothing: the model has {num_layers} layers, "
                f"so p + q may be at most {num_layers - 1}"
            )
