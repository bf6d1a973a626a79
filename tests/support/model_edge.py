"""An edge that trains, without tensors: what its process does, what is on its disk, and what a kill leaves of it.

The process is a generator that follows `edge/trainer.py` line by line; weights are hashes of everything that made
them, so equal hashes mean equal training. It yields what it asks of the hub and is sent the answer.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from messaging.errors import ErrorCode, HubError, LinkLost

if TYPE_CHECKING:
    from tests.support.model_hub import ModelHub


def digest(*parts: object) -> str:
    """Stands for bytes: equal for equal parts."""
    return blake2b(repr(parts).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Smashed:
    """The bytes of a forward."""

    name: str
    step: int
    weights: str


@dataclass(frozen=True)
class Hidden:
    """The bytes of its answer: which joined forward it is of, and which rows."""

    joined: str
    rows: Smashed


@dataclass(frozen=True)
class Gradient:
    """The bytes of a backward, made from a hidden."""

    step: int
    hidden: Hidden


@dataclass(frozen=True)
class Grad:
    """The whole answer to a backward."""

    answer: object
    hub_step: int
    closes: bool
    checkpoint: int


@dataclass(frozen=True)
class Adapter:
    """An upload."""

    name: str
    round: int
    weights: str


@dataclass(frozen=True)
class Published:
    """The answer to AwaitRound, with the adapter that would be fetched then."""

    version: int
    round: int
    over: bool


@dataclass(frozen=True)
class Welcome:
    """The answer to Hello."""

    number: int
    applied: int
    version: int
    round: int


@dataclass(frozen=True)
class Ask:
    """What a process wants; `number` is a step or a round."""

    kind: str
    number: int = 0
    content: Any = None


@dataclass(frozen=True)
class Standing:
    """See `edge/snapshots.py`; `weights` stand for its tensors."""

    steps: int
    round: int
    version: int
    weights: str
    tokens: bool = False
    closes: bool = False


class Process:
    """What a kill loses: the trainer with its network thread."""

    def __init__(self, edge: Edge, hub: ModelHub) -> None:
        self._edge, self._hub = edge, hub
        self.welcome = hub.hello(edge.name)
        self.asked: Ask | None = None
        self._latest = Ask("session")
        self.mail: object = None
        self.ended: str | None = None
        self._parting = False
        self.marks: list[int] = []
        self.inherited = set(edge.disk)
        self.writing: Standing | None = None
        self._session = self.welcome.number
        self._pong = (0, 0)
        self._run = self._trainer()
        self._advance(None)

    # -- the network thread --------------------------------------------------------------------------

    @property
    def lost(self) -> bool:
        """The hub does not know this session any more. Who only says good-bye does not mind."""
        return not self._parting and not self._hub.knows(self.welcome.number)

    def reconnect(self) -> None:
        """A new session; what was asked in the old one fails."""
        self.welcome = self._hub.hello(self._edge.name)
        asked, self.asked = self.asked, None
        if asked is not None and self.mail is None:
            self.mail = self.welcome if asked.kind == "session" else LinkLost("a new session")

    def lose_mail(self) -> None:
        """What the hub answered last was still on its way when the hub ended."""
        if self.mail is not None and not self._parting and self._latest.kind not in ("pause", "session"):
            self.mail, self.asked = None, self._latest

    def hear(self, version: int, round_: int) -> None:
        """A Pong."""
        self._pong = (version, round_)

    def act(self) -> None:
        """Take the answer that is here, and go on to the next question."""
        mail, self.mail = self.mail, None
        self._advance(mail)

    def _answered(self, value: object) -> None:
        self.asked, self.mail = None, value

    def _advance(self, mail: object) -> None:
        try:
            ask = self._run.throw(mail) if isinstance(mail, Exception) else self._run.send(mail)
        except StopIteration as stop:
            self.ended = stop.value
            return
        self.asked = self._latest = ask
        bound = ask.kind not in ("pause", "session", "where", "infer") and not self._parting
        if ask.kind == "pause":
            self._answered(True)
        elif bound and self.welcome.number != self._session:
            # What belongs to a step or a round is asked only where the trainer knows how far the hub is.
            self._answered(LinkLost("a new session"))
        elif not self.lost:
            if ask.kind in ("session", "where"):
                self._answered(self.welcome if ask.kind == "session" else self._hub.welcome(self.welcome.number))
            else:
                self._hub.ask(self.welcome.number, ask, self._answered)

    # -- the trainer ---------------------------------------------------------------------------------

    def _trainer(self) -> Generator[Ask, Any, str]:
        edge = self._edge
        try:
            self._begin(self.welcome)
            yield from self._rounds()
            why = "done"
        except HubError as error:
            why = error.code.name
        self._wait()
        edge.done = edge.done or why == "done"
        self._parting = True
        if self._hub.knows(self.welcome.number):
            yield Ask("leave", content=False)
        return why

    def _rounds(self) -> Generator[Ask, Any, None]:
        over, evaluated = False, -1
        while not over:
            standing = self._edge.standing
            if self._edge.evaluates and evaluated < standing.round and not standing.tokens:
                yield from self._infer(digest("held-out", standing.weights))
                evaluated = standing.round
            if standing.closes or (self._all_taken() and standing.tokens):
                over = yield from self._close_round()
            elif self._all_taken():
                over = True
            else:
                over = yield from self._one_step()

    def _all_taken(self) -> bool:
        return self._edge.wanted is not None and self._edge.standing.steps >= self._edge.wanted

    def _infer(self, content: str) -> Generator[Ask, Any, None]:
        while True:
            try:
                yield Ask("infer", content=(0, content))
                return
            except LinkLost:
                yield Ask("session")

    def _one_step(self) -> Generator[Ask, Any, bool]:
        while True:
            yield from self._keep_up()
            if self._edge.standing.closes or self._all_taken():
                return False
            try:
                yield from self._step()
                return False
            except LinkLost:
                self._resume((yield Ask("session")))
            except HubError as error:
                if error.code is ErrorCode.TRAINING_OVER:
                    self._load(max(self.welcome.version, self._pong[0]))
                    return True
                if error.code is ErrorCode.BEHIND:
                    yield from self._behind()
                else:
                    raise

    def _behind(self) -> Generator[Ask, Any, None]:
        while True:
            try:
                welcome = yield Ask("where")
                break
            except LinkLost:
                continue
        if welcome.applied == self._edge.standing.steps + 1:
            self._skip(welcome)
        else:
            self._resume(welcome)

    def _step(self) -> Generator[Ask, Any, None]:
        edge = self._edge
        standing = edge.standing
        self._wait()
        hidden = yield Ask("forward", standing.steps, Smashed(edge.name, standing.steps, standing.weights))
        reply = yield Ask("gradient", standing.steps, Gradient(standing.steps, hidden))
        weights = digest("step", standing.weights, hidden, reply.answer)
        edge.standing = replace(standing, steps=standing.steps + 1, weights=weights, tokens=True, closes=reply.closes)
        self._put(edge.standing, reply.checkpoint)
        # Here a kill may find the snapshot written or not.
        yield Ask("pause")

    def _keep_up(self) -> Generator[Ask, Any, None]:
        if self.welcome.number != self._session:
            self._resume((yield Ask("session")))
        version = max(self.welcome.version, self._pong[0])
        if version > self._edge.standing.version:
            self._load(version)
            self._begin_round(max(self._edge.standing.round, self._pong[1], self.welcome.round))

    def _close_round(self) -> Generator[Ask, Any, bool]:
        while True:
            try:
                return (yield from self._finish_round())
            except LinkLost:
                pass
            except HubError as error:
                if error.code is not ErrorCode.BEHIND:
                    raise
                self._edge.standing = replace(self._edge.standing, closes=False)
                return False
            steps = self._edge.standing.steps
            self._resume((yield Ask("session")))
            if self._edge.standing.steps != steps:
                return False

    def _finish_round(self) -> Generator[Ask, Any, bool]:
        self._wait()
        standing, done = self._edge.standing, self._all_taken()
        if done:
            # Ahead of the upload: the checkpoint that the last upload brings about knows that it has left.
            yield Ask("leave", content=True)
        if standing.tokens:
            yield Ask("upload", standing.round, Adapter(self._edge.name, standing.round, standing.weights))
        published = yield Ask("await", standing.round)
        self._load(published.version)
        self._begin_round(published.round)
        return published.over or done

    def _load(self, version: int) -> None:
        standing = self._edge.standing
        if version != standing.version:
            # The optimizer's moments stay, so what was before still counts.
            weights = digest("loaded", standing.weights, self._hub.published[version])
            self._edge.standing = replace(standing, version=version, weights=weights)

    def _begin_round(self, round_: int) -> None:
        edge = self._edge
        edge.standing = replace(edge.standing, round=round_, tokens=False, closes=False)
        self._put(edge.standing, edge.standing.steps)

    # -- going on ------------------------------------------------------------------------------------

    def _begin(self, welcome: Welcome) -> None:
        edge, newest = self._edge, self._edge.newest
        if newest is not None and self._go_back(newest, welcome):
            return
        edge.standing = Standing(welcome.applied, welcome.round, 0, digest("fresh", edge.name))
        self._load(welcome.version)
        self._put(edge.standing, 0)

    def _go_back(self, newest: Standing, welcome: Welcome) -> bool:
        edge, applied = self._edge, welcome.applied
        missed_one = applied - 1 == newest.steps
        found = edge.at(newest.steps, newest.round) if missed_one else edge.at(applied, welcome.round)
        if found is None:
            return False
        edge.standing = found
        # What was undone must not be taken for the newest by the next process.
        edge.disk = {at: kept for at, kept in edge.disk.items() if (at[1], at[0]) <= (found.round, found.steps)}
        return True

    def _resume(self, welcome: Welcome) -> None:
        self._session = self.welcome.number
        standing = self._edge.standing
        if welcome.applied in (standing.steps, standing.steps + 1):
            return
        self._wait()
        if welcome.applied < standing.steps and self._go_back(standing, welcome):
            return
        self._skip(welcome)

    def _skip(self, welcome: Welcome) -> None:
        self._edge.skips += 1
        self._edge.standing = replace(self._edge.standing, version=-1)
        self._load(welcome.version)
        self._edge.standing = replace(self._edge.standing, steps=welcome.applied)
        self._begin_round(welcome.round)

    # -- the disk ------------------------------------------------------------------------------------

    def _put(self, standing: Standing, checkpoint: int) -> None:
        self._wait()
        if checkpoint not in self.marks:
            self.marks = [*self.marks, checkpoint][-2:]
            if len(self.marks) == 2:
                self.inherited.clear()
        self.writing = standing

    def _wait(self) -> None:
        if self.writing is not None:
            self._write(self.writing)

    def _write(self, newest: Standing) -> None:
        self.writing, disk = None, self._edge.disk
        disk[newest.steps, newest.round] = newest
        for at in list(disk):
            if at != (newest.steps, newest.round) and at[0] not in self.marks and at not in self.inherited:
                del disk[at]

    def die(self, written: bool) -> None:
        """Killed; the snapshot that was being written is on the disk, or it is not."""
        if written:
            self._wait()
        self._run.close()


class Edge:
    """What outlives the process: the name, the disk. `wanted`: steps to take in all; None: until the hub is done."""

    def __init__(self, name: str, wanted: int | None, evaluates: bool) -> None:
        self.name, self.wanted, self.evaluates = name, wanted, evaluates
        self.disk: dict[tuple[int, int], Standing] = {}
        self.standing = Standing(0, 0, 0, "")
        self.process: Process | None = None
        self.done = False
        #: how often it had to go on from the published adapter
        self.skips = 0
        #: what ended its processes that were not killed
        self.ends: list[str] = []

    @property
    def newest(self) -> Standing | None:
        """The furthest standing on the disk."""
        return self.disk[max(self.disk, key=lambda at: (at[1], at[0]))] if self.disk else None

    def at(self, steps: int, round_: int) -> Standing | None:
        """As in `edge/snapshots.py`."""
        return self.disk.get((steps, round_)) or self.disk.get((steps, round_ - 1))

    def start(self, hub: ModelHub) -> None:
        """A new process."""
        self.process = Process(self, hub)

    def kill(self, written: bool) -> None:
        """End the process without a word."""
        if self.process is not None:
            self.process.die(written)
        self.process = None

    def act(self) -> None:
        """Let the process take one answer."""
        assert self.process is not None
        self.process.act()
        if self.process.ended is not None:
            self.ends.append(self.process.ended)
            self.process = None

    @property
    def can_act(self) -> bool:
        """An answer is here."""
        return self.process is not None and self.process.mail is not None
