"""Start all replicas of a hub, side by side: each loads the model by itself."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace

import torch

from blocks.device import pick_devices
from hub.replicas.actor import Plan
from hub.replicas.cluster import Cluster
from hub.replicas.remote import RemoteEngine
from hub.store.checkpoints import Checkpoint
from hub.worker import Versions, bring_up
from messaging.console import Journal


@contextmanager
def compute_place(
    device: str, replicas: int | None, address: str | None
) -> Iterator[tuple[Cluster | None, tuple[torch.device, ...]]]:
    """Where B computes: in this process (`replicas` None), or in processes of a cluster, which is let go at the end."""
    if replicas is None:
        yield None, pick_devices(device)
        return
    with closing(Cluster(address, replicas)) as cluster:
        yield cluster, tuple(torch.device(name) for name in cluster.devices(device, replicas))


def start_replicas(
    cluster: Cluster, plan: Plan, parts: Sequence[Checkpoint], versions: Versions, journal: Journal
) -> list[RemoteEngine]:
    """A replica for each part, which stands there and serves these versions. InputError if one cannot be had."""
    threads = int(os.environ.get("OMP_NUM_THREADS") or 0)
    plan = replace(plan, share=cluster.share(len(parts)), threads=threads)
    engines = [RemoteEngine(cluster, plan, number) for number in range(len(parts))]
    with journal.task(f"starting {len(parts)} replicas"), ThreadPoolExecutor(len(parts)) as pool:
        for _ in pool.map(lambda engine, part: bring_up(engine, part, versions), engines, parts):
            pass
    for engine in engines:
        journal.log(f"{engine.name} runs on {engine.where}")
    return engines
