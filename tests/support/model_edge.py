"""An edge that trains, without tensors: what its process does, what is on its disk, and what a kill leaves of it.

The process is a generator that follows `edge/trainer.py` line by line; weights are hashes of everything that made
them, so equal hashes mean equal training. It yields what it asks of the hub and is sent the answer.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from messaging.errors import ROUND_CLOSES, ErrorCode, HubError, LinkLost

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
    micro: int = 0


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
    micro: int = 0
    micros: int = 1


@dataclass(frozen=True)
class Send:
    """Ask, and go on without the answer."""

    ask: Ask


@dataclass(frozen=True)
class Take:
    """Wait for the next answer to what was sent: what was asked, and the answer."""

    kind: str = "take"


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
        self.asked: Ask | Take | None = None
        self._latest: Ask | Take = Ask("session")
        #: what was sent in this try of a step and is not answered, and the answers that are not taken
        self._sent: list[Ask] = []
        self._got: list[tuple[Ask, object]] = []
        self._try = 0
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
        lost, self._sent = self._sent, []
        self._got += [(ask, LinkLost("a new session")) for ask in lost]
        if isinstance(asked, Take):
            self.asked = asked
            self._deliver()
        elif asked is not None and self.mail is None:
            self.mail = self.welcome if asked.kind == "session" else LinkLost("a new session")

    def lose_mail(self) -> None:
        """What the hub answered last was still on its way when the hub ended."""
        if self.mail is not None and not self._parting and self._latest.kind not in ("pause", "session"):
            self.mail, self.asked = None, self._latest
            self._sent += [ask for ask, _ in self._got]
            self._got = []
            if isinstance(self.asked, Take):
                self._sent.append(Ask("lost"))

    def hear(self, version: int, round_: int) -> None:
        """A Pong."""
        self._pong = (version, round_)

    def act(self) -> None:
        """Take the answer that is here, and go on to the next question."""
        mail, self.mail = self.mail, None
        self._advance(mail)

    def _answered(self, value: object) -> None:
        self.asked, self.mail = None, value

    def _deliver(self) -> None:
        """Hand on an answer to what was sent, if one is waited for."""
        if isinstance(self.asked, Take) and self.mail is None and self._got:
            ask, value = self._got.pop(0)
            self.mail, self.asked = value if isinstance(value, Exception) else (ask, value), None

    def _send(self, ask: Ask) -> None:
        if self.welcome.number != self._session:
            self._got.append((ask, LinkLost("a new session")))
            return
        self._sent.append(ask)
        if not self.lost:
            try_ = self._try

            def answered(value: object) -> None:
                if try_ == self._try and ask in self._sent:
                    self._sent.remove(ask)
                    self._got.append((ask, value))
                    self._deliver()

            self._hub.ask(self.welcome.number, ask, answered)

    def _advance(self, mail: object) -> None:
        try:
            ask = self._run.throw(mail) if isinstance(mail, Exception) else self._run.send(mail)
            while isinstance(ask, Send):
                self._send(ask.ask)
                ask = self._run.send(None)
        except StopIteration as stop:
            self.ended = stop.value
            return
        self.asked = self._latest = ask
        if isinstance(ask, Take):
            self._deliver()
            return
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

    def _trainer(self) -> Generator[Ask | Send | Take, Any, str]:
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

    def _rounds(self) -> Generator[Ask | Send | Take, Any, None]:
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

    def _infer(self, content: str) -> Generator[Ask | Send | Take, Any, None]:
        while True:
            try:
                yield Ask("infer", content=(0, content))
                return
            except LinkLost:
                yield Ask("session")

    def _one_step(self) -> Generator[Ask | Send | Take, Any, bool]:
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
                if error.code is ErrorCode.BEHIND and error.detail == ROUND_CLOSES:
                    self._edge.standing = replace(self._edge.standing, closes=True)
                elif error.code is ErrorCode.BEHIND:
                    yield from self._behind()
                else:
                    raise

    def _behind(self) -> Generator[Ask | Send | Take, Any, None]:
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

    def _step(self) -> Generator[Ask | Send | Take, Any, None]:
        edge = self._edge
        standing = edge.standing
        self._wait()
        hiddens, replies = yield from self._micro_batches(standing)
        reply = replies[-1]
        weights = digest("step", standing.weights, hiddens, [given.answer for given in replies])
        edge.standing = replace(standing, steps=standing.steps + 1, weights=weights, tokens=True, closes=reply.closes)
        self._put(edge.standing, reply.checkpoint)
        # Here a kill may find the snapshot written or not.
        yield Ask("pause")

    def _micro_batches(self, standing: Standing) -> Generator[Ask | Send | Take, Any, tuple[list[Hidden], list[Grad]]]:
        """As `edge/pipeline.py`: forwards as far as the window goes, then whatever comes, each kind in order."""
        edge, step, began = self._edge, standing.steps, 0
        hiddens: list[Hidden] = []
        replies: list[Grad] = []
        self._try += 1
        self._sent, self._got = [], []
        while len(replies) < edge.micros:
            if began < edge.micros and began - len(replies) < edge.window:
                smashed = Smashed(edge.name, step, standing.weights, began)
                yield Send(Ask("forward", step, smashed, began, edge.micros))
                began += 1
                continue
            ask, value = yield Take()
            if ask.kind == "forward":
                assert ask.micro == len(hiddens), "hidden states come in order"
                hiddens.append(value)
                yield Send(Ask("gradient", step, Gradient(step, value), ask.micro, edge.micros))
            else:
                assert ask.micro == len(replies), "gradients come in order"
                replies.append(value)
        return hiddens, replies

    def _keep_up(self) -> Generator[Ask | Send | Take, Any, None]:
        if self.welcome.number != self._session:
            self._resume((yield Ask("session")))
        version = max(self.welcome.version, self._pong[0])
        if version > self._edge.standing.version:
            self._load(version)
            self._begin_round(max(self._edge.standing.round, self._pong[1], self.welcome.round))

    def _close_round(self) -> Generator[Ask | Send | Take, Any, bool]:
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

    def _finish_round(self) -> Generator[Ask | Send | Take, Any, bool]:
        self._wait()
        standing, done = self._edge.standing, self._all_taken()
        if done:
            # Ahead of the upload: the checkpoint that the last upload brings about knows that it has left.
            yield Ask("leave", content=True)
        if standing.tokens:
            self._edge.gave = standing.weights
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

    def __init__(self, name: str, wanted: int | None, evaluates: bool, micros: int = 1, window: int = 16) -> None:
        self.name, self.wanted, self.evaluates = name, wanted, evaluates
        self.micros, self.window = micros, window
        self.disk: dict[tuple[int, int], Standing] = {}
        self.standing = Standing(0, 0, 0, "")
        self.process: Process | None = None
        self.done = False
        #: what it uploaded last
        self.gave = ""
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
