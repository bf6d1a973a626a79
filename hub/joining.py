"""Join the batches of several edges into as few forwards as their masks allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from blocks.layout import SEGMENTS, Layout
from hub.jobs import Place


@dataclass
class Part:
    """One edge's batch: states [rows, width, hidden], how they are laid out, and where they enter and leave."""

    states: torch.Tensor
    layout: Layout
    place: Place


@dataclass
class Joined:
    """A batch of whole edges: what `MiddleBlocks.run` takes, and which rows belong to part i of the input."""

    states: torch.Tensor
    enters: list[int]
    leaves: list[int]
    mask: torch.Tensor | None
    positions: torch.Tensor
    #: (index of the part, first row, last row, width)
    slices: list[tuple[int, int, int, int]]


def join(parts: Sequence[Part]) -> list[Joined]:
    """One batch, or two where packed rows meet padded ones (transformers finds packing only without a mask)."""
    packed = [i for i, part in enumerate(parts) if part.layout.rule == SEGMENTS]
    padded = [i for i, part in enumerate(parts) if part.layout.mask() is not None]
    plain = [i for i in range(len(parts)) if i not in packed and i not in padded]
    groups = [sorted(plain + padded), packed] if packed and padded else [list(range(len(parts)))]
    return [_join([(i, parts[i]) for i in group], packed=bool(packed) and group != sorted(plain + padded))
            for group in groups if group]  # fmt: skip


def _join(parts: list[tuple[int, Part]], packed: bool) -> Joined:
    width = max(part.layout.width for _, part in parts)
    enters, leaves, slices, positions, masks, states = [], [], [], [], [], []
    at = 0
    for index, part in parts:
        rows, short = part.layout.rows, width - part.layout.width
        states.append(torch.nn.functional.pad(part.states, (0, 0, 0, short)) if short else part.states)
        own = part.layout.positions()
        # Packed: what fills a row up is one more segment. Padded: masked anyway.
        fill = torch.arange(short).expand(rows, -1)
        positions.append(torch.cat([own, fill], dim=1))
        mask = part.layout.mask()
        mask = torch.ones(rows, part.layout.width, dtype=torch.bool) if mask is None else mask
        masks.append(torch.nn.functional.pad(mask, (0, short), value=False))
        enters += [part.place.enter] * rows
        leaves += [part.place.leave] * rows
        slices.append((index, at, at + rows, part.layout.width))
        at += rows
    mask = None if packed else torch.cat(masks)
    if mask is not None and bool(mask.all()):
        mask = None
    joined = torch.cat(states) if len(states) > 1 else states[0]
    return Joined(joined, enters, leaves, mask, torch.cat(positions), slices)
