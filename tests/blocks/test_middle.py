"""Rows that enter and leave the layers of B at their own depth."""

from __future__ import annotations

import torch

from blocks.middle import Flow


def layers(flow: Flow, first: int, last: int) -> dict[int, list[int]]:
    """Run layers that add their number; which rows were inside each."""
    seen = {}
    for layer in range(first, last):
        hidden = flow.arrive(layer)
        if hidden is not None:
            seen[layer] = list(flow.rows)
            assert len(hidden) == len(flow.rows)
            flow.depart(layer, hidden + 10**layer)
    return seen


def states(rows: int) -> torch.Tensor:
    return torch.arange(rows, dtype=torch.float32)[:, None, None].expand(rows, 2, 3).contiguous() / 10


def test_rows_that_leave_together_are_not_copied() -> None:
    flow = Flow(states(2), [1, 1], [4, 4])
    assert layers(flow, 1, 6) == {1: [0, 1], 2: [0, 1], 3: [0, 1]}
    assert torch.equal(flow.result(), states(2) + 1110)
    last = Flow(states(1), [0], [1])
    hidden = last.arrive(0)
    assert hidden is not None
    last.depart(0, hidden)
    assert last.result() is hidden


def test_rows_pass_the_layers_between_their_own_doors() -> None:
    told: list[list[int]] = []
    flow = Flow(states(3), [2, 1, 1], [4, 3, 5], on_rows=told.append)
    assert layers(flow, 1, 6) == {1: [1, 2], 2: [0, 1, 2], 3: [0, 2], 4: [2]}
    passed = torch.tensor([1100.0, 110.0, 11110.0])[:, None, None]
    assert torch.equal(flow.result(), states(3) + passed)
    assert told == [[1, 2], [0, 1, 2], [0, 2], [2]]


def test_rows_that_do_not_overlap() -> None:
    flow = Flow(states(2), [1, 3], [2, 4])
    assert layers(flow, 1, 5) == {1: [0], 3: [1]}
    assert torch.equal(flow.result(), states(2) + torch.tensor([10.0, 1000.0])[:, None, None])
