"""Blocks B: the layers that the hub runs, for many edges with different partitions in one batch.

The real transformers model runs with its layer list reduced to B. The received states go in where the
embedding's output would be, so the model's own code builds masks and rotary embeddings; every layer is gated,
so that rows enter and leave the layer loop at their own depth.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig

from blocks.surgery import CutModel, build_whole, keep_layers
from messaging.errors import InputError


@dataclass
class Flow:
    """One run through B: where every row enters and leaves, and the states on their way.

    enters, leaves: absolute layer per row. `rows` are the rows inside the loop now, in order; `hidden` their
    states [len(rows), width, hidden]; `out[i]` the states of row i after it left, unless
    all left together.
    """

    states: torch.Tensor
    enters: Sequence[int]
    leaves: Sequence[int]
    #: the device of each absolute layer; empty where all are on the states' own
    homes: Mapping[int, torch.device] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    hidden: torch.Tensor | None = None
    out: list[torch.Tensor | None] = field(default_factory=list)
    #: told which rows are inside whenever that changes (a cache with rows of its own); None where nobody asks
    on_rows: Callable[[list[int]], None] | None = None
    #: given a layer's forward and the rows inside, what to run in its place; None: the forward itself
    around: Callable[[Callable[..., Any], list[int]], Callable[..., Any]] | None = None

    def __post_init__(self) -> None:
        self.out = [None] * len(self.enters)
        #: where rows enter or have left; everywhere else the batch passes as it is
        self._doors = {*self.enters, *self.leaves}
        #: the states of all rows, where they left together
        self._together: torch.Tensor | None = None
        #: what the model gives every layer (masks, rotary embeddings) on the devices where it has come so far
        self._carried: dict[tuple[int, torch.device], tuple[Any, Any]] = {}

    def arrive(self, layer: int) -> torch.Tensor | None:
        """The states that enter absolute layer `layer`, [rows inside, width, hidden]; None when nobody is inside."""
        home = self.homes.get(layer, self.states.device)
        if self.hidden is not None and self.homes:
            self.hidden = self.hidden.to(home)
        if layer not in self._doors:
            return self.hidden
        new = [row for row, at in enumerate(self.enters) if at == layer]
        if new:
            inside = sorted(self.rows + new)
            arriving = (self.states if len(new) == len(self.states) else self.states[new]).to(home)
            if self.rows:
                assert self.hidden is not None
                joined = torch.cat([self.hidden, arriving])
                place = {row: i for i, row in enumerate(self.rows + new)}
                arriving = joined[[place[row] for row in inside]]
            self.rows, self.hidden = inside, arriving
        if self.on_rows is not None and self.rows:
            self.on_rows(self.rows)
        return self.hidden if self.rows else None

    def depart(self, layer: int, hidden: torch.Tensor) -> None:
        """Note the states after absolute layer `layer`; rows whose last layer it is leave."""
        if layer + 1 not in self._doors:
            self.hidden = hidden
            return
        gone = [row for row in self.rows if self.leaves[row] == layer + 1]
        if gone and len(gone) < len(self.rows):
            stay = [i for i, row in enumerate(self.rows) if row not in gone]
            for i, row in enumerate(self.rows):
                if row in gone:
                    self.out[row] = hidden[i]
            self.rows, self.hidden = [self.rows[i] for i in stay], hidden[stay]
        elif gone:
            if len(gone) == len(self.enters):
                # Not row by row: the backward of that makes a gradient of the whole batch for each of its rows.
                self._together = hidden
            else:
                for i, row in enumerate(self.rows):
                    self.out[row] = hidden[i]
            self.rows, self.hidden = [], None
        else:
            self.hidden = hidden

    def carry(self, value: Any, layer: int) -> Any:
        """`value`, where its tensors are on the layer's device."""
        home = self.homes.get(layer)
        if isinstance(value, (tuple, list)):
            return type(value)(self.carry(item, layer) for item in value)
        if home is None or not hasattr(value, "to"):
            return value
        key = (id(value), home)
        if key not in self._carried:
            # The value is kept too, or its id might come to be another's.
            self._carried[key] = (value, value.to(home))
        return self._carried[key][1]

    def result(self) -> torch.Tensor:
        """The states of all rows after their last layers, [rows, width, hidden], on the device they came from."""
        device = self.states.device
        if self._together is not None:
            return self._together.to(device)
        out = [row.to(device) for row in self.out if row is not None]
        assert len(out) == len(self.enters), "a row never left Blocks B"
        return torch.stack(out)


#: The run that this thread is in; gates, masks and caches read it.
CURRENT: ContextVar[Flow | None] = ContextVar("flow", default=None)


class _Stub(nn.Module):
    """In the place of a module that the hub does not load: embeddings give 0, all others pass their input on."""

    def __init__(self, embedding: bool) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, first: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros((), device=first.device) if self.embedding else first


def _gate(layer: nn.Module, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A layer's forward for the rows that are inside at its depth."""
    flow = CURRENT.get()
    assert flow is not None, "Blocks B run through MiddleBlocks.run only"
    hidden = flow.arrive(number)
    if hidden is None:
        return _like(layer, flow.states)
    # What the model passes on in the place of the states does not matter: the flow has them.
    named = kwargs.pop("hidden_states", None) is not None
    args = args if named else args[1:]
    if flow.homes:
        args = tuple(flow.carry(value, number) for value in args)
        kwargs = {key: flow.carry(value, number) for key, value in kwargs.items()}
    batch = len(flow.enters)
    if len(flow.rows) < batch:
        rows = torch.tensor(flow.rows, device=hidden.device)
        args = tuple(_select(value, rows, batch) for value in args)
        kwargs = {key: _select(value, rows, batch) for key, value in kwargs.items()}
    if flow.around is not None:
        forward = flow.around(forward, flow.rows)
    output = forward(*args, hidden_states=hidden, **kwargs) if named else forward(hidden, *args, **kwargs)
    if getattr(layer, "_returns_tuple", None) is not isinstance(output, tuple):
        layer._returns_tuple = isinstance(output, tuple)  # type: ignore[assignment]
    flow.depart(number, output[0] if isinstance(output, tuple) else output)
    # What the model passes on does not matter (the next gate asks the flow), but its shape may.
    return _like(layer, flow.states)


def _like(layer: nn.Module, states: torch.Tensor) -> Any:
    return (states,) if getattr(layer, "_returns_tuple", False) else states


def _select(value: Any, rows: torch.Tensor, batch: int) -> Any:
    """Keep `rows` of whatever has one entry (or several, as ALiBi has one per head) per row of the batch."""
    if isinstance(value, (tuple, list)):
        return type(value)(_select(item, rows, batch) for item in value)
    if not isinstance(value, torch.Tensor) or value.ndim < 2 or value.shape[0] % batch or value.shape[0] < batch:
        return value
    per_row = value.shape[0] // batch
    return value.view(batch, per_row, *value.shape[1:])[rows].flatten(0, 1)


class MiddleBlocks:
    """Layers `first` .. `last` (absolute, last excluded) of a model, ready to run batches of mixed partitions."""

    def __init__(self, config: PreTrainedConfig, first: int, last: int, dtype: torch.dtype) -> None:
        model, names = build_whole(config, dtype)
        if not 0 < first < last <= names.count:
            raise InputError(f"the hub cannot run layers {first} to {last - 1} of {names.count}")
        self.cut: CutModel = keep_layers(model, names, range(first, last))
        # Nothing drops out, in training neither: the edge's blocks stay in eval() too.
        model.eval()
        self.first, self.last = first, last
        self._homes: dict[int, torch.device] = {}
        self._strip()
        for local, layer in enumerate(self.cut.layers):
            layer.forward = partial(_gate, layer, first + local, layer.forward)
        self._parameters = set(inspect.signature(type(self._runner).forward).parameters)

    def stand_on(self, homes: Sequence[torch.device]) -> None:
        """Say on which device each layer was loaded, where they are not all on the states' own."""
        self._homes = dict(enumerate(homes, self.first))

    def layers_by_device(self) -> dict[torch.device, list[int]]:
        """The absolute layers on each device, as `stand_on` was told."""
        found: dict[torch.device, list[int]] = {}
        for layer, device in self._homes.items():
            found.setdefault(device, []).append(layer)
        return found

    @property
    def _runner(self) -> nn.Module:
        """The module whose forward runs the layers."""
        parent = self.cut.names.prefix.rpartition(".")[0]
        return self.cut.model.get_submodule(parent) if parent else self.cut.model

    def _strip(self) -> None:
        """Put stubs in the place of embeddings, final norm and head: they are never loaded here."""
        model, prefix = self.cut.model, self.cut.names.prefix
        for path, module in list(model.named_modules()):
            own = next(module.parameters(recurse=False), None)
            if own is None or path == prefix or path.startswith(prefix + "."):
                continue
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, _Stub(isinstance(module, nn.Embedding)))
        # Weights that were tied to what is gone are nobody's any more.
        model.all_tied_weights_keys = {}

    def run(
        self,
        states: torch.Tensor,
        enters: Sequence[int],
        leaves: Sequence[int],
        mask: torch.Tensor | None,
        positions: torch.Tensor,
        cache: Cache | None = None,
        on_rows: Callable[[list[int]], None] | None = None,
        around: Callable[[Callable[..., Any], list[int]], Callable[..., Any]] | None = None,
    ) -> torch.Tensor:
        """Run every row from its entry to its exit; see Flow for `on_rows` and `around`.

        states [rows, width, hidden]; enters, leaves: absolute layers per row; mask: bool [rows, past + width]
        or None; positions: int64 [rows, width]. Returns [rows, width, hidden].
        """
        flow = Flow(states, enters, leaves, self._homes, on_rows=on_rows, around=around)
        arguments = {
            "inputs_embeds": states,
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": cache is not None,
        }
        token = CURRENT.set(flow)
        try:
            self._runner(**{key: value for key, value in arguments.items() if key in self._parameters})
        finally:
            CURRENT.reset(token)
        return flow.result()
