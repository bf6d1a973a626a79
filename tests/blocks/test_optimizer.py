"""The optimizer of adapters: what a gradient is divided by, clipping, warm-up, going on from a saved state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from blocks.optimizer import AdapterOptimizer, Schedule

PLAIN = Schedule(lr=0.1, warmup_steps=0, clip_norm=math.inf, weight_decay=0.0)


def parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.tensor([1.0, -2.0, 3.0, 0.5])) for name in ("a", "b")}


def give(params: dict[str, nn.Parameter], **grads: list[float]) -> None:
    for name, value in grads.items():
        params[name].grad = torch.tensor(value)


def test_gradients_are_divided_by_the_tokens_behind_them() -> None:
    together, apart = parameters(), parameters()
    give(together, a=[8.0, 0.0, 4.0, 2.0], b=[3.0, 3.0, 3.0, 6.0])
    give(apart, a=[2.0, 0.0, 1.0, 0.5], b=[1.0, 1.0, 1.0, 2.0])
    norm = AdapterOptimizer(together, PLAIN).step({"a": 4, "b": 3})
    assert norm == pytest.approx(AdapterOptimizer(apart, PLAIN).step(1))
    assert norm == pytest.approx(math.sqrt(5.25 + 7))
    assert all(torch.equal(together[name], apart[name]) for name in together)
    assert together["a"].grad is None


def test_what_no_token_passed_is_left_alone() -> None:
    """No weight decay, no moments, and no part in the norm: zeros are not a gradient."""
    params = parameters()
    optimizer = AdapterOptimizer(params, Schedule(0.1, 0, math.inf, 0.5))
    give(params, a=[1.0, 1.0, 1.0, 1.0], b=[0.0, 0.0, 0.0, 0.0])
    assert optimizer.step({"a": 1}) == pytest.approx(2.0)
    assert params["b"].tolist() == [1.0, -2.0, 3.0, 0.5]
    assert not any(key.startswith("b|") for key in optimizer.state())
    assert optimizer.steps == 1


def test_a_step_without_tokens_is_none() -> None:
    params = parameters()
    optimizer = AdapterOptimizer(params, PLAIN)
    give(params, a=[1.0, 1.0, 1.0, 1.0])
    assert optimizer.step(0) == 0.0
    assert (optimizer.steps, params["a"].grad) == (0, None)
    assert params["a"].tolist() == [1.0, -2.0, 3.0, 0.5]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    params = parameters()
    optimizer = AdapterOptimizer(params, PLAIN)
    give(params, a=[1.0, bad, 1.0, 1.0], b=[1.0, 1.0, 1.0, 1.0])
    assert not math.isfinite(optimizer.step(1))
    assert (optimizer.steps, params["a"].grad) == (0, None)
    assert params["b"].tolist() == [1.0, -2.0, 3.0, 0.5]


def test_the_norm_of_all_is_clipped() -> None:
    params, reference = parameters(), parameters()
    optimizer = AdapterOptimizer(params, Schedule(0.1, 0, 1.0, 0.0))
    give(params, a=[30.0, 0.0, 0.0, 0.0], b=[0.0, 40.0, 0.0, 0.0])
    give(reference, a=[0.6, 0.0, 0.0, 0.0], b=[0.0, 0.8, 0.0, 0.0])
    assert optimizer.step(1) == pytest.approx(50.0)
    AdapterOptimizer(reference, PLAIN).step(1)
    for name in params:
        assert torch.allclose(params[name], reference[name], atol=1e-6)


def test_the_learning_rate_warms_up_linearly() -> None:
    """At equal gradients Adam moves by the learning rate, so that the steps show it."""
    params = {"a": nn.Parameter(torch.zeros(1))}
    optimizer = AdapterOptimizer(params, Schedule(0.1, 4, math.inf, 0.0))
    moves = []
    for _ in range(6):
        before = float(params["a"].detach())
        give(params, a=[-1.0])
        optimizer.step(1)
        moves.append(float(params["a"].detach()) - before)
    assert moves == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1], rel=1e-3)


def test_a_loaded_state_goes_on_as_if_nothing_had_happened() -> None:
    through, stopped = parameters(), parameters()
    optimizer, first = AdapterOptimizer(through, PLAIN), AdapterOptimizer(stopped, PLAIN)
    grads = [[1.0, -1.0, 0.5, 2.0], [0.1, 3.0, -0.5, 1.0], [-1.0, 0.0, 2.0, 0.3]]
    for step, grad in enumerate(grads):
        give(through, a=grad)
        optimizer.step(2)
        if step == 1:
            saved = first.state()
            first = AdapterOptimizer(stopped, PLAIN)
            first.load(saved)
        give(stopped, a=grad)
        first.step(2)
    assert torch.equal(through["a"], stopped["a"])
    assert first.steps == 3
    assert all(torch.equal(value, first.state()[key]) for key, value in optimizer.state().items())
