"""The compute thread: carries out one action at a time on the engine, and reports what came of it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from safetensors import SafetensorError, deserialize

from blocks import adapters
from hub.aggregate import Contribution
from hub.engine import Engine
from hub.jobs import EdgeAdapter, InferItem, StepItem
from hub.membership import Answered, MemberNote, answers_to_tensors, notes_to_json
from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.store.checkpoints import Checkpoint
from hub.store.state import HubState
from messaging.errors import ProtocolError
from messaging.messages import Recipe


@dataclass(frozen=True)
class Progress:
    """What a checkpoint needs to know besides tensors.

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
    """A checkpoint is safe on the disk; it holds so many steps of each edge, by key."""

    applied: Mapping[str, int]


@dataclass(frozen=True)
class Failure:
    """The compute thread, or the one that writes checkpoints, died of an exception; the hub cannot go on."""

    error: BaseException


Report = ev.Event | CheckpointWritten | Failure


class Worker:
    """Runs compute actions in a thread of its own; `report` is called there with the event that follows.

    Checkpoints are copied between two actions, and written by another thread meanwhile.
    """

    def __init__(
        self,
        engine: Engine,
        state: HubState,
        recipe: Recipe,
        published: Mapping[str, torch.Tensor],
        report: Callable[[Report], None],
    ) -> None:
        self.engine = engine
        self._state = state
        self._recipe = recipe
        self._published = dict(published)
        self._report = report
        self._jobs: queue.SimpleQueue[tuple[act.Compute, Progress, set[int]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")

    def start(self) -> None:
        """Begin to take jobs."""
        self._thread.start()

    def put(self, action: act.Compute, progress: Progress, pinned: set[int]) -> None:
        """Queue an action. `progress` as of now; `pinned`: adapter versions that sessions still use."""
        self._jobs.put((action, progress, pinned))

    def stop(self) -> None:
        """Wait for the job under way, then end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def finish(self, progress: Progress) -> None:
        """After `stop`: write the last checkpoint, and end the thread that writes. StoreError if it fails."""
        try:
            self._save(progress).result()
        finally:
            self._writer.shutdown()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                event = self._carry_out(*job)
            except BaseException as error:
                self._report(Failure(error))
                return
            self._report(event)

    def _carry_out(self, action: act.Compute, progress: Progress, pinned: set[int]) -> ev.Event:
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
                return self._close_round(action, progress, pinned)
            case act.FreeStreams():
                for session, stream in action.streams:
                    if stream:
                        self.engine.close_stream(session, stream)
                    else:
                        self.engine.close_session(session)
                return ev.HousekeepingDone()

    def _forward(self, action: act.RunForward, progress: Progress) -> ev.Event:
        if action.checkpoint:
            self._save(progress)
        items = [item for _, item in action.payloads if isinstance(item, StepItem)]
        answers = self.engine.step_forward(items, action.micro)
        return ev.ForwardDone(answers, {item.session: item.digest() for item in items})

    def _infer(self, action: act.RunInfer) -> ev.Event:
        items = [item for _, _, item in action.requests if isinstance(item, InferItem)]
        upto = {i: action.upto[at[:2]] for i, at in enumerate(action.requests) if at[:2] in action.upto}
        outcomes = self.engine.infer(items, upto)
        pairs = zip(action.requests, outcomes, strict=True)
        return ev.InferDone(tuple((at[0], at[1], answer) for at, answer in pairs if answer is not None))

    def _close_round(self, action: act.CloseRound, progress: Progress, pinned: set[int]) -> ev.Event:
        parts = [self._contribution(upload) for upload in action.uploads if isinstance(upload, EdgeAdapter)]
        merged = self.engine.close_round(self._published, parts)
        self._state.adapters.publish(action.version, action.round + 1, merged, self._recipe, pinned)
        members = tuple(replace(note, contributes=False) for note in progress.members)
        closed = Progress(
            progress.hub_step, action.round + 1, 0, action.version, progress.applied, {}, members, gathered=True
        )
        self._save(closed).result()
        self.engine.publish(action.version, merged, pinned)
        self._published = merged
        return ev.RoundPublished(action.version)

    def _contribution(self, upload: EdgeAdapter) -> Contribution:
        names = self.engine.names
        mine = {
            name: value
            for name, value in upload.tensors.items()
            if not upload.place.enter <= adapters.layer_of(name, names) < upload.place.leave
        }
        return Contribution(mine, dict.fromkeys(mine, upload.tokens))

    def _save(self, progress: Progress) -> Future[None]:
        """Copy B's adapter and optimizer as they are now, and have them written."""
        blobs, answered = answers_to_tensors(progress.answered)
        checkpoint = Checkpoint(
            hub_step=progress.hub_step,
            round=progress.round,
            round_step=progress.round_step,
            version=progress.version,
            applied=progress.applied,
            adapter=self.engine.trained(),
            optimizer=self.engine.optimizer.state(),
            extra={
                "layer_tokens": list(self.engine.layer_tokens),
                "round_tokens": dict(progress.round_tokens),
                "members": notes_to_json(progress.members),
                "gathered": progress.gathered,
                "answered": answered,
            },
            blobs=blobs,
        )
        return self._writer.submit(self._write, checkpoint)

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            self._state.checkpoints.save(checkpoint)
        except BaseException as error:
            self._report(Failure(error))
            raise
        self._report(CheckpointWritten(checkpoint.applied))


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
