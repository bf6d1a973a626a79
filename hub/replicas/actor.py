"""What runs in a replica's own process: an engine, with the model loaded on that machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from blocks.adapters import Adapter, LoraSpec
from blocks.device import pick_device
from blocks.manifest import make_manifest, model_hash
from blocks.optimizer import Schedule
from blocks.source import open_model
from hub.engine import Engine, EngineSettings, Standing
from hub.jobs import InferItem, StepItem
from hub.loading import DTYPES, kv_bytes
from hub.replicas.parted import Rest, forget_parted, note_parted
from hub.replicas.plain import packed_outcome, unpacked, unpacked_item
from messaging.errors import FedseaError, InputError
from messaging.messages import Tensor


@dataclass(frozen=True)
class Plan:
    """What a replica is made of: the model by its name and hash, the adapter, and where it computes.

    `share`: how many replicas share a machine's cores and memory. `threads` 0: this one's share of the cores.
    """

    model: str
    hash: str
    spec: LoraSpec
    schedule: Schedule
    dtype: str
    devices: tuple[str, ...]
    share: int
    threads: int
    recompute: bool = False


@dataclass(frozen=True)
class Figures:
    """What a replica tells of itself with every answer."""

    versions: frozenset[int]
    streams: int
    kv_used: int
    kv_most: int
    evicted: int


class Replica:
    """An engine for another process to use. Every method answers with what was asked, and the figures as of then."""

    def __init__(self, plan: Plan) -> None:
        #: why it cannot work; None when it can
        self._trouble: str | None = None
        self._parted: dict[Rest, InferItem] = {}
        try:
            self._engine = _load(plan)
        except FedseaError as error:
            self._trouble = str(error)

    def begin(self) -> tuple[str | None, str, int]:
        """Why it cannot work, or None; its machine's name and its process."""
        return self._trouble, socket.gethostname(), os.getpid()

    def figures(self) -> Figures:
        """As of now."""
        engine = self._engine
        return Figures(
            frozenset(engine.versions), engine.streams, engine.budget.used, engine.budget.most, engine.evicted
        )

    def step_forward(self, items: Sequence[StepItem], micro: int) -> tuple[dict[int, object], Figures]:
        """See Engine."""
        answers = self._engine.step_forward([unpacked_item(item) for item in items], micro)
        return {session: packed_outcome(answer) for session, answer in answers.items()}, self.figures()

    def step_backward(self, grads: Mapping[int, Tensor], micro: int) -> tuple[dict[int, object], Figures]:
        """See Engine."""
        answers = self._engine.step_backward({session: unpacked(grad) for session, grad in grads.items()}, micro)
        return {session: packed_outcome(answer) for session, answer in answers.items()}, self.figures()

    def apply_step(self, sessions: Sequence[int]) -> tuple[None, Figures]:
        """See Engine."""
        self._engine.apply_step(sessions)
        return None, self.figures()

    def infer(self, items: Sequence[InferItem | Rest], upto: Mapping[int, int]) -> tuple[list[object], Figures]:
        """See Engine, which goes on with an item that is the very same: so `Rest` stands for one that is here."""
        here = [self._parted[item] if isinstance(item, Rest) else unpacked_item(item) for item in items]
        answers = self._engine.infer(here, upto)
        note_parted(self._parted, here, answers)
        return [None if answer is None else packed_outcome(answer) for answer in answers], self.figures()

    def close_stream(self, session: int, stream: int) -> tuple[None, Figures]:
        """See Engine."""
        self._engine.close_stream(session, stream)
        forget_parted(self._parted, session, stream)
        return None, self.figures()

    def close_session(self, session: int) -> tuple[None, Figures]:
        """See Engine."""
        self._engine.close_session(session)
        forget_parted(self._parted, session)
        return None, self.figures()

    def standing(self) -> tuple[Standing, Figures]:
        """See Engine."""
        return self._engine.standing(), self.figures()

    def restore(self, standing: Standing) -> tuple[None, Figures]:
        """See Engine."""
        self._engine.restore(standing)
        return None, self.figures()

    def publish(self, version: int, adapter: Adapter, keep: Collection[int]) -> tuple[None, Figures]:
        """See Engine."""
        self._engine.publish(version, adapter, keep)
        return None, self.figures()

    def begin_round(self, version: int, adapter: Adapter, keep: Collection[int]) -> tuple[None, Figures]:
        """See Engine."""
        self._engine.begin_round(version, adapter, keep)
        return None, self.figures()


def _load(plan: Plan) -> Engine:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(plan.threads or max(1, cores // plan.share))
    devices = tuple(pick_device(name) for name in plan.devices)
    files = open_model(plan.model)
    if model_hash(make_manifest(files)) != plan.hash:
        raise InputError(
            f"{plan.model} on {socket.gethostname()} is not the model that the hub has under this name: "
            "copy the hub's there, at the same path"
        )
    memory = partial(kv_bytes, devices, plan.share)
    settings = EngineSettings(plan.spec, plan.schedule, DTYPES[plan.dtype], devices, memory, plan.recompute)
    return Engine(files.config, files.source, settings)
