"""`RemoteBlocks`: a module with a decoder layer's signature that stands in for the layers at the hub.

It is the only thing that the edge's model knows of the network. Everything above it (`generate()`, logits
processors, streamers, PEFT, evaluation harnesses) is transformers' own code and does not notice.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from blocks.layout import Layout
from blocks.partition import Partition
from blocks.surgery import CutModel, build_whole, keep_layers
from messaging.errors import ProtocolError


class Middle(Protocol):
    """Blocks B, wherever they run. Tensors are on the CPU or the edge's device, in the model's dtype."""

    def infer(self, smashed: torch.Tensor, layout: Layout, stream: int, order: tuple[int, ...]) -> torch.Tensor:
        """No gradient: smashed [rows, new, hidden] -> hidden. `stream` 0 keeps no cache."""

    def open_stream(self) -> int:
        """A fresh number for a generation's cache."""

    def close_stream(self, stream: int) -> None:
        """Forget it. May be called by the garbage collector: it must neither block nor raise."""


#: Adds noise to smashed [rows, new, hidden]; the mask says which [rows, new] are real positions.
Noise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class StreamLayer(CacheLayerMixin):
    """The middle blocks' place in the edge's cache: no keys, no values, only what must be told to the hub.

    It follows what `generate()` does to a cache (crop, reorder, repeat, select), so that the next request can
    say on how many positions and on which rows it builds.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, middle: Middle) -> None:
        super().__init__()
        self.is_initialized = True
        self.stream = middle.open_stream()
        self._close = weakref.finalize(self, middle.close_stream, self.stream)
        self._close.atexit = False
        self.length = 0
        #: for each row, the row at the hub that it continues; None before the first request
        self.order: list[int] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to make: there are no keys."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Never called: the middle blocks keep their keys at the hub."""
        raise ProtocolError("the middle blocks keep no keys on the edge")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and offset, as a full-attention layer has them."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Positions cached at the hub."""
        return self.length

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1

    def reset(self) -> None:
        """Start over."""
        self.length, self.order = 0, None

    def crop(self, tokens_to_remove: int) -> None:
        """Roll back `abs(tokens_to_remove)` positions."""
        self.length = max(self.length - abs(tokens_to_remove), 0)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i continues row beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows."""
        if self.order is not None:
            self.order = [row for row in self.order for _ in range(repeats)]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order."""
        if self.order is not None:
            keep = torch.arange(len(self.order))[indices.cpu()] if indices.dtype == torch.bool else indices
            self.order = [self.order[int(i)] for i in keep.tolist()]

    def advance(self, rows: int, width: int) -> tuple[int, ...]:
        """Note a request of `rows` x `width` as sent; return its row order, empty when nothing moved."""
        order = self.order
        moved = order is not None and order != list(range(rows))
        if order is not None and len(order) != rows:
            raise ProtocolError(f"this cache holds {len(order)} rows, the call has {rows}")
        self.order = list(range(rows))
        self.length += width
        return tuple(order) if moved and order is not None else ()


@dataclass
class _Call:
    """What the model's caller gave to one forward; a layer sees only what the model made of it."""

    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None


class Reached(Exception):
    """The first half of a training forward is done: smashed with the graph of Blocks A, and its layout."""

    def __init__(self, smashed: torch.Tensor, layout: Layout) -> None:
        super().__init__()
        self.smashed = smashed
        self.layout = layout


class RemoteBlocks(nn.Module):
    """Sends smashed, returns hidden.

    Training runs the model by halves (`blocks.halves`), all else is inference. It is not torch's training mode that
    says so: the model stays in eval(), because nothing drops out in training either.
    """

    def __init__(self, local_index: int, noise: Noise | None = None) -> None:
        super().__init__()
        self._middle: Middle | None = None
        self.noise = noise
        self._stops = False
        self._hidden: torch.Tensor | None = None
        self.local_index = local_index
        self._call = _Call(None, None)
        self._returns_tuple = False

    def attach(self, middle: Middle) -> None:
        """Say where Blocks B are."""
        self._middle = middle

    @property
    def middle(self) -> Middle:
        """Where Blocks B are."""
        if self._middle is None:
            raise ProtocolError("this model is not connected to a hub")
        return self._middle

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the model: remember the 2-D mask and the positions of this call."""
        mask = kwargs.get("attention_mask")
        if isinstance(mask, dict):
            raise ProtocolError("only 2-D attention masks cross the wire; give [batch, length] of 0 and 1")
        self._call = _Call(mask, kwargs.get("position_ids"))

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """In here a forward ends where it comes to the hub's blocks, with `Reached`."""
        self._stops = True
        try:
            yield
        finally:
            self._stops = False

    @contextmanager
    def answering(self, hidden: torch.Tensor) -> Iterator[None]:
        """In here `hidden` is the hub's answer, whatever comes in."""
        self._hidden = hidden
        try:
            yield
        finally:
            self._hidden = None

    def learn_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook of the layer before: return what it returns, a tensor or a tuple."""
        self._returns_tuple = isinstance(output, tuple)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden_states [rows, new, hidden] -> the same after the hub's blocks."""
        if self._hidden is not None:
            return self.as_layers_return(self._hidden)
        rows, width, _ = hidden_states.shape
        cache = _cache(args, kwargs)
        layer = self._stream_layer(cache) if cache is not None else None
        past = layer.length if layer is not None else 0
        layout = Layout.from_call(rows, past, width, self._call.attention_mask, self._call.position_ids)
        smashed = hidden_states
        if self.noise is not None:
            smashed = self.noise(smashed, layout.real())
        if self._stops:
            raise Reached(smashed, layout)
        order = layer.advance(rows, width) if layer is not None else ()
        hidden = self.middle.infer(smashed.detach(), layout, layer.stream if layer is not None else 0, order)
        return self.as_layers_return(hidden)

    def as_layers_return(self, hidden: torch.Tensor) -> Any:
        """A tensor or a tuple, as this architecture's layers return it."""
        return (hidden,) if self._returns_tuple else hidden

    def _stream_layer(self, cache: Cache) -> StreamLayer:
        if len(cache.layers) < self.local_index:
            raise ProtocolError("the cache lacks the layers before the hub's")
        if len(cache.layers) == self.local_index:
            cache.layers.append(StreamLayer(self.middle))
        layer = cache.layers[self.local_index]
        if not isinstance(layer, StreamLayer):
            layer = StreamLayer(self.middle)
            cache.layers[self.local_index] = layer
        return layer


def _cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """The cache among a layer call's arguments, whatever the architecture calls it."""
    for value in (*kwargs.values(), *args):
        if isinstance(value, Cache):
            return value
    return None


def build_edge(config: Any, partition: Partition, dtype: torch.dtype, noise: Noise | None = None) -> CutModel:
    """The edge's model on the meta device: embedding, A, RemoteBlocks, C, norm and head. Fill with `surgery.load`."""
    model, names = build_whole(config, dtype)
    partition.check(names.count)
    remote = RemoteBlocks(partition.p, noise)
    kept = [*range(partition.p), None, *range(partition.leave(names.count), names.count)]
    cut = keep_layers(model, names, kept, remote)
    _base(cut).register_forward_pre_hook(remote.begin, with_kwargs=True)
    cut.layers[partition.p - 1].register_forward_hook(remote.learn_output)
    head = cut.model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_packed)
    return cut


def _packed(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Give the head a single position in memory of its own, as `generate()` asks for.

    A slice of a longer sequence keeps wide strides, for which oneDNN's bfloat16 product copies the head's whole
    weight, at every token.
    """
    states = args[0]
    if states.ndim == 3 and states.shape[1] == 1:
        states = states.clone(memory_format=torch.contiguous_format)
    return (states, *args[1:])


def remote_of(cut: CutModel) -> RemoteBlocks:
    """The stand-in of an edge's model."""
    (remote,) = (layer for layer in cut.layers if isinstance(layer, RemoteBlocks))
    return remote


def _base(cut: CutModel) -> nn.Module:
    """The module whose forward runs the layers; it is called by keyword in every architecture."""
    parent = cut.names.prefix.rpartition(".")[0]
    return cut.model.get_submodule(parent) if parent else cut.model
