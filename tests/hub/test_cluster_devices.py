"""Which devices each replica of a Ray cluster gets; the cluster is made up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hub.replicas.cluster import Cluster
from messaging.errors import InputError


def cluster(*gpus: int, dead: int = 0) -> Cluster:
    """Machines with so many GPUs and eight cores each, and a dead one."""
    machines = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": float(count)}} for count in gpus]
    machines += [{"Alive": False, "Resources": {"CPU": 8.0, "GPU": float(dead)}}] if dead else []
    totals = {"CPU": 8.0 * len(gpus), "GPU": float(sum(gpus))}
    made = Cluster.__new__(Cluster)
    made._ray = SimpleNamespace(cluster_resources=lambda: totals, nodes=lambda: machines)
    return made


def test_a_replicas_gpus_have_numbers_of_their_own() -> None:
    assert cluster(4).devices("cuda", 4) == ("cuda:0",)
    assert cluster(4).devices("cuda:2", 2) == ("cuda:0",)
    assert cluster(4).devices("cuda:2,cuda:3", 2) == ("cuda:0", "cuda:1")
    assert cluster(2).devices("cpu,cuda:1", 2) == ("cpu", "cuda:0")
    assert cluster(0).devices("cpu", 8) == ("cpu",)


def test_auto_takes_a_gpu_each_where_there_are_enough() -> None:
    assert cluster(1, 1).devices("auto", 2) == ("cuda:0",)
    assert cluster(1, 0).devices("auto", 2) == ("cpu",)


def test_all_gpus_of_a_replica_are_on_one_machine() -> None:
    assert cluster(2, 3).devices("cuda:0,cuda:1", 2) == ("cuda:0", "cuda:1")
    with pytest.raises(InputError, match="--device cuda:0,cuda:1: the Ray cluster's machines have the GPUs for 2"):
        cluster(3, 3).devices("cuda:0,cuda:1", 3)
    with pytest.raises(InputError, match="GPUs for 1"):
        cluster(1, dead=4).devices("cuda", 2)


def test_each_replica_needs_a_core() -> None:
    with pytest.raises(InputError, match="each needs a core, and the Ray cluster has 8"):
        cluster(16).devices("cuda", 9)
