"""`edge join`: probe, plan, enrol, fetch blocks, train its rounds, save, report."""

from __future__ import annotations

import math
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import messaging.messages as m
from blocks import adapters
from blocks.codec import wire_dtype
from blocks.device import pick_device
from blocks.optimizer import AdapterOptimizer, Schedule
from blocks.quantize import parse_bits
from blocks.surgery import CutModel
from edge.allocator import keep_large_tensors_apart
from edge.connection import GIVE_UP_S, Connection, HubModel, attach, build, lora_spec
from edge.course import Course
from edge.data import PACKS_EXACTLY, BatchSource, eval_batches, load_data
from edge.interrupts import Interrupts
from edge.monitor import VIEW, EdgeSnapshot, TimeSpent
from edge.noise import GaussianNoise
from edge.pipeline import Pipeline
from edge.planning import Planned, choose_partition, in_micro_batches, measure_link
from edge.snapshots import Snapshots
from edge.state import EdgeState
from edge.trainer import Parts, Trainer
from messaging.console import Curve, Journal, LiveView
from messaging.errors import HubUnreachable, InputError


@dataclass(frozen=True)
class JoinOptions:
    """What the command line says."""

    join: str | None
    data: list[Path]
    held_out: list[Path]
    model: str | None
    partition: str
    profile: str | None
    noise: float
    batch: int
    micro_batches: str
    seq: int
    lr: float | None
    steps: int | None
    state: Path
    name: str | None
    device: str
    share_loss: bool
    headless: bool
    seed: int
    give_up: float | None = None
    wire: str | None = None
    load_in: str | None = None


class Joining:
    """One run of `edge join`; the live view reads it while it works."""

    def __init__(self, options: JoinOptions, journal: Journal, interrupts: Interrupts) -> None:
        self._options = options
        self._journal = journal
        self._interrupts = interrupts
        self._bits = parse_bits(options.load_in)
        self._phase = "starting"
        self._connection: Connection | None = None
        self._served: HubModel | None = None
        self._planned: Planned | None = None
        self._trainer: Trainer | None = None
        self._noise: GaussianNoise | None = None
        self._curve = Curve()
        self._shown = 0

    def run(self) -> None:
        """Everything, until the steps are done or the hub closes its last round."""
        options = self._options
        wire_dtype(options.wire)
        for path in (*options.data, *options.held_out):
            if not path.exists():
                raise InputError(f"{path}: no such file: give the text to train on with --data FILE")
        with ExitStack() as owned:
            state = EdgeState(options.state)
            owned.enter_context(state.training())
            self._phase = "enrolling"
            name = options.name or socket.gethostname()
            connection = self._connection = Connection(
                state, self._journal, options.join, name, options.give_up or GIVE_UP_S
            )
            owned.callback(connection.close)
            owned.callback(connection.leave)
            self._phase = "asking the hub"
            served = self._served = connection.describe(options.model)
            self._train(connection, served, owned)

    def _train(self, connection: Connection, served: HubModel, owned: ExitStack) -> None:
        options = self._options
        self._phase = "reading the data"
        tokenizer = served.files.tokenizer()
        train, held_out = load_data(options.data, options.held_out or None, tokenizer, options.seq)
        self._phase = "planning"
        device = pick_device(options.device)
        # A run that goes on keeps its partition: its adapter is that of these layers.
        snapshots = connection.state.snapshots()
        owned.callback(snapshots.close)
        newest = snapshots.newest()
        again = connection.membership.partition if newest is not None else None
        planned = self._planned = choose_partition(
            again if again and options.partition == "auto" else options.partition,
            options.profile,
            served,
            lambda: measure_link(connection.client),
            device,
            options.batch,
            options.seq,
            self._journal,
            self._bits,
        )
        planned = self._planned = in_micro_batches(
            planned, options.micro_batches, newest.micro_batches if newest is not None else None, options.seq
        )
        self._journal.log(str(planned))
        partition = planned.partition
        self._phase = "loading blocks"
        keep_large_tensors_apart()
        noise = self._noise = connection.noise(options.noise, options.seed)
        cut = build(connection, served, partition, noise, device, self._bits)
        on_wire = f", {options.wire} on the wire" if options.wire else ""
        self._journal.log(
            f"{len(train)} examples to train on, {len(held_out)} held out; partition {partition}{on_wire}"
        )
        welcome = connection.hello(partition, True, served.description)
        # There is something to lose from here on: a hub may be away for hours.
        connection.client.be_patient(options.give_up or math.inf)
        connection.remember(partition, options.noise)
        trainer = self._trainer = self._make_trainer(connection, served, cut, welcome, snapshots)
        packs = served.files.config.model_type in PACKS_EXACTLY
        source = BatchSource(train, planned.rows, options.seq, options.seed, packs, _pad_id(tokenizer))
        self._run_trainer(connection, trainer, source, lambda: eval_batches(
            held_out, planned.rows_at_once, options.seq, packs, _pad_id(tokenizer)
        ))  # fmt: skip

    def _make_trainer(
        self, connection: Connection, served: HubModel, cut: CutModel, welcome: m.Welcome, snapshots: Snapshots
    ) -> Trainer:
        assert self._noise is not None
        assert self._planned is not None
        adapters.inject(cut, lora_spec(welcome.recipe, served.files.config))
        middle = attach(cut, connection.client, welcome, self._options.wire)
        planned = self._planned
        # As the training itself: the held-out loss must not end it because the hub is away.
        middle.comeback_s = self._options.give_up or math.inf
        recipe = welcome.recipe
        schedule = Schedule(self._options.lr or recipe.lr, recipe.warmup_steps, recipe.clip_norm, recipe.weight_decay)
        optimizer = AdapterOptimizer(adapters.parameters(cut), schedule)
        course = Course(
            cut, middle, snapshots, connection.adapter, self._journal, welcome, planned.partition,
            planned.micro_batches, optimizer,
        )  # fmt: skip
        course.begin(welcome)
        pipeline = Pipeline(cut, middle, self._noise, planned.under_way)
        parts = Parts(
            cut, middle, connection.client, self._noise, self._journal, pipeline, planned.micro_batches,
            self._interrupts.whole,
        )  # fmt: skip
        return Trainer(parts, course, self._options.steps)

    def _run_trainer(self, connection: Connection, trainer: Trainer, source: BatchSource, held_out: object) -> None:
        try:
            trainer.run(source.batch, held_out)  # type: ignore[arg-type]
        except (KeyboardInterrupt, HubUnreachable):
            path = trainer.saved()
            self._journal.log(f"interrupted at step {trainer.progress.step}; saved in {path}")
            self._journal.log(f"go on with: edge join --state {connection.state.folder} --data ... (the same data)")
            raise
        self._report(connection, trainer)

    def _report(self, connection: Connection, trainer: Trainer) -> None:
        progress, path = trainer.progress, trainer.saved()
        sent, received = connection.client.traffic
        connection.state.write_report(
            {
                "name": connection.membership.name,
                "steps": progress.step,
                "rounds": progress.round,
                "held_out": progress.held_out,
                "losses": progress.losses,
                "target_tokens": progress.tokens,
                "bytes_sent": sent,
                "bytes_received": received,
            }
        )
        if len(progress.held_out) >= 2:
            before, after = progress.held_out[0], progress.held_out[-1]
            self._journal.log(f"held-out loss {before:.4f} before, {after:.4f} after {progress.step} steps")
        self._journal.log(f"done: {progress.step} steps, {progress.round} rounds; saved in {path}")

    # -- the screen ----------------------------------------------------------------------------------

    def take_snapshot(self) -> EdgeSnapshot:
        """What the screen shows now; also refreshes what the next Ping tells the hub."""
        options, trainer, connection = self._options, self._trainer, self._connection
        noise, planned, served = self._noise, self._planned, self._served
        if connection is None:
            return EdgeSnapshot(options.name or "edge", "", self._phase, log=self._journal.recent())
        figures, (sent, received) = connection.client.figures, connection.client.traffic
        pong, welcome = figures.pong, connection.client.welcome
        progress = trainer.progress if trainer else None
        if progress is not None:
            for loss in progress.losses[self._shown :]:
                self._curve.add(loss)
            self._shown = len(progress.losses)
        hub = connection.membership.hub
        snapshot = EdgeSnapshot(
            name=connection.membership.name,
            hub=f"{hub.host}:{hub.ctl}",
            phase=self._phase_text(),
            model=served.description.model_name.rpartition("/")[2] if served else "",
            partition=str(planned.partition) if planned else "",
            wire=options.wire or "",
            cohort_joined=pong.joined if pong else 0,
            cohort_size=pong.cohort if pong else 0,
            step=progress.step if progress else 0,
            steps=options.steps,
            round=progress.round if progress else 0,
            rounds=(welcome.recipe.rounds or None) if welcome else None,
            round_step=progress.round_step if progress else 0,
            round_steps=welcome.recipe.round_steps if welcome else 0,
            loss=progress.losses[-1] if progress and progress.losses else None,
            losses=self._curve.points(),
            held_out_before=progress.held_out[0] if progress and progress.held_out else None,
            held_out_last=progress.held_out[-1] if progress and len(progress.held_out) > 1 else None,
            tokens_per_s=progress.tokens_per_s if progress else None,
            round_trip_ms=1e3 * figures.round_trip_s if figures.round_trip_s is not None else None,
            time_spent=_time_spent(trainer),
            bytes_sent=sent,
            bytes_received=received,
            noise_scale=noise.scale if noise else 0.0,
            noise_sigma=noise.sigma if noise else 0.0,
            noise_r=noise.r if noise else None,
            log=self._journal.recent(),
            trouble=connection.client.trouble,
        )
        connection.client.status = self._ping(snapshot)
        return snapshot

    def _phase_text(self) -> str:
        trainer, connection = self._trainer, self._connection
        if trainer is None or connection is None:
            return self._phase
        pong = connection.client.figures.pong
        if trainer.progress.phase == "training" and pong and pong.joined < pong.cohort and pong.step == 0:
            return f"waiting for the cohort ({pong.joined} of {pong.cohort})"
        return trainer.progress.phase

    def _ping(self, snapshot: EdgeSnapshot) -> m.Ping:
        return m.Ping(
            state=snapshot.phase[:128],
            step=snapshot.step,
            tokens_per_s=snapshot.tokens_per_s or 0.0,
            round_trip_ms=snapshot.round_trip_ms or 0.0,
            noise_sigma=snapshot.noise_sigma,
            noise_r=snapshot.noise_r or 0.0,
            loss=snapshot.loss if self._options.share_loss else None,
        )


def join(options: JoinOptions) -> None:
    """Run `edge join` with its live view."""
    journal = Journal()
    with Interrupts() as interrupts:
        joining = Joining(options, journal, interrupts)
        with LiveView(joining.take_snapshot, VIEW, journal, headless=options.headless):
            joining.run()


def _time_spent(trainer: Trainer | None) -> TimeSpent:
    if trainer is None:
        return TimeSpent()
    p = trainer.progress
    return TimeSpent(p.blocks_a, p.link, p.hub, p.blocks_c, p.other)


def _pad_id(tokenizer: object) -> int:
    pad = getattr(tokenizer, "pad_token_id", None)
    return pad if isinstance(pad, int) else 0
