"""The edge's training: steps through the hub, rounds, held-out loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save as save_safetensors

import messaging.messages as m
from blocks import adapters
from blocks.surgery import CutModel
from edge.client import HubClient
from edge.course import Course
from edge.data import Batch
from edge.loss import summed_loss
from edge.middle import HubMiddle
from edge.noise import GaussianNoise
from edge.pipeline import Pipeline, Taken, split
from edge.upload import Uploading
from messaging.console import Journal
from messaging.errors import ROUND_CLOSES, ErrorCode, HubError, LinkLost, NotFinite

#: How long to leave a hub alone that says it is stopping.
_STOPPING_S = 0.5


@dataclass
class Progress:
    """What has happened so far; the screen reads it, the trainer writes it."""

    step: int = 0
    round: int = 0
    round_step: int = 0
    phase: str = "joining"
    losses: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    tokens: int = 0
    #: seconds in: blocks A, link, hub, blocks C, all else of the steps
    blocks_a: float = 0.0
    link: float = 0.0
    hub: float = 0.0
    blocks_c: float = 0.0
    other: float = 0.0
    #: tokens per second over the recent steps
    tokens_per_s: float = 0.0


@dataclass(frozen=True)
class Parts:
    """What a trainer works with."""

    cut: CutModel
    middle: HubMiddle
    client: HubClient
    noise: GaussianNoise
    journal: Journal
    pipeline: Pipeline
    #: micro-batches of a step
    micros: int
    #: what is done inside of it is not interrupted by Ctrl-C
    whole: Callable[[], AbstractContextManager[object]] = nullcontext


class Trainer:
    """Trains A and C here and B at the hub, `steps` steps in all (None: until the hub is done)."""

    def __init__(self, parts: Parts, course: Course, steps: int | None) -> None:
        self._parts = parts
        self._course = course
        self._steps = steps
        self.progress = Progress()
        self._show()

    # -- the run ---------------------------------------------------------------------------------------

    def run(self, batch_of: Callable[[int], Batch], held_out: Callable[[], Iterable[Batch]]) -> None:
        """Take all steps. Raises NotFinite at a NaN loss; the adapter as the round began is then on disk."""
        over = False
        while not over:
            self._evaluate_when_due(held_out)
            standing = self._course.standing
            if standing.closes or (self._all_taken() and standing.round_tokens):
                over = self._close_round()
            elif self._all_taken():
                over = True
            else:
                self._say("training")
                over = self._one_step(batch_of)
        self._evaluate_when_due(held_out)
        self._say("done")

    def saved(self) -> Path:
        """Where the training is saved as it stands now."""
        return self._course.saved()

    def _all_taken(self) -> bool:
        return self._steps is not None and self._course.standing.steps >= self._steps

    def _show(self) -> None:
        """Let the screen see where the training stands."""
        progress, standing = self.progress, self._course.standing
        progress.step, progress.round, progress.round_step = standing.steps, standing.round, standing.round_step
        progress.held_out = list(standing.held_out)

    def _say(self, phase: str) -> None:
        self.progress.phase = phase

    def _one_step(self, batch_of: Callable[[int], Batch]) -> bool:
        """One step, repeated where the link or the cohort broke it. Returns whether training is over."""
        while True:
            self._keep_up()
            if self._course.standing.closes or self._all_taken():
                return False
            try:
                self._step(batch_of(self._course.standing.steps))
                return False
            except NotFinite as error:
                raise self._stopped(str(error)) from error
            except LinkLost:
                self._parts.journal.log("the connection broke in the middle of a step: repeating it")
                self._resume(self._parts.client.adopt())
            except HubError as error:
                if error.code is ErrorCode.TRAINING_OVER:
                    # Not what the last Pong told: it may be older than the last round.
                    welcome = self._where()
                    self._course.load(welcome.adapter_version)
                    self._course.begin_round(welcome.round)
                    self._show()
                    return True
                self._after_refusal(error)

    def _after_refusal(self, error: HubError) -> None:
        """Make the step possible again after the hub refused it, or raise what ends the training."""
        if error.code is ErrorCode.SHUTDOWN:
            self._wait_for_hub()
        elif error.code is ErrorCode.BEHIND and error.detail == ROUND_CLOSES:
            self._course.closes()
        elif error.code in (ErrorCode.BEHIND, ErrorCode.STALE):
            # STALE: of an answer that was lost the hub has kept no copy in this session. It knows the step's bytes.
            self._parts.journal.log(f"step {self._course.standing.steps} is repeated: {error}")
            welcome = self._where()
            if welcome.applied == self._course.standing.steps + 1:
                # It holds another answer than to what was asked: this edge's data or arithmetic have changed.
                self._course.skip(welcome)
                self._show()
            else:
                self._resume(welcome)
        elif error.code is ErrorCode.NOT_FINITE:
            raise self._stopped(str(error)) from error
        else:
            raise error

    def _stopped(self, why: str) -> NotFinite:
        """Leave what was good on the disk: the adapter of the steps since may be on its way to infinity."""
        sound = self._course.leave_sound()
        return NotFinite(
            f"step {self._course.standing.steps} is not taken: {why}. The adapter of step {sound}, where the round "
            "began, is kept. Lower --lr, or look at the data of that batch"
        )

    def _step(self, batch: Batch) -> None:
        """Forward, loss, backward and optimizer for one batch."""
        parts, course, started = self._parts, self._course, time.perf_counter()
        # The first try of a step that is repeated may have ended in the middle of the backward.
        course.optimizer.drop_gradients()
        with ExitStack() as held:
            # Before its last gradient leaves: from there on the hub takes the step, and so must this edge.
            whole = lambda: held.enter_context(parts.whole())  # noqa: E731
            taken = parts.pipeline.step(course.standing.steps, split(batch, parts.micros), whole)
            course.optimizer.step(batch.tokens)
            course.took_step(batch.tokens, taken.reply)
            self._show()
            self._account(started, batch.tokens, taken)

    # -- rounds ----------------------------------------------------------------------------------------

    def _close_round(self) -> bool:
        """`_finish_round`, repeated where the link broke. Returns whether training is over for this edge."""
        while True:
            steps = self._course.standing.steps
            try:
                return self._finish_round()
            except LinkLost:
                self._parts.journal.log("the connection broke at the end of a round: repeating it")
                self._resume(self._parts.client.adopt())
            except HubError as error:
                if error.code is ErrorCode.BEHIND:
                    self._course.goes_on()
                    return False
                if error.code is not ErrorCode.SHUTDOWN:
                    raise
                self._wait_for_hub()
            if self._course.standing.steps != steps:
                return False

    def _finish_round(self) -> bool:
        """Leave if all steps are done, upload, wait for the publication, load it. Returns whether training is over."""
        parts, course, done = self._parts, self._course, self._all_taken()
        standing = course.standing
        course.saved()
        if done:
            # First, so that no checkpoint has this edge as one that takes more steps.
            parts.client.ask(m.Leave(1, "all steps are taken"), m.Bye)
        self._say("uploading the adapter")
        if standing.round_tokens:
            self._upload()
        self._say("waiting for the round")
        published = parts.client.ask(m.AwaitRound(standing.round), m.Published)
        course.load(published.version)
        course.begin_round(published.round)
        self._show()
        return bool(published.over) or done

    def _upload(self) -> None:
        data, standing = save_safetensors(adapters.read(self._parts.cut)), self._course.standing
        with self._parts.journal.task("uploading the adapter", len(data)) as task:
            Uploading(self._parts.client, standing.round, standing.round_tokens, data).run(task)

    def _latest_version(self) -> int:
        pong = self._parts.client.figures.pong
        welcome = self._parts.client.welcome
        known = [self._parts.middle.version, welcome.adapter_version if welcome else 0]
        return max(*known, pong.adapter_version if pong else 0)

    def _keep_up(self) -> None:
        """Before a step: notice a new session, and a round that was closed without this edge."""
        client = self._parts.client
        if not client.adopted:
            self._resume(client.adopt())
        version = self._latest_version()
        if version > self._parts.middle.version:
            self._parts.journal.log(f"taking over adapter version {version}, published without this edge")
            self._course.load(version)
            assert client.welcome is not None
            pong = client.figures.pong
            self._course.begin_round(max(self.progress.round, pong.round if pong else 0, client.welcome.round))
            self._show()

    def _resume(self, welcome: m.Welcome) -> None:
        """A session is open again: stand where the hub stands."""
        self._course.resume(welcome)
        self._show()

    def _where(self) -> m.Welcome:
        """Where the hub stands now, once it is there again; training goes on in the session that is open then."""
        with suppress(LinkLost):
            self._parts.client.where()
        return self._parts.client.adopt()

    def _wait_for_hub(self) -> None:
        self._say("the hub is stopping")
        time.sleep(_STOPPING_S)
        # Not the WELCOME that is known: it tells where the hub stood when this session was opened.
        self._resume(self._where())

    # -- figures ---------------------------------------------------------------------------------------

    def _evaluate_when_due(self, held_out: Callable[[], Iterable[Batch]]) -> None:
        """Once at the beginning of each round, with the published adapter in all blocks."""
        standing = self._course.standing
        if not standing.round_step and not standing.closes and standing.evaluated < standing.round:
            try:
                losses = self._evaluate(held_out)
            except HubError as error:
                if error.code is not ErrorCode.BEHIND:
                    raise
                # The others have gone on to rounds of which this edge is not part.
                self._parts.journal.log(f"the held-out loss of round {standing.round} is left out: {error}")
                losses = ()
            self._course.evaluated(losses)
            self._show()

    def _evaluate(self, held_out: Callable[[], Iterable[Batch]]) -> tuple[float, ...]:
        """Mean loss per target token on the held-out data; empty where there is none."""
        self._say("evaluating")
        total, tokens = 0.0, 0
        with torch.no_grad(), self._parts.journal.task("held-out loss", unit="tokens") as task:
            for batch in held_out():
                self._parts.noise.begin("held-out", batch.input_ids)
                total += float(summed_loss(self._parts.cut, batch))
                tokens += batch.tokens
                task.advance(batch.tokens)
        if not tokens:
            return ()
        self._parts.journal.log(f"held-out loss {total / tokens:.4f} at step {self._course.standing.steps}")
        return (total / tokens,)

    def _account(self, started: float, tokens: int, taken: Taken) -> None:
        progress, times = self.progress, taken.times
        took = time.perf_counter() - started
        # There and back for the forwards and for the backwards: with micro-batches they overlap.
        link = min(2 * (self._parts.client.figures.round_trip_s or 0.0), times.waiting)
        progress.blocks_a += times.blocks_a
        progress.blocks_c += times.blocks_c
        progress.link += link
        progress.hub += times.waiting - link
        progress.other += took - times.blocks_a - times.blocks_c - times.waiting
        progress.losses.append(taken.loss / max(tokens, 1))
        progress.tokens += tokens
        speed = tokens / max(took, 1e-9)
        progress.tokens_per_s = speed if not progress.tokens_per_s else 0.9 * progress.tokens_per_s + 0.1 * speed
