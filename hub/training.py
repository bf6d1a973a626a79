"""What the joined step on B is made of: graphs by micro-batch, and the adapter's gradients kept apart by edge.

A layer's LoRA factors multiply the rows of all edges at once. Only the products that give the factors' own gradients
are taken edge by edge: as much arithmetic as a joint one, and one more copy of the adapter's size per edge. So a step
that an edge does not finish can be left out wholly, and each edge's part can be looked at before the optimizer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

from blocks.adapters import Adapter
from hub.jobs import Place, StepItem

#: Gradients of the summed loss by edge (its session) and by the adapter tensor's name.
Gradients = dict[int, Adapter]


@dataclass(frozen=True)
class Rows:
    """Whose the `count` rows inside a layer are: (edge, first row, last row), and where their gradients go."""

    count: int
    spans: tuple[tuple[int, int, int], ...]
    gradients: Gradients


#: The rows that the adapter's layers see just now; None where nothing is trained.
_ROWS: ContextVar[Rows | None] = ContextVar("rows", default=None)


class _Factor(torch.autograd.Function):
    """x @ weight.T, whose backward adds the weight's gradient up by edge and hands on the input's alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, name: str, rows: Rows) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.name, ctx.rows = name, rows
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        (grad,), rows = grads, ctx.rows
        # Some layers work on [rows * positions, hidden]; a row's positions lie together all the same.
        each = x.numel() // (rows.count * x.shape[-1])
        given, taken = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        for edge, first, last in rows.spans:
            mine = rows.gradients[edge]
            factors = given[first * each : last * each].T, taken[first * each : last * each]
            if ctx.name in mine:
                mine[ctx.name].addmm_(*factors)
            else:
                mine[ctx.name] = torch.mm(*factors)
        return grad @ weight, None, None, None


def keep_apart(layers: Iterable[LoraLayer], adapter: str, names: Mapping[int, str]) -> None:
    """Have both factors of `adapter` in these layers trained by edge; `names` of their weights, by id."""
    for layer in layers:
        for factors in (layer.lora_A, layer.lora_B):
            factor = factors[adapter]
            factor.forward = partial(_multiply, factor, names[id(factor.weight)])


def _multiply(factor: nn.Linear, name: str, x: torch.Tensor) -> torch.Tensor:
    rows = _ROWS.get()
    if rows is None:
        return nn.functional.linear(x, factor.weight)
    out: torch.Tensor = _Factor.apply(x, factor.weight, name, rows)
    return out


@dataclass
class Graph:
    """A micro-batch's joined forward that waits for its gradients: inputs and outputs, edge by edge."""

    items: list[StepItem]
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]


@dataclass
class JoinedStep:
    """The step under way. `recompute`: keep a layer's input only, and run it once more in the backward."""

    recompute: bool
    graphs: dict[int, Graph] = field(default_factory=dict)
    gradients: Gradients = field(default_factory=dict)
    #: where each edge's rows enter and leave, and the target tokens that went backward
    places: dict[int, Place] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)

    def layer_runner(self, edges: Sequence[int]) -> Callable[[Callable[..., Any], list[int]], Callable[..., Any]]:
        """For `MiddleBlocks.run`: how to run a layer, with the rows that are inside; `edges` has each row's edge."""

        def around(forward: Callable[..., Any], inside: list[int]) -> Callable[..., Any]:
            at, spans = 0, []
            for edge, group in groupby(edges[row] for row in inside):
                count = len(list(group))
                spans.append((edge, at, at + count))
                at += count
            run = partial(_run_layer, forward, Rows(at, tuple(spans), self.gradients))
            return partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False) if self.recompute else run

        return around

    def forward_done(self, micro: int, graph: Graph) -> None:
        """Keep a micro-batch's graph until its backward."""
        self.graphs[micro] = graph
        for item in graph.items:
            self.gradients.setdefault(item.session, {})
            self.places[item.session] = item.place

    def backward_done(self, items: Sequence[StepItem]) -> None:
        """Count what went backward."""
        for item in items:
            self.tokens[item.session] = self.tokens.get(item.session, 0) + item.tokens

    def total(self, sessions: Sequence[int]) -> Adapter:
        """The sum of these edges' gradients, in this order. It takes the place of theirs."""
        total: Adapter = {}
        for session in sessions:
            for name, value in self.gradients.pop(session).items():
                total[name] = total[name].add_(value) if name in total else value
        return total

    def passed(self, sessions: Sequence[int], layers: int) -> list[int]:
        """Target tokens of these edges' rows that passed each absolute layer."""
        inside = [(self.places[session], self.tokens.get(session, 0)) for session in sessions]
        return [
            sum(tokens for place, tokens in inside if place.enter <= layer < place.leave) for layer in range(layers)
        ]


def _run_layer(forward: Callable[..., Any], rows: Rows, *args: Any, **kwargs: Any) -> Any:
    token = _ROWS.set(rows)
    try:
        return forward(*args, **kwargs)
    finally:
        _ROWS.reset(token)
