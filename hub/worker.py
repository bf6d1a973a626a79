"""The compute thread: carries out one job at a time on the engine, and reports what came of it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, deserialize

from hub.engine import Engine
from hub.jobs import InferItem, StepItem
from hub.keeper import Failure, Keeper, Progress, RoundMerged, standing_of
from hub.replicas.errors import ReplicaLost
from hub.replicas.remote import RemoteEngine
from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.store.checkpoints import Checkpoint
from messaging.errors import FedseaError, ProtocolError

#: How often a replica may die while it is started.
_TRIES = 3


@dataclass(frozen=True)
class Deposited:
    """All that a group has for the round that closes is with the keeper."""


@dataclass(frozen=True)
class ReplicaDied:
    """The process of a replica is gone, and what it had in its memory."""

    why: str


@dataclass(frozen=True)
class ReplicaBack:
    """A replica runs again, and stands where its group saved last."""

    where: str


@dataclass(frozen=True)
class ReplicaGone:
    """A replica died and cannot be started again."""

    why: str


Report = ev.Event | Deposited | ReplicaDied | ReplicaBack | ReplicaGone | Failure
Versions = Mapping[int, Mapping[str, torch.Tensor]]


class Worker:
    """Runs the jobs of one group in a thread of its own; `report` is called there with what follows.

    `group` names its part in the keeper. Checkpoints are copied between two jobs, and written by another thread.
    """

    def __init__(
        self, engine: Engine | RemoteEngine, group: int, keeper: Keeper, report: Callable[[Report], None]
    ) -> None:
        self.engine = engine
        self._group = group
        self._keeper = keeper
        self._report = report
        self._jobs: queue.SimpleQueue[Callable[[], Report] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"compute {group}", daemon=True)

    def start(self) -> None:
        """Begin to take jobs."""
        self._thread.start()

    def put(self, action: act.Compute, progress: Progress | None) -> None:
        """Queue an action; `progress` of its group as of now, where the keeper is to have it."""
        self._jobs.put(lambda: self._carry_out(action, progress))

    def begin_round(self, merged: RoundMerged, keep: Collection[int]) -> None:
        """Queue the loading of a round's adapter; of the older versions those in `keep` stay."""

        def job() -> Report:
            self.engine.begin_round(merged.version, merged.adapter, keep)
            return ev.RoundPublished(merged.version)

        self._jobs.put(job)

    def revive(self, part: Checkpoint, versions: Versions) -> None:
        """Queue the start of another process for a replica that died; it goes on from `part` and serves `versions`."""

        def job() -> Report:
            assert isinstance(self.engine, RemoteEngine)
            try:
                bring_up(self.engine, part, versions)
            except FedseaError as error:
                return ReplicaGone(str(error))
            return ReplicaBack(self.engine.where)

        self._jobs.put(job)

    def stop(self) -> None:
        """Wait for the job under way, then end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def leave_to_keeper(self, progress: Progress) -> None:
        """After `stop`: keep where the group stands. A replica that is lost stands where it saved last."""
        try:
            self._keeper.take(self._group, self.engine.standing(), progress)
        except ReplicaLost:
            return

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                event = job()
            except ReplicaLost as lost:
                event = ReplicaDied(str(lost))
            except BaseException as error:
                self._report(Failure(error))
                return
            self._report(event)

    def _carry_out(self, action: act.Compute, progress: Progress | None) -> Report:
        match action:
            case act.RunForward():
                return self._forward(action, progress)
            case act.RunBackward():
                return ev.BackwardDone(self.engine.step_backward(action.gradients, action.micro))
            case act.ApplyStep():
                self.engine.apply_step(action.sessions)
                return ev.StepApplied(action.sessions)
            case act.RunInfer():
                return self._infer(action)
            case act.CloseRound():
                assert progress is not None
                self._keeper.deposit(self._group, self.engine.standing(), progress)
                return Deposited()
            case act.FreeStreams():
                for session, stream in action.streams:
                    if stream:
                        self.engine.close_stream(session, stream)
                    else:
                        self.engine.close_session(session)
                return ev.HousekeepingDone()

    def _forward(self, action: act.RunForward, progress: Progress | None) -> ev.Event:
        if action.checkpoint:
            assert progress is not None
            self._keeper.save(self._group, self.engine.standing(), progress)
        items = [item for _, item in action.payloads if isinstance(item, StepItem)]
        answers = self.engine.step_forward(items, action.micro)
        return ev.ForwardDone(answers, {item.session: item.digest() for item in items})

    def _infer(self, action: act.RunInfer) -> ev.Event:
        items = [item for _, _, item in action.requests if isinstance(item, InferItem)]
        upto = {i: action.upto[at[:2]] for i, at in enumerate(action.requests) if at[:2] in action.upto}
        outcomes = self.engine.infer(items, upto)
        pairs = zip(action.requests, outcomes, strict=True)
        return ev.InferDone(tuple((at[0], at[1], answer) for at, answer in pairs if answer is not None))


def bring_up(engine: RemoteEngine, part: Checkpoint, versions: Versions) -> None:
    """Start a replica, and have it `stand`. InputError or ReplicaLost if that cannot be."""
    for tries_left in reversed(range(_TRIES)):
        try:
            engine.start()
            stand(engine, part, versions)
            return
        except ReplicaLost:
            if not tries_left:
                raise


def stand(engine: Engine | RemoteEngine, part: Checkpoint, versions: Versions) -> None:
    """Bring an engine to where `part` says, and have it serve these adapter versions beside the initial one."""
    engine.restore(standing_of(part))
    for version, adapter in sorted(versions.items()):
        engine.publish(version, adapter, {0, *versions})


def parse_upload(data: bytes, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An edge's adapter file, checked: known names, float32, right shapes, finite. Raises ProtocolError."""
    try:
        parts = deserialize(data)
    except (SafetensorError, ValueError) as error:
        raise ProtocolError(f"the uploaded adapter is no safetensors file: {str(error)[:200]!r}") from error
    tensors = {}
    # Names, shapes and dtypes are held against ours before any tensor is made of them.
    for name, part in parts:
        want = expected.get(name)
        if want is None or list(part["shape"]) != list(want.shape) or part["dtype"] != "F32":
            raise ProtocolError(f"the uploaded adapter holds {name[:200]!r}, which does not fit this model and rank")
        value = torch.frombuffer(bytearray(part["data"]), dtype=torch.float32).view(want.shape)
        if not bool(torch.isfinite(value).all()):
            raise ProtocolError(f"the uploaded adapter holds values in {name} that are not finite")
        tensors[name] = value
    return tensors
