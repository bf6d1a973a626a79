"""Ray, which starts the replicas' processes here or on other machines; imported only when somebody asks for it."""

from __future__ import annotations

import math
import os
import secrets
import shutil
import sys
import tempfile
import time
from itertools import count
from typing import Any

import psutil

from blocks.device import pick_device
from hub.replicas.actor import Plan, Replica
from hub.replicas.errors import ReplicaLost
from messaging.errors import InputError

#: Loading a model takes as long as its disk does; finding room for a process does not.
_START_S, _ROOM_S, _LOOK_S = 900.0, 30.0, 0.5
_STORE_BYTES = 1 << 30


class Cluster:
    """A Ray cluster: the one at `address`, or one of this machine alone that ends with this object."""

    def __init__(self, address: str | None, replicas: int) -> None:
        if address is None:
            # Ray reads these from the environment alone, when it is imported: no report to its makers, a cluster that
            # listens on 127.0.0.1 alone (its default on Windows), and a token that is on no disk.
            os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        self._ray = _import_ray()
        self._folder: str | None = None
        try:
            if address is None:
                self._begin_here(replicas)
            else:
                self._ray.init(address=address, **_QUIET, job_config=self._paths())
        except Exception as error:  # Ray raises what its parts do
            self.close()
            where = f"no Ray cluster answers at {address}: start one with `ray start --head`" if address else "Ray"
            raise InputError(f"{where} ({' '.join(str(error).split())[:300]})") from error

    def _begin_here(self, replicas: int) -> None:
        # Its sockets' paths have to be short, so not in the hub's state. It is gone when the hub is.
        self._folder = tempfile.mkdtemp(prefix="fedsea-")
        self._ray.init(
            num_cpus=replicas,
            include_dashboard=False,
            object_store_memory=min(_STORE_BYTES, max(psutil.virtual_memory().available // 8, 80 << 20)),
            _temp_dir=self._folder,
            # Memory here is the kernel's business, as it is for a hub without replicas: Ray's own watch would end
            # replicas because something else on this machine has grown. And they compute like a hub without
            # replicas: Ray would put them behind all else that runs here (nice 15).
            _system_config={"memory_monitor_refresh_ms": 0, "worker_niceness": 0},
            job_config=self._paths(),
            **_QUIET,
        )

    def _paths(self) -> Any:
        """The replicas' processes find the hub's code where this process does."""
        return self._ray.job_config.JobConfig(_py_driver_sys_path=[path for path in sys.path if path])

    def devices(self, wanted: str, replicas: int) -> tuple[str, ...]:
        """What each replica computes on. Its GPUs, as many as `wanted` names, have numbers of their own in its process.

        InputError if the cluster is too small for all of them.
        """
        resources = self._ray.cluster_resources()
        gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
        if cores < replicas:
            raise InputError(f"--replicas {replicas}: each needs a core, and the Ray cluster has {cores}")
        if wanted == "auto":
            return ("cuda:0",) if gpus >= replicas else ("cpu",)
        names = [name.strip() for name in wanted.split(",")]
        each = sum(_is_gpu(name) for name in names)
        room = sum(_gpus(node) // each for node in self._ray.nodes() if node["Alive"]) if each else replicas
        if room < replicas:
            raise InputError(
                f"--replicas {replicas} on --device {wanted}: the Ray cluster's machines have the GPUs for {room}"
            )
        number = count()
        return tuple(f"cuda:{next(number)}" if _is_gpu(name) else str(pick_device(name)) for name in names)

    def share(self, replicas: int) -> int:
        """How many replicas a machine has."""
        nodes = sum(1 for node in self._ray.nodes() if node["Alive"])
        return math.ceil(replicas / max(nodes, 1))

    def start(self, plan: Plan, name: str) -> tuple[Any, str]:
        """A process for a replica, and where it is. ReplicaLost if none can be had, InputError if it cannot work."""
        needs = {"num_cpus": 1, "num_gpus": sum(map(_is_gpu, plan.devices))}
        self._wait_for_room(needs, name)
        actor = self._ray.remote(Replica).options(**needs, max_restarts=0, scheduling_strategy="SPREAD").remote(plan)
        try:
            trouble, host, process = self.ask(actor.begin.remote(), name, _START_S)
        except ReplicaLost:
            self.end(actor)
            raise
        if trouble is not None:
            self.end(actor)
            raise InputError(f"{name}: {trouble}")
        return actor, f"{host}, process {process}"

    def _wait_for_room(self, needs: dict[str, int], name: str) -> None:
        deadline = time.monotonic() + _ROOM_S
        while True:
            free = self._ray.available_resources()
            if free.get("CPU", 0) >= needs["num_cpus"] and free.get("GPU", 0) >= needs["num_gpus"]:
                return
            if time.monotonic() > deadline:
                raise ReplicaLost(f"the Ray cluster has no room for {name}, which needs a core and its devices")
            time.sleep(_LOOK_S)

    def ask(self, answer: Any, name: str, timeout_s: float | None = None) -> Any:
        """Wait for an answer. ReplicaLost if who was asked is gone; what it died of itself is raised as it is."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(answer, timeout=timeout_s)
        except errors.RayTaskError:
            raise
        except errors.GetTimeoutError as error:
            raise ReplicaLost(f"{name} did not start within {timeout_s:.0f} s") from error
        except errors.RayError as error:
            raise ReplicaLost(f"{name} is gone ({type(error).__name__})") from error

    def end(self, actor: Any) -> None:
        """End a replica's process, if it still runs."""
        self._ray.kill(actor)

    def close(self) -> None:
        """Let go of the cluster; one of this machine alone ends with all of its processes."""
        self._ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _is_gpu(device: str) -> bool:
    return device.partition(":")[0] == "cuda"


def _gpus(node: Any) -> int:
    """The GPUs of one of Ray's machines."""
    return int(node["Resources"].get("GPU", 0))


_QUIET: dict[str, Any] = {"configure_logging": False, "log_to_driver": False, "logging_level": "CRITICAL"}


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
        import ray.job_config
    except ImportError as error:
        raise InputError("--replicas needs Ray, which is not installed: pip install 'fedsea[cluster]'") from error
    return ray
