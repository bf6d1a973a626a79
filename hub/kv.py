"""The keys and values that generations leave at the hub: one cache a stream, all under one budget in bytes.

A stream's cache is a buffer per layer that grows in place (no `torch.cat` per token) and can be cropped at
any position, sliding windows included, because it keeps what is behind the window. `BatchCache` shows the
caches of several streams to one forward; `ragged.py` holds the attention that reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from messaging.errors import ErrorCode, HubError

_GROW = 16


class KvBudget:
    """How many bytes all streams may hold together."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.used = 0
        #: called when the budget is full, to give back what somebody can do without until so many bytes are free
        self.make_room: Callable[[int], None] = lambda nbytes: None

    def take(self, nbytes: int) -> None:
        """Raises HubError KV_FULL when the budget does not hold `nbytes` more, idle streams evicted."""
        if self.used + nbytes > self.most:
            self.make_room(nbytes)
        if self.used + nbytes > self.most:
            raise HubError(
                ErrorCode.KV_FULL,
                f"the hub's KV memory is full ({self.used >> 20} of {self.most >> 20} MiB in use): "
                "try again when other generations have ended, or use a shorter prompt",
            )
        self.used += nbytes

    def give(self, nbytes: int) -> None:
        """Return bytes that were taken."""
        self.used -= nbytes


class StreamLayer(CacheLayerMixin):
    """Keys and values of one layer of one stream, [rows, heads, capacity, dim], filled up to `length`."""

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, budget: KvBudget) -> None:
        super().__init__()
        self._budget = budget
        self.length = 0
        self.nbytes = 0
        #: positions that the request under way comes to: room is made for all of them at once
        self.expected = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """See transformers; the buffers are made by the first update."""
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append [rows, heads, new, dim]; returns views of all keys and values so far."""
        keys, values = self.extend(key_states, value_states)
        keys.copy_(key_states)
        values.copy_(value_states)
        return self.filled()

    def extend(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The places that these are to be copied to, which count as filled from now on."""
        start, new = self.length, key_states.shape[2]
        if not self.is_initialized or start + new > self.keys.shape[2]:
            self._grow(key_states, value_states, start + new)
        self.length = start + new
        return self.keys.narrow(2, start, new), self.values.narrow(2, start, new)

    def filled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of all keys and values."""
        return self.keys.narrow(2, 0, self.length), self.values.narrow(2, 0, self.length)

    def _grow(self, keys: torch.Tensor, values: torch.Tensor, need: int) -> None:
        capacity = _capacity(max(need, self.expected))
        rows, heads, _, key_dim = keys.shape
        value_dim = values.shape[-1]
        nbytes = rows * heads * capacity * (key_dim + value_dim) * keys.element_size()
        self._budget.take(nbytes - self.nbytes)
        self.nbytes = nbytes
        grown_keys = keys.new_empty(rows, heads, capacity, key_dim)
        grown_values = values.new_empty(rows, heads, capacity, value_dim)
        if self.is_initialized and self.length:
            grown_keys[:, :, : self.length] = self.keys[:, :, : self.length]
            grown_values[:, :, : self.length] = self.values[:, :, : self.length]
        self.keys, self.values = grown_keys, grown_values
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and offset for the mask."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Cached positions."""
        return self.length

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1

    def crop_to(self, length: int) -> None:
        """Forget all positions from `length` on."""
        self.length = min(self.length, length)

    def shrink(self) -> None:
        """Give back the room that `length` positions do not need."""
        if self.length == 0:
            self.free()
            return
        before, after = self.keys.shape[-2], _capacity(self.length)
        if after < before:
            self.keys, self.values = self.keys[:, :, :after].clone(), self.values[:, :, :after].clone()
            given = self.nbytes // before * (before - after)
            self._budget.give(given)
            self.nbytes -= given

    def reorder(self, order: Sequence[int]) -> None:
        """Row i continues row order[i]; the number of rows may change."""
        if not self.is_initialized:
            return
        before = self.keys.shape[0]
        grown = self.nbytes // before * len(order) - self.nbytes
        self._budget.take(grown)
        self.nbytes += grown
        index = torch.tensor(order, device=self.keys.device)
        self.keys, self.values = self.keys[index], self.values[index]

    def free(self) -> None:
        """Return the memory to the budget."""
        self._budget.give(self.nbytes)
        self.keys = self.values = torch.empty(0)
        self.nbytes, self.length, self.is_initialized = 0, 0, False


def _capacity(positions: int) -> int:
    """Positions to make room for, so that a growing stream is seldom copied."""
    return -(-(positions + positions // 16) // _GROW) * _GROW


class StreamCache(Cache):
    """All layers of one stream. Only the layers between its edge's entry and exit ever fill."""

    def __init__(self, layers: int, budget: KvBudget) -> None:
        super().__init__(layers=[StreamLayer(budget) for _ in range(layers)])
        self.past = 0
        self.rows = 0

    def prepare(self, past: int, rows: int, order: Sequence[int]) -> None:
        """Crop to `past` and put the rows in order.

        Raises HubError CACHE_MISS, whose detail says how many positions can be built on, when that is not what
        this cache can continue. New row orders can be taken only once: where the cache is longer than `past`,
        the request may be a repetition whose order is in force already, so all has to be sent again. HubError
        KV_FULL when the new order needs more memory than there is; the cache must be freed then.
        """
        fits = set(order) <= set(range(self.rows)) and len(order) == rows if order else rows == self.rows
        if past and (not fits or (order and past < self.past)):
            raise HubError(ErrorCode.CACHE_MISS, "the hub holds other rows of this stream")
        if past > self.past:
            raise HubError(ErrorCode.CACHE_MISS, "the hub no longer holds this stream", self.past)
        for layer in self.layers:
            layer.crop_to(past)
            if order and past:
                layer.reorder(order)
        if past == 0 and rows != self.rows:
            self.free()
        self.past, self.rows = past, rows

    def expect(self, length: int) -> None:
        """The request under way comes to `length` positions."""
        for layer in self.layers:
            layer.expected = length

    def undo(self) -> None:
        """Back to what `prepare` left, after a forward that ended part of the way."""
        for layer in self.layers:
            layer.crop_to(self.past)
            layer.shrink()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions that this stream holds."""
        return self.past

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Key length and offset, the same in every layer."""
        return self.past + query_length, 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(layer.nbytes for layer in self.layers)

    def free(self) -> None:
        """Give all memory back."""
        for layer in self.layers:
            layer.free()
        self.past = 0


@dataclass(frozen=True)
class RaggedStates:
    """Keys or values (or masks) of several streams side by side: one entry a stream, of any length."""

    items: tuple[Any, ...]

    def to(self, device: torch.device) -> RaggedStates:
        """The same on a device."""
        return RaggedStates(tuple(None if item is None else item.to(device) for item in self.items))


@dataclass(frozen=True, eq=False)
class Member:
    """A stream in a batch: its cache, its `rows` x `width` new positions, its bool mask [rows, past + width] or None.

    In the batch each new position is a row of its own; this stream's are `first` .. `last`, row by row. `number` is
    its place among the streams.
    """

    number: int
    cache: StreamCache
    first: int
    rows: int
    width: int
    mask: torch.Tensor | None

    @property
    def last(self) -> int:
        """The batch row behind its last one."""
        return self.first + self.rows * self.width

    def unfold(self, states: torch.Tensor) -> torch.Tensor:
        """[rows * width, heads, 1, dim] of the batch -> [rows, heads, width, dim]."""
        if self.width == 1:
            return states
        _, heads, _, dim = states.shape
        return states.reshape(self.rows, self.width, heads, dim).transpose(1, 2)


class BatchCache(Cache):
    """The caches of several streams, shown to one forward as one. Every new position is a row of the batch."""

    def __init__(self, members: Sequence[Member]) -> None:
        super().__init__(layers=[])
        self.members = tuple(members)
        self.inside = self.members
        #: rows of the batch that each stream inside has
        self.sizes = [member.last - member.first for member in self.members]
        #: no stream has more than one new position in a row
        self.single = all(member.width == 1 for member in self.members)

    @property
    def is_sliding(self) -> list[bool]:
        """No layer drops what is behind its window."""
        return [False] * len(self.members[0].cache.layers)

    def see(self, rows: list[int]) -> None:
        """Told by the layer loop which rows are inside now."""
        if len(rows) == self.members[-1].last and len(self.inside) == len(self.members):
            return
        inside = set(rows)
        self.inside = tuple(member for member in self.members if member.first in inside)
        self.sizes = [member.last - member.first for member in self.inside]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Append each stream's rows to its own cache; returns keys and values stream by stream."""
        layers = [member.cache.layers[layer_idx] for member in self.inside]
        keys, values = key_states.split(self.sizes), value_states.split(self.sizes)
        if not self.single:
            keys = [member.unfold(key) for member, key in zip(self.inside, keys, strict=True)]
            values = [member.unfold(value) for member, value in zip(self.inside, values, strict=True)]
        places = [layer.extend(key, value) for layer, key, value in zip(layers, keys, values, strict=True)]
        # One call: with a call for each stream the calls cost more than the copies.
        torch._foreach_copy_([place for pair in places for place in pair], _alternate(keys, values))
        filled = [layer.filled() for layer in layers]
        return RaggedStates(tuple(k for k, _ in filled)), RaggedStates(tuple(v for _, v in filled))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The longest stream's."""
        return max(member.cache.past for member in self.members)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The longest stream's; `ragged.py` makes a mask for each."""
        return self.get_seq_length() + query_length, 0


def _alternate(keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [states for pair in zip(keys, values, strict=True) for states in pair]
