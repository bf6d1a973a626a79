"""Blocks B: what a run costs beside its layers, and that rows come out in their order however they leave."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blocks.middle import MiddleBlocks
from blocks.surgery import load
from tests.support.models import CONFIGS, CPU, source_of, whole_model


class Counting(TorchDispatchMode):
    """Counts what is computed, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def blocks() -> MiddleBlocks:
    whole = whole_model(CONFIGS["llama"]())
    middle = MiddleBlocks(whole.config, 1, 6, torch.float32)
    load(middle.cut, source_of(whole), torch.float32, CPU)
    return middle


def states_of(rows: int) -> torch.Tensor:
    return torch.randn(rows, 5, 64, generator=torch.Generator().manual_seed(rows)).requires_grad_()


def test_rows_that_leave_together_cost_no_gradient_of_the_whole_batch_each() -> None:
    middle, rows = blocks(), 6
    positions = torch.arange(5).expand(rows, -1)
    hidden = middle.run(states_of(rows), [1] * rows, [5] * rows, None, positions)
    with Counting() as counting:
        hidden.sum().backward()
    assert counting.calls["select_backward"] == 0
    assert counting.calls["stack"] + counting.calls["unbind"] == 0


def test_each_row_has_the_states_of_its_own_exit_however_the_others_leave() -> None:
    middle, rows = blocks(), 4
    positions, states = torch.arange(5).expand(rows, -1), states_of(rows)
    leaves = [5, 3, 5, 4]
    mixed = middle.run(states, [1, 1, 2, 1], leaves, None, positions)
    for row, enter in enumerate([1, 1, 2, 1]):
        alone = middle.run(states[row : row + 1], [enter], [leaves[row]], None, positions[:1])
        assert torch.allclose(mixed[row], alone[0], atol=1e-6), row
