"""An engine that is another process: the methods of the engine here, and one error when it is gone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hub.engine import Standing
from hub.jobs import InferItem, Outcome, StepItem
from hub.replicas.actor import Figures, Plan
from hub.replicas.cluster import Cluster
from hub.replicas.parted import Rest, forget_parted, note_parted
from hub.replicas.plain import packed, packed_item, unpacked_outcome
from messaging.messages import Tensor

_NOTHING = Figures(frozenset({0}), 0, 0, 0, 0)


@dataclass(frozen=True)
class Memory:
    """Bytes of KV caches, used and at most."""

    used: int
    most: int


class RemoteEngine:
    """Replica `number` of a cluster. One thread asks; figures may be read by any. ReplicaLost when it is gone."""

    def __init__(self, cluster: Cluster, plan: Plan, number: int) -> None:
        self._cluster = cluster
        self._plan = plan
        self.name = f"replica {number + 1}"
        #: its machine and process
        self.where = ""
        self._actor: Any = None
        self._figures = _NOTHING
        #: the items that the replica has, and has computed a part of
        self._parted: dict[Rest, InferItem] = {}

    def start(self) -> None:
        """Start its process, anew if there was one. InputError if it cannot work there, ReplicaLost if not at all."""
        if self._actor is not None:
            self._cluster.end(self._actor)
        self._figures, self._parted = _NOTHING, {}
        self._actor, self.where = self._cluster.start(self._plan, self.name)

    def _ask(self, method: Any, *arguments: object) -> Any:
        answer, self._figures = self._cluster.ask(method.remote(*arguments), self.name)
        return answer

    # -- as the engine --------------------------------------------------------------------------------

    def step_forward(self, items: Sequence[StepItem], micro: int = 0) -> dict[int, Outcome]:
        """See Engine."""
        answers = self._ask(self._actor.step_forward, [packed_item(item) for item in items], micro)
        return {session: unpacked_outcome(answer) for session, answer in answers.items()}

    def step_backward(self, grads: Mapping[int, object], micro: int = 0) -> dict[int, Outcome]:
        """See Engine."""
        given = {session: packed(grad) for session, grad in grads.items() if isinstance(grad, Tensor)}
        answers = self._ask(self._actor.step_backward, given, micro)
        return {session: unpacked_outcome(answer) for session, answer in answers.items()}

    def apply_step(self, sessions: Sequence[int]) -> None:
        """See Engine."""
        self._ask(self._actor.apply_step, tuple(sessions))

    def infer(self, items: Sequence[InferItem], upto: Mapping[int, int] | None = None) -> list[Outcome | None]:
        """See Engine."""
        answers = self._ask(self._actor.infer, [self._crossing(item) for item in items], dict(upto or {}))
        note_parted(self._parted, items, answers)
        return [None if answer is None else unpacked_outcome(answer) for answer in answers]

    def _crossing(self, item: InferItem) -> InferItem | Rest:
        """What is sent of an item: only its stream, if this very one is there already."""
        stream = Rest(item.session, item.stream)
        return stream if self._parted.get(stream) is item else packed_item(item)

    def close_stream(self, session: int, stream: int) -> None:
        """See Engine."""
        self._ask(self._actor.close_stream, session, stream)
        forget_parted(self._parted, session, stream)

    def close_session(self, session: int) -> None:
        """See Engine."""
        self._ask(self._actor.close_session, session)
        forget_parted(self._parted, session)

    def standing(self) -> Standing:
        """See Engine."""
        standing: Standing = self._ask(self._actor.standing)
        return standing

    def restore(self, standing: Standing) -> None:
        """See Engine."""
        self._ask(self._actor.restore, standing)

    def publish(self, version: int, adapter: Mapping[str, torch.Tensor], keep: Collection[int]) -> None:
        """See Engine."""
        self._ask(self._actor.publish, version, dict(adapter), set(keep))

    def begin_round(self, version: int, adapter: Mapping[str, torch.Tensor], keep: Collection[int]) -> None:
        """See Engine."""
        self._ask(self._actor.begin_round, version, dict(adapter), set(keep))

    @property
    def versions(self) -> set[int]:
        """Adapter versions that are served."""
        return set(self._figures.versions)

    @property
    def streams(self) -> int:
        """Streams that hold memory."""
        return self._figures.streams

    @property
    def evicted(self) -> int:
        """Streams that lost their memory to others so far."""
        return self._figures.evicted

    @property
    def budget(self) -> Memory:
        """Bytes of the streams' caches."""
        return Memory(self._figures.kv_used, self._figures.kv_most)
