"""A cluster without Ray: replicas in the hub's own process, which die when a test says so.

`DIES` in the environment is a list of `REPLICA#START:METHOD:N:before` or `...:after`, with commas: this start of the
replica is gone before or after it does what the N-th call of this method asks. `REFUSES` names a replica that
cannot be started again. `HUB_DIES` is as `DIES`, but the hub is killed.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from types import SimpleNamespace
from typing import Any

import hub.replicas.assembly
from hub.replicas.actor import Plan, Replica
from hub.replicas.errors import ReplicaLost


class _Process:
    """As Ray's handle of an actor: `process.method.remote(...)` is what `ask` carries out."""

    def __init__(self, replica: Replica) -> None:
        self.alive = True
        self.calls: Counter[str] = Counter()
        self._replica = replica

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: (self, method, arguments))

    def carry_out(self, method: str, arguments: tuple[object, ...]) -> Any:
        self.calls[method] += 1
        return getattr(self._replica, method)(*arguments)


class StandIn:
    """In the place of `hub.replicas.cluster.Cluster`."""

    def __init__(self, address: str | None, replicas: int) -> None:
        self._starts: Counter[str] = Counter()
        self._dies = os.environ.get("DIES", "").split(",")
        self._hub_dies = os.environ.get("HUB_DIES", "")
        self._refuses = os.environ.get("REFUSES", "")

    def devices(self, wanted: str, replicas: int) -> tuple[str, ...]:
        """See Cluster."""
        return ("cpu",)

    def share(self, replicas: int) -> int:
        return replicas

    def start(self, plan: Plan, name: str) -> tuple[Any, str]:
        self._starts[name] += 1
        if self._starts[name] > 1 and name == self._refuses:
            raise ReplicaLost(f"there is no room for {name}")
        return _Process(Replica(plan)), f"here, start {self._starts[name]}"

    def ask(self, call: tuple[_Process, str, tuple[object, ...]], name: str) -> Any:
        process, method, arguments = call
        now = f"{name}#{self._starts[name]}:{method}:{process.calls[method] + 1}"
        self._perhaps_end(process, f"{now}:before")
        if process.alive:
            answer = process.carry_out(method, arguments)
            self._perhaps_end(process, f"{now}:after")
        if not process.alive:
            raise ReplicaLost(f"{name} is gone")
        return answer

    def _perhaps_end(self, process: _Process, now: str) -> None:
        if now == self._hub_dies:
            os.kill(os.getpid(), signal.SIGKILL)
        if now in self._dies:
            process.alive = False

    def end(self, process: _Process) -> None:
        process.alive = False

    def close(self) -> None:
        pass


def without_ray() -> None:
    """For `Programs.serve(prepare=...)`."""
    hub.replicas.assembly.Cluster = StandIn  # type: ignore[assignment,misc]
