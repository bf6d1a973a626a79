"""What the hub computed of prompts that an edge sends again: keys, values and hidden states of equal first columns.

A generation that begins with the bytes of an earlier one of the same edge takes them over and computes the rest only.
Never across edges: how long an answer takes would tell one of them what another has sent. A prefix is kept from its
second sight on, so whoever sends noise, which never repeats, pays for a hash and nothing else. The memory is the KV
budget's, and what is kept here goes before any stream's.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import torch

from blocks.raw import raw_bytes
from hub.jobs import InferItem
from hub.kv import KvBudget, StreamCache

#: columns that one hash stands for
BLOCK = 64
#: hashes that are remembered of each edge
_MOST_SEEN = 1024

#: stands for the first 1, 2, ... blocks of a prompt, under its version and place
Chain = tuple[bytes, ...]


@dataclass(frozen=True)
class Kept:
    """Layers by number, each keys and values [1, heads, columns, dim], and hidden states [1, columns, hidden]."""

    layers: dict[int, tuple[torch.Tensor, torch.Tensor]]
    hidden: torch.Tensor
    chain: Chain

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.hidden.nbytes + sum(keys.nbytes + values.nbytes for keys, values in self.layers.values())


class _Owner:
    """What is known of one edge; it is forgotten with the last of its sessions."""

    def __init__(self) -> None:
        self.sessions: set[int] = set()
        self.seen: OrderedDict[bytes, None] = OrderedDict()


class Prefixes:
    """Prefixes by edge, the one used the longest ago first."""

    def __init__(self, budget: KvBudget) -> None:
        self._budget = budget
        self._owners: dict[str, _Owner] = {}
        self._kept: OrderedDict[tuple[str, bytes], Kept] = OrderedDict()
        #: by edge and the hash of its first blocks: where among the kept they are
        self._where: dict[tuple[str, bytes], tuple[str, bytes]] = {}
        #: columns that were taken over instead of computed
        self.reused = 0

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, item: InferItem, chain: Chain) -> tuple[Kept, int] | None:
        """The kept prefix that shares the most columns with a prompt, and how many."""
        for count in range(len(chain), 0, -1):
            at = self._where.get((item.owner, chain[count - 1]))
            if at is not None:
                self._kept.move_to_end(at)
                self.reused += count * BLOCK
                return self._kept[at], count * BLOCK
        return None

    def note(self, item: InferItem, chain: Chain) -> int:
        """Remember a prompt; how many of its first columns this edge has sent before."""
        owner = self._owners.setdefault(item.owner, _Owner())
        owner.sessions.add(item.session)
        again = sum(digest in owner.seen for digest in chain)
        for digest in chain:
            owner.seen[digest] = None
            owner.seen.move_to_end(digest)
        while len(owner.seen) > _MOST_SEEN:
            owner.seen.popitem(last=False)
        return again * BLOCK

    def keep(self, item: InferItem, chain: Chain, cache: StreamCache, hidden: torch.Tensor) -> None:
        """Keep a prompt's first columns, as many as `chain` stands for, if there is room."""
        columns = len(chain) * BLOCK
        at = (item.owner, chain[-1])
        if at in self._where or item.owner not in self._owners:
            return
        layers = {
            number: (layer.keys[:, :, :columns], layer.values[:, :, :columns])
            for number, layer in enumerate(cache.layers)
            if layer.is_initialized
        }
        views = Kept(layers, hidden[:, :columns], chain)
        if self._budget.used + views.nbytes > self._budget.most:
            return
        self._budget.take(views.nbytes)
        for shorter in [(item.owner, digest) for digest in chain if (item.owner, digest) in self._kept]:
            self._drop(shorter)
        copies = {number: (keys.clone(), values.clone()) for number, (keys, values) in layers.items()}
        self._kept[at] = Kept(copies, views.hidden.clone(), chain)
        for digest in chain:
            self._where.setdefault((item.owner, digest), at)

    def drop_oldest(self) -> bool:
        """Give one up; False if there is none."""
        if not self._kept:
            return False
        self._drop(next(iter(self._kept)))
        return True

    def _drop(self, at: tuple[str, bytes]) -> None:
        kept = self._kept.pop(at)
        self._budget.give(kept.nbytes)
        for digest in kept.chain:
            if self._where.get((at[0], digest)) == at:
                del self._where[at[0], digest]

    def close_session(self, session: int) -> None:
        """Forget what only this session's edge could use, if no other session of it is open."""
        for name, owner in list(self._owners.items()):
            owner.sessions.discard(session)
            if not owner.sessions:
                del self._owners[name]
                for at in [at for at in self._kept if at[0] == name]:
                    self._drop(at)


def chain_of(item: InferItem, states: torch.Tensor) -> Chain:
    """The hashes of a prompt's whole blocks; none where nothing can be shared.

    Only a plain row from the first position on has one: no padding, no packing.
    """
    if not (item.owner and item.layout.past == 0 and item.layout.rows == 1 and item.layout.plain):
        return ()
    running = hashlib.sha256(repr((item.version, item.place, str(states.dtype))).encode())
    digests, row = [], states[0].cpu().contiguous()
    for first in range(0, item.layout.width - BLOCK + 1, BLOCK):
        running.update(raw_bytes(row[first : first + BLOCK]))
        digests.append(running.digest())
    return tuple(digests)
