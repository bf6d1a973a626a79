"""Bring a model into the engine, and say how far it is; what it may use of the machine."""

from __future__ import annotations

import re
from collections.abc import Sequence

import psutil
import torch

from blocks.device import free_on
from blocks.source import ModelFiles
from blocks.surgery import LayerNames
from blocks.weights import Watched
from hub.engine import Engine, EngineSettings
from messaging.console import Journal
from profiles.cgroup import cgroup_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def kv_bytes(devices: Sequence[torch.device], share: int = 1) -> int:
    """A quarter of the memory that is free before anybody generates; `share` engines share the machine's.

    Of several GPUs, half of what the fullest has: streams may be those of layers that are all on one of them.
    """
    gpus = list(free_on(devices).values())
    if len(gpus) > 1:
        return min(gpus) // 2
    return gpus[0] // 4 if gpus else free_bytes() // (4 * share)


def free_bytes() -> int:
    """Memory that this process may still use: the machine's, or what a container leaves of it."""
    limited, free = cgroup_memory(), psutil.virtual_memory().available
    return free if limited is None else min(free, limited[1])


def load_engine(files: ModelFiles, layers: LayerNames, settings: EngineSettings, journal: Journal) -> Engine:
    """The engine with its layers filled from the model's files."""
    middle = re.compile(rf"(^|\.){re.escape(layers.attribute)}\.[1-9]\d*\.")
    sizes = [files.source.info(name).nbytes for name in files.source.names() if middle.search(name)]
    with journal.task("loading the model", sum(sizes)) as task:
        engine = Engine(files.config, Watched(files.source, task.advance), settings)
    for device, numbers in engine.homes.items():
        journal.log(f"layers {numbers[0]} to {numbers[-1]} are on {device}")
    return engine
