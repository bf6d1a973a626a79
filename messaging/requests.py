"""The edge's table of requests: what is asked, what may be sent, what has to be sent again.

Pure: no sockets; the time in seconds and the random numbers are handed in. One thread uses it:

    for outgoing in table.due(now):
        if transport.send(outgoing.channel, outgoing.frames):
            table.sent(outgoing.request, now)
        else:
            table.blocked(outgoing.channel, now)

A request is sent again, with the same id and the same bytes, only when it may have been lost: after its
channel was connected anew, when the hub reports a gap, or when the hub is heard but gives no sign of
having it. That a step waits for its cohort, however long, is no reason.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from messaging.errors import ErrorCode, FedseaError, HubUnreachable, LinkLost, ProtocolError
from messaging.exchange import ANSWERS, WITHOUT_SESSION, Answered, Failed, Outgoing, channel_of, hub_error
from messaging.framing import encode
from messaging.messages import MAX_FRAME_BYTES, UNORDERED_BASE, AnyMessage, Envelope, Error, Packet
from messaging.transport import Buffer, Channel

_BACKOFF_S, _BACKOFF_MOST_S = 0.25, 10.0
#: How long a full or unconnected channel is left alone.
_BLOCKED_S = 0.05
#: How long a sent request may go without a sign that the hub has it, on a link of at least this speed.
_PATIENCE_S, _SLOWEST_BYTES_PER_S = 10.0, 64 * 1024


@dataclass(slots=True)
class _Request:
    id: int
    message: AnyMessage
    frames: list[Buffer]
    channel: Channel
    #: The time at which it fails, inf for never, and the seconds that this was from `add`.
    deadline: float
    deadline_s: float
    size: int
    #: When it was last handed to the transport; None if it waits to be.
    sent_at: float | None = None
    #: The hub has said that it has it.
    held: bool = False
    #: How often it was sent again for want of a sign.
    doubts: int = 0

    @property
    def in_session(self) -> bool:
        return not isinstance(self.message, WITHOUT_SESSION)

    def doubtful_at(self) -> float:
        """When to doubt that the hub has it."""
        if self.sent_at is None or self.held:
            return math.inf
        return self.sent_at + _PATIENCE_S * 2.0 ** min(self.doubts, 10) + self.size / _SLOWEST_BYTES_PER_S

    def wait_again(self) -> None:
        self.sent_at = None
        self.held = False


@dataclass(slots=True)
class _Lane:
    """One channel: when it may be used again, and how often in a row it lost what was sent."""

    not_before: float = -math.inf
    losses: int = 0


@dataclass(frozen=True, slots=True)
class Session:
    """What WELCOME gave. `number` 0: none yet; until then one frame's worth of bytes may be unanswered."""

    number: int = 0
    epoch: int = 0
    credits: int = MAX_FRAME_BYTES
    next_ordered: int = 1


class Requests:
    """The table. It gives everything up when the hub was silent for `give_up_s` seconds."""

    def __init__(self, rng: random.Random, give_up_s: float) -> None:
        self.session = Session()
        #: A HELLO is needed before anything that belongs to a session goes out (again).
        self.needs_session = True
        self._rng = rng
        #: Seconds of silence after which everything fails; inf for never.
        self.give_up_s = give_up_s
        self._table: dict[int, _Request] = {}
        self._lanes = {Channel.CTL: _Lane(), Channel.BULK: _Lane()}
        self._next_unordered = UNORDERED_BASE
        #: When the hub was last heard, or something was asked after a time without anything to ask.
        self._alive_at = -math.inf

    def __len__(self) -> int:
        return len(self._table)

    # --- asking and sending ----------------------------------------------------------------

    def add(self, message: AnyMessage, now: float, deadline_s: float = math.inf) -> int:
        """Ask something; the id names its outcome later. It fails if there is none after `deadline_s` seconds.

        ProtocolError if the message breaks a limit. RuntimeError before the first session, if it needs one.
        """
        if self.session.number == 0 and not isinstance(message, WITHOUT_SESSION):
            raise RuntimeError(f"{type(message).__name__} needs a session: send Hello first")
        if not self._table:
            self._alive_at = max(self._alive_at, now)
        number = self.session.next_ordered if message.ordered else self._next_unordered
        deadline_ms = 0 if math.isinf(deadline_s) else math.ceil(deadline_s * 1000)
        frames = encode(Packet(message, self._envelope(message, number, deadline_ms)))
        size = sum(len(frame) for frame in frames)
        deadline = now + deadline_s
        self._table[number] = _Request(number, message, frames, channel_of(message), deadline, deadline_s, size)
        if message.ordered:
            self.session = replace(self.session, next_ordered=number + 1)
        else:
            self._next_unordered += 1
        return number

    def stamp(self, message: AnyMessage) -> Outgoing:
        """A message outside of the table, to be sent once if at all: Ping, CloseStream."""
        number, self._next_unordered = self._next_unordered, self._next_unordered + 1
        return Outgoing(number, channel_of(message), encode(Packet(message, self._envelope(message, number, 0))))

    def due(self, now: float) -> Iterator[Outgoing]:
        """What to send now, in order. Report each with `sent` or `blocked` before taking the next."""
        for channel in self._lanes:
            for request, at in self._candidates(channel):
                if at > now:
                    continue
                before = request.sent_at
                yield Outgoing(request.id, channel, request.frames)
                if request.sent_at == before:
                    break

    def sent(self, request: int, now: float) -> None:
        """The transport took it."""
        entry = self._table[request]
        if entry.sent_at is not None:
            entry.doubts += 1
        entry.sent_at = now

    def blocked(self, channel: Channel, now: float) -> None:
        """The transport would not take it: try again shortly, or when the channel is connected."""
        self._lanes[channel].not_before = now + _BLOCKED_S

    def _candidates(self, channel: Channel) -> Iterator[tuple[_Request, float]]:
        """What may be sent on a channel, and from when. Nothing overtakes a request that waits for credits."""
        lane = self._lanes[channel]
        for request in [item for item in self._table.values() if item.channel is channel]:
            if request.in_session and self.needs_session:
                continue
            if request.sent_at is None:
                if not self._affordable(request):
                    return
                yield request, lane.not_before
            elif self._alive_at > request.sent_at:
                yield request, max(lane.not_before, request.doubtful_at())

    def _affordable(self, request: _Request) -> bool:
        unanswered = sum(item.size for item in self._table.values() if item.sent_at is not None)
        return unanswered == 0 or unanswered + request.size <= self.session.credits

    def _envelope(self, message: AnyMessage, number: int, deadline_ms: int) -> Envelope:
        if isinstance(message, WITHOUT_SESSION):
            return Envelope(request=number, deadline_ms=deadline_ms)
        ordered = [item.id for item in self._table.values() if item.message.ordered]
        ack = min(ordered, default=self.session.next_ordered) - 1
        return Envelope(self.session.number, self.session.epoch, number, ack, 0, deadline_ms)

    def _back_off(self, channel: Channel, now: float) -> None:
        lane = self._lanes[channel]
        if now < lane.not_before:
            return  # requests that were sent together are refused together: that counts once
        lane.not_before = now + self._rng.uniform(0, min(_BACKOFF_MOST_S, _BACKOFF_S * 2.0 ** min(lane.losses, 10)))
        lane.losses += 1

    # --- what comes back -------------------------------------------------------------------

    def received(self, packet: Packet, now: float) -> Answered | Failed | None:
        """A message from the hub. None when it ends no request: a duplicate, a Pong, BUSY."""
        self._alive_at = now
        envelope, message = packet.envelope, packet.message
        self._note(envelope)
        if isinstance(message, Error) and envelope.request == 0:
            return Failed(0, hub_error(message))
        request = self._table.get(envelope.request)
        if request is None and isinstance(message, Error) and message.code == ErrorCode.NO_SESSION:
            # The answer to a Ping: the hub forgot the session, and with it what it has told that it holds.
            self.needs_session = self.needs_session or envelope.session == self.session.number
        if request is None or (request.in_session and envelope.epoch < self.session.epoch):
            return None
        if isinstance(message, Error):
            return self._refused(request, message, now)
        if request.in_session and envelope.epoch != self.session.epoch:
            return None
        del self._table[request.id]
        self._lanes[request.channel].losses = 0
        if not isinstance(message, ANSWERS[type(request.message)]):
            asked, got = type(request.message).__name__, type(message).__name__
            return Failed(request.id, ProtocolError(f"the hub answered {asked} with {got}"))
        return Answered(request.id, message)

    def _note(self, envelope: Envelope) -> None:
        """What every message of the hub tells: its epoch, the credits, and how far it has taken our requests."""
        session = self.session
        if session.number and envelope.epoch > session.epoch:
            self.needs_session = True
        if session.number == 0 or (envelope.session, envelope.epoch) != (session.number, session.epoch):
            return
        if envelope.credits and envelope.credits != session.credits:
            self.session = replace(session, credits=envelope.credits)
        for request in self._table.values():
            if request.id <= envelope.ack and request.sent_at is not None:
                request.held = True

    def _refused(self, request: _Request, message: Error, now: float) -> Failed | None:
        """An error in the place of a reply; some of them only say when to send again."""
        if message.code == ErrorCode.BUSY:
            request.held = True
            return None
        if message.code == ErrorCode.NO_SESSION and request.in_session:
            self.needs_session = True
            request.wait_again()
            return None
        if message.code == ErrorCode.LATER:
            request.wait_again()
            self._back_off(request.channel, now)
            return None
        if message.code == ErrorCode.GAP and message.detail in self._table:
            for later in self._table.values():
                if later.message.ordered and later.id >= message.detail:
                    later.wait_again()
            self._back_off(request.channel, now)
            return None
        del self._table[request.id]
        return Failed(request.id, hub_error(message))

    # --- sessions, links, time -------------------------------------------------------------

    def opened(self, session: Session) -> list[Failed]:
        """A WELCOME came. Requests of another session fail with LinkLost; those of this one are sent again."""
        resumed = (session.number, session.epoch) == (self.session.number, self.session.epoch)
        if resumed:
            session = replace(session, next_ordered=max(session.next_ordered, self.session.next_ordered))
        failed = []
        for request in [item for item in self._table.values() if item.in_session]:
            if resumed:
                request.wait_again()
            else:
                del self._table[request.id]
                failed.append(Failed(request.id, LinkLost("the session with the hub ended before the answer came")))
        self.session = session
        self.needs_session = False
        return failed

    def connected(self, channel: Channel, now: float) -> None:
        """A channel is up, maybe again: whatever was sent on it before may be lost."""
        self._lanes[channel].not_before = now
        lost = [item for item in self._table.values() if item.channel is channel and item.sent_at is not None]
        for request in lost:
            request.wait_again()
        if lost:
            self._back_off(channel, now)

    def reset(self) -> None:
        """All connections were thrown away: whatever was sent may be lost, and a HELLO goes before it."""
        for request in self._table.values():
            if request.sent_at is not None:
                request.wait_again()
        self.needs_session = True

    def expired(self, now: float) -> list[Failed]:
        """The requests that end now, for their deadline or because the hub is silent for too long."""
        if self._table and now >= self._alive_at + self.give_up_s:
            seconds = f"{self.give_up_s:g} s"
            text = f"nothing heard from the hub for {seconds}: is it running, and can this machine reach it?"
            return self.fail_all(HubUnreachable(text))
        failed = []
        for request in [item for item in self._table.values() if now >= item.deadline]:
            del self._table[request.id]
            asked = type(request.message).__name__
            text = f"the hub did not answer {asked} within {request.deadline_s:g} s"
            failed.append(Failed(request.id, HubUnreachable(text)))
        return failed

    def fail_all(self, error: FedseaError) -> list[Failed]:
        """End everything with one error, as when this side closes."""
        failed = [Failed(number, error) for number in self._table]
        self._table.clear()
        return failed

    def next_event(self) -> float:
        """The time at which `due` or `expired` may have something, if nothing comes before; inf for never."""
        if not self._table:
            return math.inf
        times = [self._alive_at + self.give_up_s]
        times += [request.deadline for request in self._table.values()]
        for channel in self._lanes:
            times += [at for _, at in self._candidates(channel)]
        return min(times, default=math.inf)
