"""The streams of all generations: their caches, the requests that are computed piece by piece, and one forward over
several of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from blocks.device import to_device
from blocks.middle import MiddleBlocks
from hub import ragged
from hub.jobs import InferItem, Place
from hub.kv import BatchCache, KvBudget, Member, StreamCache
from hub.prefixes import BLOCK, Chain, Prefixes, chain_of
from messaging.errors import ErrorCode, HubError

Key = tuple[int, int]
#: A stream that nobody asked for in so many seconds is idle.
_IDLE_S = 2.0


@dataclass(frozen=True)
class Piece:
    """New positions of one stream: states [rows, width, hidden] that build on `past` cached ones.

    mask: bool [rows, past + width] or None; positions: int64 [rows, width].
    """

    states: torch.Tensor
    past: int
    mask: torch.Tensor | None
    positions: torch.Tensor
    place: Place
    cache: StreamCache

    @property
    def rows(self) -> int:
        """Rows of the stream."""
        return self.states.shape[0]

    @property
    def width(self) -> int:
        """New positions of each row."""
        return self.states.shape[1]


@dataclass
class Work:
    """A request of a stream that is computed piece by piece, by columns; `hidden` are those of the first `have`."""

    item: InferItem
    cache: StreamCache
    states: torch.Tensor
    mask: torch.Tensor | None
    positions: torch.Tensor
    have: int = 0
    hidden: list[torch.Tensor] = field(default_factory=list)
    #: stands for the first columns that are worth keeping
    again: Chain = ()

    @property
    def whole(self) -> bool:
        """Whether all columns are computed."""
        return self.have == self.item.layout.width

    def piece(self, upto: int) -> Piece:
        """The columns from `have` up to `upto`."""
        past = self.item.layout.past
        columns = slice(self.have, upto)
        mask = None if self.mask is None else self.mask[:, : past + upto]
        states, positions = self.states[:, columns], self.positions[:, columns]
        return Piece(states, past + self.have, mask, positions, self.item.place, self.cache)

    def add(self, hidden: torch.Tensor) -> None:
        """Note the hidden states of the next columns."""
        self.hidden.append(hidden)
        self.have += hidden.shape[1]

    def answer(self) -> torch.Tensor:
        """Hidden states of all columns, [rows, width, hidden]."""
        return self.hidden[0] if len(self.hidden) == 1 else torch.cat(self.hidden, dim=1)


class Streams:
    """Every stream's cache, in a model of `num_layers` layers; all take their memory from one budget."""

    def __init__(self, num_layers: int, budget: KvBudget) -> None:
        self._num_layers = num_layers
        self._budget = budget
        self._caches: dict[Key, StreamCache] = {}
        #: when each stream was asked for last, the longest ago first
        self._used_at: dict[Key, float] = {}
        self._in_batch: set[Key] = set()
        self.prefixes = Prefixes(budget)
        #: requests of which a part is computed
        self._works: dict[Key, Work] = {}
        #: streams that lost their memory to others
        self.evicted = 0
        budget.make_room = self._evict

    def __len__(self) -> int:
        return len(self._caches)

    def work(self, item: InferItem, begun: set[Key], states_of: Callable[[], torch.Tensor]) -> Work:
        """Take up an item: go on with it, or begin it. `begun` are the streams that this batch holds already.

        states_of: gives the item's states [rows, width, hidden]. Raises what that raises, and HubError: BUSY,
        CACHE_MISS or KV_FULL (the stream is closed then).
        """
        key = (item.session, item.stream)
        if key in begun:
            raise HubError(ErrorCode.BUSY, "another request of this stream is in work")
        work = self._works.get(key)
        if work is None or work.item is not item:
            states = states_of()
            cache = self._prepare(item, begun)
            mask = item.layout.mask()
            mask = None if mask is None else to_device(mask, states.device)
            positions = to_device(item.layout.positions(), states.device)
            work = self._works[key] = Work(item, cache, states, mask, positions)
            self._take_over(work)
        self._used_at.pop(key, None)
        self._used_at[key] = time.monotonic()
        begun.add(key)
        self._in_batch = set(begun)
        return work

    def _take_over(self, work: Work) -> None:
        """Begin behind the first columns that this edge sent before, if they are kept."""
        chain = chain_of(work.item, work.states)
        if not chain:
            return
        work.again = chain[: self.prefixes.note(work.item, chain) // BLOCK]
        found = self.prefixes.find(work.item, chain)
        if found is None:
            return
        kept, columns = found
        try:
            for number, (keys, values) in kept.layers.items():
                work.cache.layers[number].update(keys[:, :, :columns], values[:, :, :columns])
        except HubError:
            self.close(work.item.session, work.item.stream)
            raise
        work.cache.past = columns
        work.add(kept.hidden[:, :columns])

    def done(self, work: Work) -> None:
        """The work is whole: forget it, or keep of it what its edge has sent before."""
        if work.again:
            self.prefixes.keep(work.item, work.again, work.cache, work.answer())
        self._works.pop((work.item.session, work.item.stream), None)

    def _prepare(self, item: InferItem, begun: set[Key]) -> StreamCache:
        """Bring the item's stream to where the item builds on."""
        key = (item.session, item.stream)
        self._in_batch = begun | {key}
        self._works.pop(key, None)
        cache = self._caches[key] if key in self._caches else StreamCache(self._num_layers - 1, self._budget)
        layout = item.layout
        try:
            cache.prepare(layout.past, layout.rows, item.order)
        except HubError as error:
            if error.code is ErrorCode.KV_FULL:
                self.close(*key)
            raise
        cache.expect(layout.past + layout.width)
        self._caches[key] = cache
        return cache

    def close(self, session: int, stream: int) -> None:
        """Free a stream's memory; an unknown one is no error."""
        self._used_at.pop((session, stream), None)
        self._works.pop((session, stream), None)
        cache = self._caches.pop((session, stream), None)
        if cache is not None:
            cache.free()

    def _evict(self, nbytes: int) -> None:
        """Free what is kept of earlier prompts, then streams that are idle, those asked for the longest ago first.

        Their edges hold the record of what they sent, and send it again. Streams that decode just now are left
        alone: they would evict each other at every token.
        """
        while self._budget.used + nbytes > self._budget.most and self.prefixes.drop_oldest():
            pass
        before = time.monotonic() - _IDLE_S
        for key, at in list(self._used_at.items()):
            if self._budget.used + nbytes <= self._budget.most or at > before:
                return
            if key not in self._in_batch and key in self._caches:
                self.close(*key)
                self.evicted += 1

    def close_session(self, session: int) -> None:
        """Free all streams of a session."""
        for key in [key for key in self._caches if key[0] == session]:
            self.close(*key)
        self.prefixes.close_session(session)


def run(blocks: MiddleBlocks, pieces: Sequence[Piece]) -> list[torch.Tensor]:
    """One forward over pieces of any width, each on its stream's cache; their hidden states, in order.

    Raises HubError KV_FULL when the budget runs out part of the way; the caches have to `undo` then.
    """
    hidden = [_run_one(blocks, pieces[0])] if len(pieces) == 1 else _run_batch(blocks, pieces)
    for piece in pieces:
        piece.cache.past = piece.past + piece.width
    return hidden


def _run_one(blocks: MiddleBlocks, piece: Piece) -> torch.Tensor:
    enters, leaves = [piece.place.enter] * piece.rows, [piece.place.leave] * piece.rows
    return blocks.run(piece.states, enters, leaves, piece.mask, piece.positions, piece.cache)


def _run_batch(blocks: MiddleBlocks, pieces: Sequence[Piece]) -> list[torch.Tensor]:
    members: list[Member] = []
    enters: list[int] = []
    leaves: list[int] = []
    for number, piece in enumerate(pieces):
        members.append(Member(number, piece.cache, len(enters), piece.rows, piece.width, piece.mask))
        enters += [piece.place.enter] * (piece.rows * piece.width)
        leaves += [piece.place.leave] * (piece.rows * piece.width)
    batch = BatchCache(members)
    # [positions, 1, hidden]
    states = torch.cat([piece.states.flatten(0, 1) for piece in pieces])[:, None]
    positions = torch.cat([piece.positions.flatten() for piece in pieces])[:, None]
    token = ragged.BATCH.set(batch)
    try:
        hidden = blocks.run(states, enters, leaves, None, positions, batch, batch.see)
    finally:
        ragged.BATCH.reset(token)
    split = hidden.split([member.last - member.first for member in members])
    return [own.view(piece.rows, piece.width, -1) for own, piece in zip(split, pieces, strict=True)]
