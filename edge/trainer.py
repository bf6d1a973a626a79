"""The edge's training: steps through the hub, rounds, held-out loss."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from safetensors.torch import save as save_safetensors

import messaging.messages as m
from blocks import adapters
from blocks.adapters import Adapter
from blocks.optimizer import AdapterOptimizer, Schedule
from blocks.remote import RemoteBlocks
from blocks.surgery import CutModel
from edge.client import HubClient
from edge.data import Batch
from edge.middle import HubMiddle
from edge.noise import GaussianNoise
from edge.state import Snapshot
from messaging.console import Journal
from messaging.errors import ErrorCode, HubError, LinkLost, NotFinite

_PIECE = 4 << 20
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
    remote: RemoteBlocks
    middle: HubMiddle
    client: HubClient
    noise: GaussianNoise
    fetch_adapter: Callable[[int], Adapter]
    save: Callable[[Snapshot], object]
    journal: Journal
    #: what is done inside of it is not interrupted by Ctrl-C
    whole: Callable[[], AbstractContextManager[object]] = nullcontext


class Trainer:
    """Trains A and C here and B at the hub, `steps` steps in all (None: until the hub is done)."""

    def __init__(self, parts: Parts, welcome: m.Welcome, lr: float | None, steps: int | None) -> None:
        self._parts = parts
        self._recipe = welcome.recipe
        self._steps = steps
        self._hash = welcome.model_hash
        recipe = welcome.recipe
        schedule = Schedule(lr or recipe.lr, recipe.warmup_steps, recipe.clip_norm, recipe.weight_decay)
        self._optimizer = AdapterOptimizer(adapters.parameters(parts.cut), schedule)
        self.progress = Progress(step=welcome.applied, round=welcome.round)
        self._round_tokens = 0
        self._session = parts.client.session
        self._start: Snapshot | None = None

    # -- the run ---------------------------------------------------------------------------------------

    def run(self, batch_of: Callable[[int], Batch], held_out: Callable[[], Iterable[Batch]]) -> None:
        """Take all steps. Raises NotFinite at a NaN loss; what was saved when the round began stays on disk."""
        progress = self.progress
        self._evaluate(held_out)
        over = False
        while not over and (self._steps is None or progress.step < self._steps):
            progress.phase = "training"
            closes, over = self._one_step(batch_of)
            done = self._steps is not None and progress.step >= self._steps
            if closes or (done and not over):
                over = self._close_round(done) or over
                self._evaluate(held_out)
        progress.phase = "done"

    def _one_step(self, batch_of: Callable[[int], Batch]) -> tuple[bool, bool]:
        """One step, repeated where the link or the cohort broke it. Returns (round closes, training is over)."""
        while True:
            self._keep_up()
            try:
                return self._step(batch_of(self.progress.step)), False
            except NotFinite as error:
                raise self._stopped(str(error)) from error
            except LinkLost:
                self._parts.journal.log("the connection broke in the middle of a step: repeating it")
                self._resume(self._parts.client.wait_for_session(math.inf))
            except HubError as error:
                if error.code is ErrorCode.TRAINING_OVER:
                    self._load(self._latest_version())
                    return False, True
                if error.code is ErrorCode.SHUTDOWN:
                    self._wait_for_hub()
                elif error.code is ErrorCode.BEHIND:
                    self._parts.journal.log(f"step {self.progress.step} is repeated: {error}")
                    self._resume(self._parts.client.where())
                elif error.code is ErrorCode.NOT_FINITE:
                    raise self._stopped(str(error)) from error
                else:
                    raise

    def _stopped(self, why: str) -> NotFinite:
        start = self._start
        assert start is not None
        return NotFinite(
            f"step {self.progress.step} is not taken: {why}. The adapter of step {start.steps}, where the round began, "
            "is kept. Lower --lr, or look at the data of that batch"
        )

    def _step(self, batch: Batch) -> bool:
        """Forward, loss, backward and optimizer for one batch. Returns whether the round closes."""
        parts, progress, started = self._parts, self.progress, time.perf_counter()
        parts.middle.step, parts.middle.tokens = progress.step, batch.tokens
        parts.noise.begin(f"step {progress.step}", batch.input_ids)
        loss = self._summed_loss(batch, learning=True)
        mean = float(loss.detach()) / max(batch.tokens, 1)
        if not math.isfinite(mean):
            raise NotFinite(f"its loss is {mean}")
        # From here on the hub takes the step, and so must this edge.
        with parts.whole():
            loss.backward()
            self._optimizer.step(batch.tokens)
            progress.step += 1
            progress.round_step += 1
            parts.client.steps_done = progress.step
            self._round_tokens += batch.tokens
            self._account(started, batch.tokens, mean)
        reply = parts.middle.step_grad
        assert reply is not None
        return bool(reply.round_closes)

    def _summed_loss(self, batch: Batch, learning: bool) -> torch.Tensor:
        """The loss summed over target tokens, by transformers' own loss function."""
        model, device = self._parts.cut.model, self._parts.cut.model.device
        self._parts.remote.learning = learning
        logits = model(
            input_ids=batch.input_ids.to(device),
            attention_mask=None if batch.attention_mask is None else batch.attention_mask.to(device),
            position_ids=None if batch.position_ids is None else batch.position_ids.to(device),
            use_cache=False,
        ).logits
        vocab = model.config.get_text_config().vocab_size
        one = torch.tensor(1.0, device=device)
        loss: torch.Tensor = model.loss_function(
            logits=logits, labels=batch.labels.to(device), vocab_size=vocab, num_items_in_batch=one
        )
        return loss

    # -- rounds ----------------------------------------------------------------------------------------

    def _close_round(self, done: bool) -> bool:
        """`_finish_round`, repeated where the link broke; False too where the hub has to go on with the round."""
        while True:
            try:
                return self._finish_round(done)
            except LinkLost:
                self._parts.journal.log("the connection broke at the end of a round: repeating it")
            except HubError as error:
                if error.code is ErrorCode.BEHIND:
                    return False
                if error.code is not ErrorCode.SHUTDOWN:
                    raise
                time.sleep(_STOPPING_S)
            step = self.progress.step
            self._resume(self._parts.client.wait_for_session(math.inf))
            if self.progress.step != step:
                return False

    def _finish_round(self, done: bool) -> bool:
        """Upload, leave if all steps are done, wait for the publication, load it. Returns whether training is over."""
        parts, progress = self._parts, self.progress
        progress.phase = "uploading the adapter"
        if self._round_tokens:
            self._upload()
        if done:
            parts.client.ask(m.Leave(1, "all steps are taken"), m.Bye)
        progress.phase = "waiting for the round"
        published = parts.client.ask(m.AwaitRound(progress.round), m.Published)
        self._load(published.version)
        progress.round, progress.round_step, self._round_tokens = published.round, 0, 0
        self._keep()
        return bool(published.over) or done

    def _upload(self) -> None:
        data = save_safetensors(adapters.read(self._parts.cut))
        digest = hashlib.sha256(data).hexdigest()
        for at in range(0, len(data), _PIECE):
            piece = memoryview(data)[at : at + _PIECE]
            chunks = tuple(piece[i : i + m.MAX_FRAME_BYTES] for i in range(0, len(piece), m.MAX_FRAME_BYTES))
            tensor = m.Tensor("u8", (len(piece),), chunks)
            message = m.Upload(self.progress.round, self._round_tokens, at, len(data), digest, tensor)
            self._parts.client.ask(message, m.UploadAck)

    def _load(self, version: int) -> None:
        """Take the published adapter into A and C; the optimizer's moments stay."""
        if version != self._parts.middle.version or version == 0:
            adapters.write(self._parts.cut, self._parts.fetch_adapter(version))
            self._parts.middle.version = version

    def _latest_version(self) -> int:
        pong = self._parts.client.figures.pong
        welcome = self._parts.client.welcome
        known = [self._parts.middle.version, welcome.adapter_version if welcome else 0]
        return max(*known, pong.adapter_version if pong else 0)

    def _keep_up(self) -> None:
        """Before a step: notice a new session, and a round that was closed without this edge."""
        client = self._parts.client
        if client.session != self._session:
            self._resume(client.wait_for_session(math.inf))
        version = self._latest_version()
        if version > self._parts.middle.version:
            self._parts.journal.log(f"taking over adapter version {version}, published without this edge")
            self._load(version)
            assert client.welcome is not None
            pong = client.figures.pong
            self.progress.round = max(self.progress.round, pong.round if pong else 0, client.welcome.round)
            self.progress.round_step, self._round_tokens = 0, 0
            self._keep()

    # -- going on after a break --------------------------------------------------------------------------

    def restore(self, snapshot: Snapshot, adapter: bool = True) -> None:
        """Go on from a snapshot, with or without its adapter (its step count is the hub's to tell)."""
        if adapter:
            adapters.write(self._parts.cut, snapshot.adapter)
        self._optimizer.load(dict(snapshot.optimizer))

    def _resume(self, welcome: m.Welcome) -> None:
        """A session is open again: stand where the hub stands."""
        parts, progress = self._parts, self.progress
        self._session = parts.client.session
        if welcome.applied == progress.step:
            return
        start = self._start
        if start is not None and start.steps == welcome.applied:
            self.restore(start)
            parts.journal.log(f"the hub is at step {welcome.applied} of this edge: repeating from there, nothing lost")
        else:
            parts.middle.version = -1
            self._load(welcome.adapter_version)
            parts.journal.log(
                f"the hub is at step {welcome.applied} of this edge, this edge was at {progress.step}: "
                "going on from the last published adapter"
            )
        progress.step, progress.round = welcome.applied, welcome.round
        progress.round_step, self._round_tokens = 0, 0
        parts.client.steps_done = progress.step

    def _wait_for_hub(self) -> None:
        self.progress.phase = "the hub is stopping"
        time.sleep(_STOPPING_S)
        self._resume(self._parts.client.wait_for_session(math.inf))

    def begin(self) -> None:
        """Note where this run begins, for a hub that has to go back to it."""
        self._keep()

    def _keep(self) -> None:
        self._start = self.snapshot()
        self._parts.save(self._start)

    def snapshot(self) -> Snapshot:
        """The adapter and optimizer of A and C as they are now."""
        return Snapshot(
            steps=self.progress.step,
            round=self.progress.round,
            version=self._parts.middle.version,
            adapter=adapters.read(self._parts.cut),
            optimizer=self._optimizer.state(),
            model_hash=self._hash,
        )

    # -- figures ---------------------------------------------------------------------------------------

    def _evaluate(self, held_out: Callable[[], Iterable[Batch]]) -> None:
        """Mean loss per target token on the held-out data, with the published adapter in all blocks."""
        self.progress.phase = "evaluating"
        total, tokens = 0.0, 0
        with torch.no_grad():
            for batch in held_out():
                self._parts.noise.begin("held-out", batch.input_ids)
                total += float(self._summed_loss(batch, learning=False))
                tokens += batch.tokens
        if tokens:
            self.progress.held_out.append(total / tokens)
            self._parts.journal.log(f"held-out loss {total / tokens:.4f} at step {self.progress.step}")

    def _account(self, started: float, tokens: int, loss: float) -> None:
        progress, times, now = self.progress, self._parts.middle.times, time.perf_counter()
        waited = (times.hidden_here - times.smashed_sent) + (times.grad_here - times.grad_sent)
        link = min(2 * (self._parts.client.figures.round_trip_s or 0.0), waited)
        progress.blocks_a += times.smashed_sent - started
        progress.blocks_c += times.grad_sent - times.hidden_here
        progress.link += link
        progress.hub += waited - link
        progress.other += now - times.grad_here
        progress.losses.append(loss)
        progress.tokens += tokens
        speed = tokens / max(now - started, 1e-9)
        progress.tokens_per_s = speed if not progress.tokens_per_s else 0.9 * progress.tokens_per_s + 0.1 * speed
