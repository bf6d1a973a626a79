"""The edge's training: steps through the hub, rounds, held-out loss; and going on after a break."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from dataclasses import dataclass, field, replace

import torch
from safetensors.torch import save as save_safetensors

import messaging.messages as m
from blocks import adapters
from blocks.adapters import Adapter
from blocks.optimizer import AdapterOptimizer, Schedule
from blocks.partition import Partition
from blocks.remote import RemoteBlocks
from blocks.surgery import CutModel
from edge.client import HubClient
from edge.data import Batch
from edge.middle import HubMiddle
from edge.noise import GaussianNoise
from edge.snapshots import Snapshot, Snapshots, Standing
from edge.upload import Uploading
from messaging.console import Journal
from messaging.errors import ErrorCode, HubError, LinkLost, NotFinite

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
    snapshots: Snapshots
    journal: Journal
    #: what is done inside of it is not interrupted by Ctrl-C
    whole: Callable[[], AbstractContextManager[object]] = nullcontext


class Trainer:
    """Trains A and C here and B at the hub, `steps` steps in all (None: until the hub is done)."""

    def __init__(
        self, parts: Parts, welcome: m.Welcome, partition: Partition, lr: float | None, steps: int | None
    ) -> None:
        self._parts = parts
        self._steps = steps
        recipe = welcome.recipe
        schedule = Schedule(lr or recipe.lr, recipe.warmup_steps, recipe.clip_norm, recipe.weight_decay)
        self._optimizer = AdapterOptimizer(adapters.parameters(parts.cut), schedule)
        self.progress = Progress()
        self._standing = Standing(
            welcome.applied, welcome.round, welcome.adapter_version, 0, 0, False, (), -1,
            welcome.model_hash, str(partition),
        )  # fmt: skip
        #: adapter and optimizer as the round began, or as this process did: what a loss that is not finite leaves
        self._sound: Snapshot | None = None
        self._session = parts.client.session
        parts.middle.before_step = parts.snapshots.wait

    # -- the run ---------------------------------------------------------------------------------------

    def run(self, batch_of: Callable[[int], Batch], held_out: Callable[[], Iterable[Batch]]) -> None:
        """Take all steps. Raises NotFinite at a NaN loss; the adapter as the round began is then on disk."""
        over = False
        while not over:
            self._evaluate_when_due(held_out)
            if self._standing.closes or (self._all_taken() and self._standing.round_tokens):
                over = self._close_round()
            elif self._all_taken():
                over = True
            else:
                self._say("training")
                over = self._one_step(batch_of)
        self._evaluate_when_due(held_out)
        self._say("done")

    def _all_taken(self) -> bool:
        return self._steps is not None and self._standing.steps >= self._steps

    def _stand(self, standing: Standing) -> None:
        """This is where the training stands now."""
        self._standing = standing
        progress = self.progress
        progress.step, progress.round, progress.round_step = standing.steps, standing.round, standing.round_step
        progress.held_out = list(standing.held_out)

    def _say(self, phase: str) -> None:
        self.progress.phase = phase

    def _one_step(self, batch_of: Callable[[int], Batch]) -> bool:
        """One step, repeated where the link or the cohort broke it. Returns whether training is over."""
        while True:
            self._keep_up()
            if self._standing.closes or self._all_taken():
                return False
            try:
                self._step(batch_of(self._standing.steps))
                return False
            except NotFinite as error:
                raise self._stopped(str(error)) from error
            except LinkLost:
                self._parts.journal.log("the connection broke in the middle of a step: repeating it")
                self._resume(self._parts.client.wait_for_session(math.inf))
            except HubError as error:
                if error.code is ErrorCode.TRAINING_OVER:
                    self._load(self._latest_version())
                    return True
                self._after_refusal(error)

    def _after_refusal(self, error: HubError) -> None:
        """Make the step possible again after the hub refused it, or raise what ends the training."""
        if error.code is ErrorCode.SHUTDOWN:
            self._wait_for_hub()
        elif error.code is ErrorCode.BEHIND:
            self._parts.journal.log(f"step {self._standing.steps} is repeated: {error}")
            welcome = self._parts.client.where()
            if welcome.applied == self._standing.steps + 1:
                self._skip(welcome)
            else:
                self._resume(welcome)
        elif error.code is ErrorCode.NOT_FINITE:
            raise self._stopped(str(error)) from error
        else:
            raise error

    def _stopped(self, why: str) -> NotFinite:
        """Leave what was good on the disk: the adapter of the steps since may be on its way to infinity."""
        sound, steps = self._sound, self._standing.steps
        assert sound is not None
        self._parts.snapshots.put(replace(sound, standing=self._standing), 0)
        self._parts.snapshots.wait()
        return NotFinite(
            f"step {steps} is not taken: {why}. The adapter of step {sound.standing.steps}, where the round began, "
            "is kept. Lower --lr, or look at the data of that batch"
        )

    def _step(self, batch: Batch) -> None:
        """Forward, loss, backward and optimizer for one batch."""
        parts, standing, started = self._parts, self._standing, time.perf_counter()
        parts.middle.step, parts.middle.tokens = standing.steps, batch.tokens
        parts.noise.begin(f"step {standing.steps}", batch.input_ids)
        # The first try of a step that is repeated may have ended in the middle of the backward.
        self._optimizer.drop_gradients()
        loss = self._summed_loss(batch, learning=True)
        mean = float(loss.detach()) / max(batch.tokens, 1)
        if not math.isfinite(mean):
            raise NotFinite(f"its loss is {mean}")
        # From here on the hub takes the step, and so must this edge.
        with parts.whole():
            loss.backward()
            self._optimizer.step(batch.tokens)
            reply = parts.middle.step_grad
            assert reply is not None
            taken = replace(
                standing,
                steps=standing.steps + 1,
                round_step=standing.round_step + 1,
                round_tokens=standing.round_tokens + batch.tokens,
                closes=bool(reply.round_closes),
            )
            self._stand(taken)
            self._keep(reply.checkpoint)
            self._account(started, batch.tokens, mean)

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

    def _close_round(self) -> bool:
        """`_finish_round`, repeated where the link broke. Returns whether training is over for this edge."""
        while True:
            try:
                return self._finish_round()
            except LinkLost:
                self._parts.journal.log("the connection broke at the end of a round: repeating it")
            except HubError as error:
                if error.code is ErrorCode.BEHIND:
                    self._stand(replace(self._standing, closes=False))
                    return False
                if error.code is not ErrorCode.SHUTDOWN:
                    raise
                time.sleep(_STOPPING_S)
            steps = self._standing.steps
            self._resume(self._parts.client.wait_for_session(math.inf))
            if self._standing.steps != steps:
                return False

    def _finish_round(self) -> bool:
        """Upload, leave if all steps are done, wait for the publication, load it. Returns whether training is over."""
        parts, standing, done = self._parts, self._standing, self._all_taken()
        parts.snapshots.wait()
        self._say("uploading the adapter")
        if standing.round_tokens:
            self._upload()
        if done:
            parts.client.ask(m.Leave(1, "all steps are taken"), m.Bye)
        self._say("waiting for the round")
        published = parts.client.ask(m.AwaitRound(standing.round), m.Published)
        self._load(published.version)
        self._begin_round(published.round)
        return bool(published.over) or done

    def _begin_round(self, round_: int) -> None:
        """Stand at the beginning of a round, with its published adapter."""
        version = self._parts.middle.version
        self._stand(replace(self._standing, round=round_, version=version, round_step=0, round_tokens=0, closes=False))
        self._sound = self._keep(self._standing.steps)

    def _upload(self) -> None:
        data = save_safetensors(adapters.read(self._parts.cut))
        with self._parts.journal.task("uploading the adapter", len(data)) as task:
            Uploading(self._parts.client, self._standing.round, self._standing.round_tokens, data).run(task)

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
            self._begin_round(max(self._standing.round, pong.round if pong else 0, client.welcome.round))

    # -- going on after a break --------------------------------------------------------------------------

    def begin(self, welcome: m.Welcome) -> None:
        """Stand where an earlier process of this edge stood, as far as it fits the hub; or begin."""
        parts, newest = self._parts, self._parts.snapshots.newest()
        if newest is not None and not self._fits(newest):
            newest = None
        if newest is not None and self._go_back(newest, welcome):
            return
        self._load_published(welcome)
        if newest is not None:
            # The optimizer's moments are still this edge's own.
            moments = parts.snapshots.at(newest.steps, newest.round)
            assert moments is not None
            self._optimizer.load(dict(moments.optimizer))
        if welcome.applied:
            parts.journal.log(f"going on at step {welcome.applied} with the published adapter")
        self._stand(self._standing)
        self._sound = self._keep(0)

    def _fits(self, standing: Standing) -> bool:
        mine = self._standing
        return (standing.model_hash, standing.partition) == (mine.model_hash, mine.partition)

    def _go_back(self, newest: Standing, welcome: m.Welcome) -> bool:
        """Restore the snapshot that fits what the hub has applied. False if there is none."""
        parts, applied = self._parts, welcome.applied
        if applied - 1 == newest.steps:
            # The hub took a step whose result was lost here: it tells it again.
            snapshot = parts.snapshots.at(newest.steps, newest.round)
        else:
            snapshot = parts.snapshots.at(applied, welcome.round)
        if snapshot is None or not self._fits(snapshot.standing):
            return False
        adapters.write(parts.cut, snapshot.adapter)
        self._optimizer.load(dict(snapshot.optimizer))
        parts.middle.version = snapshot.standing.version
        self._stand(snapshot.standing)
        self._sound = snapshot
        parts.journal.log(f"resumed at step {snapshot.standing.steps}, nothing lost")
        return True

    def _resume(self, welcome: m.Welcome) -> None:
        """A session is open again: stand where the hub stands."""
        self._session = self._parts.client.session
        standing = self._standing
        if welcome.applied in (standing.steps, standing.steps + 1):
            # In the second case the hub took the step whose answer was lost: it is asked for again, and told again.
            self._parts.journal.log(f"resumed at step {standing.steps}, nothing lost")
            return
        self._parts.snapshots.wait()
        if welcome.applied < standing.steps and self._go_back(standing, welcome):
            return
        self._skip(welcome)

    def _skip(self, welcome: m.Welcome) -> None:
        """Go on with the published adapter where the hub stands and nothing here fits that."""
        self._parts.journal.log(
            f"the hub is at step {welcome.applied} of this edge, this edge was at {self._standing.steps}: "
            "going on from the last published adapter; what this edge's own blocks learned since then is lost"
        )
        self._load_published(welcome)
        self._stand(replace(self._standing, steps=welcome.applied))
        self._begin_round(welcome.round)

    def _load_published(self, welcome: m.Welcome) -> None:
        self._parts.middle.version = -1
        self._load(welcome.adapter_version)

    def _wait_for_hub(self) -> None:
        self._say("the hub is stopping")
        time.sleep(_STOPPING_S)
        self._resume(self._parts.client.wait_for_session(math.inf))

    def _keep(self, checkpoint: int) -> Snapshot:
        """Have it written where the training stands; `checkpoint`: the steps in the hub's newest checkpoint."""
        snapshot = Snapshot(self._standing, adapters.read(self._parts.cut), self._optimizer.state())
        self._parts.snapshots.put(snapshot, checkpoint)
        return snapshot

    def saved(self) -> Path:
        """Where the training is saved as it stands now."""
        self._parts.snapshots.wait()
        return self._parts.snapshots.path(self._standing)

    # -- figures ---------------------------------------------------------------------------------------

    def _evaluate_when_due(self, held_out: Callable[[], Iterable[Batch]]) -> None:
        """Once at the beginning of each round, with the published adapter in all blocks."""
        standing = self._standing
        if standing.round_step or standing.closes or standing.evaluated >= standing.round:
            return
        loss = self._evaluate(held_out)
        self._stand(replace(standing, held_out=(*standing.held_out, *loss), evaluated=standing.round))

    def _evaluate(self, held_out: Callable[[], Iterable[Batch]]) -> tuple[float, ...]:
        """Mean loss per target token on the held-out data; empty where there is none."""
        self._say("evaluating")
        total, tokens = 0.0, 0
        with torch.no_grad(), self._parts.journal.task("held-out loss", unit="tokens") as task:
            for batch in held_out():
                self._parts.noise.begin("held-out", batch.input_ids)
                total += float(self._summed_loss(batch, learning=False))
                tokens += batch.tokens
                task.advance(batch.tokens)
        if not tokens:
            return ()
        self._parts.journal.log(f"held-out loss {total / tokens:.4f} at step {self._standing.steps}")
        return (total / tokens,)

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
