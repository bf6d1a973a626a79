"""Faster products without gradients: a model's linear layers, float32 on a CPU, most of all for few positions.

Which way MKL multiplies few rows with a weight [out, in] fastest depends on the processor. On one, W x^T takes half as
long as x W^T for two to four rows; on the next it takes twice as long, and less from eight rows on. A single row may be
fastest as two. oneDNN may take half as long as any of these, and less for many rows too, with a copy of the weight in
an order of its own. So all ways are tried when a model is loaded, on its own weights, and each layer takes the fastest
for the positions at hand. A head (many more rows of weight than columns) is fastest by columns for a single position,
on both.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum, auto
from statistics import median

import torch
from torch import nn
from torch.nn.functional import linear


class Way(Enum):
    """How rows x are multiplied with a weight W."""

    #: x W^T
    ROWS_FIRST = auto()
    #: W x^T
    WEIGHT_FIRST = auto()
    #: the same for one row, taken twice
    TWICE_ROWS_FIRST = auto()
    TWICE_WEIGHT_FIRST = auto()
    #: x W^T by oneDNN, with a copy of W
    PACKED = auto()


#: The way for each number of positions, from 0 on; the last is for more, too.
Ways = tuple[Way, ...]
#: Seconds by positions and way.
Seconds = Mapping[int, Mapping[Way, float]]
#: A weight's shape, and whether it lies by rows.
Kind = tuple[tuple[int, ...], bool]

#: Numbers of positions that are tried. Those in between go as the next larger one.
_POSITIONS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_WAYS_FOR_ONE = (Way.ROWS_FIRST, Way.WEIGHT_FIRST, Way.TWICE_ROWS_FIRST, Way.TWICE_WEIGHT_FIRST)
_WAYS = (Way.ROWS_FIRST, Way.WEIGHT_FIRST)
#: For more, MKL's usual way is as good as any of its; a copy may still be worth it.
_MANY = 128
#: Positions that a copy is made for. oneDNN's order for a single one is no gain; that for many is for few, too.
_PACKED_FOR = 32
#: Another way has to take less than so much of the usual one's time.
_WORTH_IT = 0.92
#: A model of fewer bytes lies in the processor's caches and goes the usual way; about `_TRIED_BYTES` are tried.
_SMALL_BYTES, _TRIED_BYTES = 16 << 20, 64 << 20
#: Rounds of trying; a single one if it takes longer than `_LONG_S`.
_ROUNDS, _LONG_S = 3, 1.0


class DecodingLinear(nn.Linear):
    """nn.Linear; without gradients and with few positions its output [..., out] may have other strides."""

    ways: Ways = ()
    #: the weight in oneDNN's order, where a way needs it
    packed: torch.Tensor | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As nn.Linear."""
        positions = input.numel() // self.in_features
        way = Way.ROWS_FIRST
        if self.ways and not torch.is_grad_enabled():
            way = self.ways[min(positions, len(self.ways) - 1)]
        if way is Way.ROWS_FIRST:
            return linear(input, self.weight, self.bias)
        # The product of another layer may lie by columns here, which MKL takes the slow way.
        rows = input.reshape(positions, self.in_features).contiguous()
        out = multiply(way, rows, self.weight, self.packed)
        if self.bias is not None:
            out = out + self.bias
        return out.view(*input.shape[:-1], self.out_features)


def multiply(way: Way, rows: torch.Tensor, weight: torch.Tensor, packed: torch.Tensor | None = None) -> torch.Tensor:
    """rows [positions, in], weight [out, in] -> [positions, out], of any strides."""
    if way is Way.PACKED:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
        return out
    positions = len(rows)
    if way in (Way.TWICE_ROWS_FIRST, Way.TWICE_WEIGHT_FIRST):
        rows = torch.cat((rows, rows))
    weight_first = way in (Way.WEIGHT_FIRST, Way.TWICE_WEIGHT_FIRST)
    product = torch.mm(weight, rows.t()).t() if weight_first else linear(rows, weight)
    return product[:positions]


def can_pack() -> bool:
    """Whether this torch has oneDNN's products. They are what its compiler uses, and no promise of its interface."""
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
    )


@torch.no_grad()
def pack(weight: torch.Tensor) -> torch.Tensor:
    """A copy of weight [out, in] for `Way.PACKED`."""
    copy: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _PACKED_FOR)
    return copy


def speed_up_decoding(layers: Iterable[nn.Module], head: nn.Module | None = None, room: int = 0) -> None:
    """Have float32 linear layers on the CPU compute without gradients the fastest way. Takes about two seconds.

    Their weights stay what they are; the head's get other strides. Call it before adapters are put around them.
    room: bytes that copies of the weights may take; none are made where all together would take more.
    """
    found = [m for layer in layers for m in layer.modules() if type(m) is nn.Linear and _concerned(m)]
    if type(head) is nn.Linear and _concerned(head):
        # Whatever the clock says: strides change the last bits of gradients, too.
        head.weight.data = head.weight.data.t().contiguous().t()
        found.append(head)
    weights = {id(module.weight): module.weight for module in found}
    nbytes = sum(weight.nbytes for weight in weights.values())
    if nbytes < _SMALL_BYTES:
        return
    parts = {key: _part(weight) for key, weight in weights.items()}
    seconds = try_ways(list(parts.values()), packed=nbytes <= room and can_pack())
    ways = {key: fastest(seconds[_kind(part)]) for key, part in parts.items()}
    # Once where layers share a weight.
    copies = {key: pack(weight) for key, weight in weights.items() if Way.PACKED in ways[key]}
    for module in found:
        _take(module, ways[id(module.weight)], copies.get(id(module.weight)))


def _take(module: nn.Linear, ways: Ways, packed: torch.Tensor | None) -> None:
    module.__class__ = DecodingLinear
    assert isinstance(module, DecodingLinear)
    module.ways, module.packed = ways, packed


def fastest(seconds: Seconds) -> Ways:
    """The way for each number of positions."""
    best = {}
    for positions, by_way in seconds.items():
        way = min(by_way, key=lambda each: by_way[each])
        best[positions] = way if by_way[way] < _WORTH_IT * by_way[Way.ROWS_FIRST] else Way.ROWS_FIRST
    tried = sorted(best)
    return (Way.ROWS_FIRST, *(best[next(n for n in tried if n >= count)] for count in range(1, tried[-1] + 1)))


@torch.no_grad()
def try_ways(
    weights: Sequence[torch.Tensor],
    packed: bool = False,
    product: Callable[[Way, torch.Tensor, torch.Tensor, torch.Tensor | None], object] = multiply,
    clock: Callable[[], float] | None = None,
) -> dict[Kind, Seconds]:
    """Seconds of every way, by kind of weight. The weights are gone through in order, as in decoding.

    packed: whether there may be copies of the weights.
    clock: this thread's processor time where it computes alone, because others may want the processor just then.
    """
    clock = clock or (time.thread_time if torch.get_num_threads() == 1 else time.perf_counter)
    taken: dict[Kind, dict[int, dict[Way, list[float]]]] = defaultdict(lambda: defaultdict(dict))
    chosen = [(weight, pack(weight) if packed else None) for weight in _enough(weights)]
    begun = clock()
    for _ in range(_ROUNDS):
        for positions in (*_POSITIONS, _MANY):
            rows = {width: torch.ones(positions, width) for width in {weight.shape[1] for weight, _ in chosen}}
            for way in _ways_for(positions, packed):
                for weight, copy in chosen:
                    started = clock()
                    product(way, rows[weight.shape[1]], weight, copy)
                    taken[_kind(weight)][positions].setdefault(way, []).append(clock() - started)
        if clock() - begun > _LONG_S:
            break
    return {
        kind: {n: {way: median(times) for way, times in ways.items()} for n, ways in by_positions.items()}
        for kind, by_positions in taken.items()
    }


def _ways_for(positions: int, packed: bool) -> tuple[Way, ...]:
    """What is tried."""
    ways = _WAYS if 1 < positions < _MANY else _WAYS_FOR_ONE if positions == 1 else (Way.ROWS_FIRST,)
    return (*ways, Way.PACKED) if packed else ways


def _enough(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The first of them, all kinds among them, and no more than is needed to leave the processor's caches."""
    chosen: list[torch.Tensor] = []
    kinds: set[Kind] = set()
    for weight in weights:
        if _kind(weight) not in kinds or sum(each.nbytes for each in chosen) < _TRIED_BYTES:
            chosen.append(weight)
            kinds.add(_kind(weight))
    return chosen


def _kind(weight: torch.Tensor) -> Kind:
    return tuple(weight.shape), weight.is_contiguous()


def _part(weight: torch.Tensor) -> torch.Tensor:
    """Some rows of a very large weight, for which the same way is the fastest."""
    return weight.detach()[: max(1, _TRIED_BYTES // (weight.nbytes // len(weight)))]


def _concerned(module: nn.Linear) -> bool:
    weight = module.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()
