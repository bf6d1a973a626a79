"""What of training goes to the disk: checkpoints of all groups in one file, and the adapter of each closed round."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from blocks import adapters
from blocks.adapters import Adapter
from blocks.surgery import LayerNames
from hub.aggregate import Contribution, weighted_mean
from hub.engine import Standing
from hub.jobs import EdgeAdapter
from hub.membership import Answered, MemberNote, answers_to_tensors, notes_to_json
from hub.scheduler import actions as act
from hub.store.checkpoints import Checkpoint
from hub.store.state import HubState
from messaging.messages import Recipe


@dataclass(frozen=True)
class Progress:
    """What a checkpoint needs to know of a group besides tensors.

    `applied` counts steps by edge key, `round_tokens` the target tokens of the open round. `gathered`: the cohort
    has begun. `answered`: answers that edges may not have heard.
    """

    hub_step: int
    round: int
    round_step: int
    version: int
    applied: Mapping[str, int]
    round_tokens: Mapping[str, int]
    members: tuple[MemberNote, ...]
    gathered: bool
    answered: tuple[Answered, ...] = ()


@dataclass(frozen=True)
class CheckpointWritten:
    """A checkpoint is on the disk; it holds so many steps of each edge, by key. `group`: who saved, None for all."""

    applied: Mapping[str, int]
    group: int | None = None


@dataclass(frozen=True)
class RoundMerged:
    """A round's adapter is on the disk, and so is a checkpoint that says so; the engines do not have it yet."""

    version: int
    adapter: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Failure:
    """A thread that the hub cannot go on without died of an exception."""

    error: BaseException


class Keeper:
    """Holds what each group last saved, and writes all of it together, in a thread of its own.

    `parts`: a checkpoint per group. Behind them may be parts of replicas that are no more: what those trained counts
    in the next average. `report` is called in the writing thread.
    """

    def __init__(
        self,
        state: HubState,
        recipe: Recipe,
        names: LayerNames,
        parts: Sequence[Checkpoint],
        groups: int,
        published: Mapping[str, torch.Tensor],
    ) -> None:
        self._state = state
        self._recipe = recipe
        self._names = names
        self._parts = list(parts)
        self._groups = groups
        self._published = dict(published)
        #: what each group has for the round that closes
        self._deposits: dict[int, Checkpoint] = {}
        self._lock = threading.Lock()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self.report: Callable[[CheckpointWritten | RoundMerged | Failure], None] = lambda _: None

    def part(self, group: int) -> Checkpoint:
        """What a group last saved: where it goes on if its replica dies."""
        with self._lock:
            return self._parts[group]

    def applied(self) -> dict[str, int]:
        """Steps of every edge, as its group last saved."""
        with self._lock:
            return all_applied(self._parts)

    def round_tokens(self) -> dict[str, int]:
        """Target tokens of every edge in the open round, as its group last saved."""
        with self._lock:
            return all_tokens(self._parts)

    def published(self) -> Adapter:
        """The adapter that the last closed round published, or the initial one."""
        with self._lock:
            return dict(self._published)

    def take(self, group: int, standing: Standing, progress: Progress) -> None:
        """Keep where a group stands. An edge that is here now is nowhere else any more."""
        with self._lock:
            self._parts = _with(self._parts, {group: _point(standing, progress)})

    def deposit(self, group: int, standing: Standing, progress: Progress) -> None:
        """Hold where a group stands for the round that closes; it is kept only if the round does."""
        point = _point(standing, progress)
        with self._lock:
            self._deposits[group] = point

    def save(self, group: int, standing: Standing, progress: Progress) -> Future[None]:
        """Keep where a group stands, and have it written with what the others saved last."""
        self.take(group, standing, progress)
        return self.write(group)

    def write(self, group: int | None = None) -> Future[None]:
        """Have all that is kept written; the future fails as the disk does."""
        with self._lock:
            return self._writer.submit(self._guarded, partial(self._write, tuple(self._parts), group))

    def close_round(self, actions: Sequence[act.CloseRound], pinned: Collection[int]) -> None:
        """Average what the edges uploaded and what every group has deposited; `RoundMerged` follows.

        A replica that is no more gives what it had when its group saved last.
        """
        self._writer.submit(self._guarded, partial(self._merge, tuple(actions), set(pinned)))

    def finish(self) -> None:
        """End the thread, once all is written."""
        self._writer.shutdown()

    # -- in the writing thread -------------------------------------------------------------------------

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self.report(Failure(error))
            raise

    def _write(self, parts: Sequence[Checkpoint], group: int | None) -> None:
        self._state.checkpoints.save(replace(parts[0], others=tuple(parts[1:])))
        self.report(CheckpointWritten(all_applied(parts), group))

    def _merge(self, actions: Sequence[act.CloseRound], pinned: set[int]) -> None:
        uploads = [upload for action in actions for upload in action.uploads]
        edges = [self._contribution(upload) for upload in uploads if isinstance(upload, EdgeAdapter)]
        with self._lock:
            parts, published = _with(self._parts, self._deposits), self._published
            self._deposits = {}
        merged = weighted_mean(published, [*edges, *(self._of_replica(part) for part in parts)])
        version, round_ = actions[0].version, actions[0].round + 1
        self._state.adapters.publish(version, round_, merged, self._recipe, pinned)
        with self._lock:
            self._parts = [_closed(part, version, round_, merged) for part in parts[: self._groups]]
            self._published = merged
            kept = tuple(self._parts)
        self._write(kept, None)
        self.report(RoundMerged(version, merged))

    def _contribution(self, upload: EdgeAdapter) -> Contribution:
        mine = {
            name: value
            for name, value in upload.tensors.items()
            if not upload.place.enter <= adapters.layer_of(name, self._names) < upload.place.leave
        }
        return Contribution(mine, dict.fromkeys(mine, upload.tokens))

    def _of_replica(self, part: Checkpoint) -> Contribution:
        tokens = part.extra["layer_tokens"]
        return Contribution(part.adapter, {name: tokens[adapters.layer_of(name, self._names)] for name in part.adapter})


def fresh(adapter: Mapping[str, torch.Tensor], layers: int, like: Checkpoint | None = None) -> Checkpoint:
    """The part of a replica that has not trained yet, in the round and version of `like`."""
    extra = {"layer_tokens": [0] * layers, "round_tokens": {}, "members": [], "gathered": False, "answered": []}
    round_, version = (like.round, like.version) if like is not None else (0, 0)
    return Checkpoint(0, round_, 0, version, {}, dict(adapter), {"|steps": torch.tensor(0)}, extra)


def _with(parts: Sequence[Checkpoint], new: Mapping[int, Checkpoint]) -> list[Checkpoint]:
    """The parts with new ones in their places; whom these know, the others forget.

    An edge that has moved away stays known where it was until its new group has saved.
    """
    known = {key for point in new.values() for key in point.applied}
    out = []
    for number, part in enumerate(parts):
        rest, point = without(part, known), new.get(number)
        out.append(rest if point is None else replace(point, applied={**rest.applied, **point.applied}))
    return out


def standing_of(part: Checkpoint) -> Standing:
    """The tensors of a part, as an engine takes them."""
    return Standing(part.adapter, part.optimizer, tuple(part.extra["layer_tokens"]))


def without(part: Checkpoint, keys: Collection[str]) -> Checkpoint:
    """A part that knows nothing of these edges; what they trained stays in its tensors."""
    if not keys & part.applied.keys():
        return part
    extra = dict(part.extra)
    extra["round_tokens"] = {key: value for key, value in extra["round_tokens"].items() if key not in keys}
    extra["members"] = [note for note in extra["members"] if note["key"] not in keys]
    return replace(part, applied={key: count for key, count in part.applied.items() if key not in keys}, extra=extra)


def all_applied(parts: Sequence[Checkpoint]) -> dict[str, int]:
    """Steps of every edge; each is in one part."""
    return {key: count for part in parts for key, count in part.applied.items()}


def all_tokens(parts: Sequence[Checkpoint]) -> dict[str, int]:
    """Target tokens of every edge in the open round."""
    return {key: count for part in parts for key, count in part.extra["round_tokens"].items()}


def _point(standing: Standing, progress: Progress) -> Checkpoint:
    blobs, answered = answers_to_tensors(progress.answered)
    extra: dict[str, Any] = {
        "layer_tokens": list(standing.layer_tokens),
        "round_tokens": dict(progress.round_tokens),
        "members": notes_to_json(progress.members),
        "gathered": progress.gathered,
        "answered": answered,
    }
    return Checkpoint(
        hub_step=progress.hub_step,
        round=progress.round,
        round_step=progress.round_step,
        version=progress.version,
        applied=dict(progress.applied),
        adapter=standing.adapter,
        optimizer=standing.optimizer,
        extra=extra,
        blobs=blobs,
    )


def _closed(part: Checkpoint, version: int, round_: int, merged: Mapping[str, torch.Tensor]) -> Checkpoint:
    """The part once the round is closed; the optimizer's moments stay."""
    members = [{**note, "contributes": False} for note in part.extra["members"]]
    zeros = [0] * len(part.extra["layer_tokens"])
    extra = {
        **part.extra,
        "layer_tokens": zeros,
        "round_tokens": {},
        "members": members,
        "gathered": True,
        "answered": [],
    }
    adapter = {name: merged[name] for name in part.adapter}
    return replace(part, round=round_, round_step=0, version=version, adapter=adapter, extra=extra, blobs={})
