"""The streams of all generations: their caches by session and number, and one forward over several of them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from blocks.middle import MiddleBlocks
from hub import ragged
from hub.jobs import InferItem
from hub.joining import Part
from hub.kv import BatchCache, KvBudget, Member, StreamCache
from messaging.errors import ErrorCode, HubError

Key = tuple[int, int]
#: A stream that nobody asked for in so many seconds is idle.
_IDLE_S = 2.0


class Streams:
    """Every stream's cache, in a model of `num_layers` layers; all take their memory from one budget."""

    def __init__(self, num_layers: int, budget: KvBudget) -> None:
        self._num_layers = num_layers
        self._budget = budget
        self._caches: dict[Key, StreamCache] = {}
        #: when each stream was asked for last, the longest ago first
        self._used_at: dict[Key, float] = {}
        self._in_batch: set[Key] = set()
        #: streams that lost their memory to others
        self.evicted = 0
        budget.make_room = self._evict

    def __len__(self) -> int:
        return len(self._caches)

    def of(self, item: InferItem) -> StreamCache:
        """The cache of an item that was prepared."""
        return self._caches[item.session, item.stream]

    def prepare(self, item: InferItem, begun: set[Key]) -> None:
        """Bring the item's stream to where the item builds on; `begun` are those that this batch holds already.

        Raises HubError: BUSY, CACHE_MISS or KV_FULL (the stream is closed then).
        """
        key = (item.session, item.stream)
        if key in begun:
            raise HubError(ErrorCode.BUSY, "another request of this stream is in work")
        self._in_batch = begun | {key}
        self._used_at.pop(key, None)
        self._used_at[key] = time.monotonic()
        cache = self._caches[key] if key in self._caches else StreamCache(self._num_layers - 1, self._budget)
        try:
            cache.prepare(item.layout.past, item.layout.rows, item.order)
        except HubError as error:
            if error.code is ErrorCode.KV_FULL:
                self.close(*key)
            raise
        self._caches[key] = cache
        begun.add(key)

    def close(self, session: int, stream: int) -> None:
        """Free a stream's memory; an unknown one is no error."""
        self._used_at.pop((session, stream), None)
        cache = self._caches.pop((session, stream), None)
        if cache is not None:
            cache.free()

    def _evict(self, nbytes: int) -> None:
        """Free the memory of streams that are idle, those asked for the longest ago first.

        Their edges hold the record of what they sent, and send it again. Streams that decode just now are left
        alone: they would evict each other at every token.
        """
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


def run(
    blocks: MiddleBlocks, parts: Sequence[Part], caches: Sequence[StreamCache], device: torch.device
) -> list[torch.Tensor]:
    """One forward over parts of equal width, each on its stream's cache; their hidden states, in order.

    Raises HubError KV_FULL when the budget runs out part of the way; the caches have to `undo` then.
    """
    masks = [None if mask is None else mask.to(device) for mask in (part.layout.mask() for part in parts)]
    enters = [part.place.enter for part in parts for _ in range(part.layout.rows)]
    leaves = [part.place.leave for part in parts for _ in range(part.layout.rows)]
    positions = torch.cat([part.layout.positions() for part in parts]).to(device)
    if len(parts) == 1:
        split = [blocks.run(parts[0].states, enters, leaves, masks[0], positions, caches[0])]
    else:
        members, at = [], 0
        for part, cache, mask in zip(parts, caches, masks, strict=True):
            members.append(Member(cache, at, at + part.layout.rows, mask))
            at += part.layout.rows
        batch = BatchCache(members)
        token = ragged.BATCH.set(batch)
        try:
            states = torch.cat([part.states for part in parts])
            hidden = blocks.run(states, enters, leaves, None, positions, batch, batch.see)
        finally:
            ragged.BATCH.reset(token)
        split = [hidden[member.first : member.last] for member in members]
    for part, cache in zip(parts, caches, strict=True):
        cache.past = part.layout.past + part.layout.width
    return split
