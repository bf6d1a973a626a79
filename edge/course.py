"""Where an edge's training stands, in the model and on the disk; and how it gets back to where the hub stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import messaging.messages as m
from blocks import adapters
from blocks.adapters import Adapter
from blocks.optimizer import AdapterOptimizer
from blocks.partition import Partition
from blocks.surgery import CutModel
from edge.middle import HubMiddle
from edge.snapshots import Snapshot, Snapshots, Standing
from messaging.console import Journal


class Course:
    """The state of one training: adapter and optimizer of A and C, and what is counted. It is saved at every change.

    `fetch_adapter` gives this edge's part of a published adapter version.
    """

    def __init__(
        self,
        cut: CutModel,
        middle: HubMiddle,
        snapshots: Snapshots,
        fetch_adapter: Callable[[int], Adapter],
        journal: Journal,
        welcome: m.Welcome,
        partition: Partition,
        micro_batches: int,
        optimizer: AdapterOptimizer,
    ) -> None:
        self._cut = cut
        self._middle = middle
        self._snapshots = snapshots
        self._fetch_adapter = fetch_adapter
        self._journal = journal
        self.optimizer = optimizer
        self.standing = Standing(
            welcome.applied, welcome.round, welcome.adapter_version, 0, 0, False, (), -1,
            welcome.model_hash, str(partition), micro_batches,
        )  # fmt: skip
        #: adapter and optimizer as the round began, or as this process did: what a loss that is not finite leaves
        self._sound: Snapshot | None = None
        middle.before_step = snapshots.wait

    # -- going on ------------------------------------------------------------------------------------

    def took_step(self, tokens: int, reply: m.StepGrad) -> None:
        """A step more, of so many target tokens, is inside A and C."""
        standing = self.standing
        self.standing = replace(
            standing,
            steps=standing.steps + 1,
            round_step=standing.round_step + 1,
            round_tokens=standing.round_tokens + tokens,
            closes=bool(reply.round_closes),
        )
        self._keep(reply.checkpoint)

    def evaluated(self, losses: tuple[float, ...]) -> None:
        """The held-out loss of this round was taken; it is saved with the next step."""
        standing = self.standing
        self.standing = replace(standing, held_out=(*standing.held_out, *losses), evaluated=standing.round)

    def closes(self) -> None:
        """The round takes no more steps."""
        self.standing = replace(self.standing, closes=True)

    def goes_on(self) -> None:
        """The round takes more steps after all."""
        self.standing = replace(self.standing, closes=False)

    def load(self, version: int) -> None:
        """Take a published adapter into A and C; the optimizer's moments stay."""
        if version != self._middle.version or version == 0:
            adapters.write(self._cut, self._fetch_adapter(version))
            self._middle.version = version

    def begin_round(self, round_: int) -> None:
        """Stand at the beginning of a round, with the adapter that is loaded."""
        version = self._middle.version
        self.standing = replace(
            self.standing, round=round_, version=version, round_step=0, round_tokens=0, closes=False
        )
        self._sound = self._keep(self.standing.steps)

    def leave_sound(self) -> int:
        """Save what was good when the round began in the place of what came after it; from which step that is."""
        assert self._sound is not None
        self._snapshots.put(replace(self._sound, standing=self.standing), None)
        self._snapshots.wait()
        return self._sound.standing.steps

    def saved(self) -> Path:
        """Where the training is saved as it stands now."""
        self._snapshots.wait()
        return self._snapshots.path(self.standing)

    def _keep(self, checkpoint: int) -> Snapshot:
        """Have it written where the training stands; `checkpoint`: this edge's steps in the hub's newest checkpoint."""
        snapshot = Snapshot(self.standing, adapters.read(self._cut), self.optimizer.state())
        self._snapshots.put(snapshot, checkpoint)
        return snapshot

    # -- getting back to where the hub stands ------------------------------------------------------------

    def begin(self, welcome: m.Welcome) -> None:
        """Stand where an earlier process of this edge stood, as far as it fits the hub; or begin."""
        newest = self._snapshots.newest()
        if newest is not None and not self._fits(newest):
            newest = None
        if newest is not None and self._go_back(newest, welcome):
            return
        self._load_published(welcome)
        if newest is not None:
            # The optimizer's moments are still this edge's own.
            moments = self._snapshots.at(newest.steps, newest.round)
            assert moments is not None
            self.optimizer.load(dict(moments.optimizer))
        if welcome.applied:
            self._journal.log(f"going on at step {welcome.applied} with the published adapter")
        self._sound = self._keep(0)

    def resume(self, welcome: m.Welcome) -> None:
        """A session is open again: stand where the hub stands."""
        standing = self.standing
        if welcome.applied in (standing.steps, standing.steps + 1):
            # In the second case the hub took the step whose answer was lost: it is asked for again, and told again.
            self._journal.log(f"resumed at step {standing.steps}, nothing lost")
            return
        self._snapshots.wait()
        if welcome.applied < standing.steps and self._go_back(standing, welcome):
            return
        self.skip(welcome)

    def skip(self, welcome: m.Welcome) -> None:
        """Go on with the published adapter where the hub stands and nothing here fits that."""
        self._journal.log(
            f"the hub is at step {welcome.applied} of this edge, this edge was at {self.standing.steps}: "
            "going on from the last published adapter; what this edge's own blocks learned since then is lost"
        )
        self._load_published(welcome)
        self.standing = replace(self.standing, steps=welcome.applied)
        self.begin_round(welcome.round)
        # The hub may be closing the round, and the answer that said so is what was lost: it is asked first.
        self.standing = replace(self.standing, closes=True)

    def _fits(self, standing: Standing) -> bool:
        mine = self.standing
        return (standing.model_hash, standing.partition) == (mine.model_hash, mine.partition)

    def _go_back(self, newest: Standing, welcome: m.Welcome) -> bool:
        """Restore the snapshot that fits what the hub has applied. False if there is none."""
        applied = welcome.applied
        if applied - 1 == newest.steps:
            # The hub took a step whose result was lost here: it tells it again.
            snapshot = self._snapshots.at(newest.steps, newest.round)
        else:
            snapshot = self._snapshots.at(applied, welcome.round)
        if snapshot is None or not self._fits(snapshot.standing):
            return False
        adapters.write(self._cut, snapshot.adapter)
        self.optimizer.load(dict(snapshot.optimizer))
        self._middle.version = snapshot.standing.version
        self.standing = replace(snapshot.standing, micro_batches=self.standing.micro_batches)
        self._sound = snapshot
        self._snapshots.drop_after(snapshot.standing)
        again = newest.steps - snapshot.standing.steps
        repeated = f": the hub went back, {again} steps are taken again" if again else ""
        self._journal.log(f"resumed at step {snapshot.standing.steps}, nothing lost{repeated}")
        return True

    def _load_published(self, welcome: m.Welcome) -> None:
        self._middle.version = -1
        self.load(welcome.adapter_version)
