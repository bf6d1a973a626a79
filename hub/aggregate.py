"""Aggregation of adapters: functions on plain tensors, nothing of sessions or sockets.

Names are absolute (layer, module), so contributors with different partitions mix: each gives the layers that
it trained (METHODS: K = those who trained the layer).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Contribution:
    """An adapter, or a part of one, and the target tokens behind each of its tensors."""

    tensors: Mapping[str, torch.Tensor]
    tokens: Mapping[str, int]


def weighted_mean(previous: Mapping[str, torch.Tensor], parts: Sequence[Contribution]) -> dict[str, torch.Tensor]:
    """Token-weighted mean of every tensor over the contributions that trained it (FedAvg, McMahan et al. 2017).

    A tensor that nobody trained keeps its previous value. A and B are averaged each by itself, which is not
    the mean of the products B A; contributions equal in A or in B make it exact.
    """
    out = {}
    for name, before in previous.items():
        given = [(p.tensors[name], p.tokens[name]) for p in parts if name in p.tensors and p.tokens.get(name, 0) > 0]
        total = sum(tokens for _, tokens in given)
        if not given:
            out[name] = before.clone()
            continue
        mean = torch.zeros_like(before)
        for tensor, tokens in given:
            mean += tensor * (tokens / total)
        out[name] = mean
    return out
