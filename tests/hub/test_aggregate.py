"""Aggregation on adapters of four numbers."""

from __future__ import annotations

import torch

from hub.aggregate import Contribution, weighted_mean

PREVIOUS = {"a": torch.tensor([9.0, 9.0, 9.0, 9.0]), "b": torch.tensor([7.0, 7.0, 7.0, 7.0])}


def contribution(tokens: int, **tensors: list[float]) -> Contribution:
    return Contribution({name: torch.tensor(value) for name, value in tensors.items()}, dict.fromkeys(tensors, tokens))


def mean(*parts: Contribution) -> dict[str, list[float]]:
    return {name: value.tolist() for name, value in weighted_mean(PREVIOUS, parts).items()}


def test_contributions_weigh_by_their_tokens() -> None:
    one = contribution(1, a=[0.0, 4.0, 8.0, -4.0])
    three = contribution(3, a=[4.0, 0.0, 8.0, 4.0])
    assert mean(one, three)["a"] == [3.0, 1.0, 8.0, 2.0]
    assert mean(three, one)["a"] == [3.0, 1.0, 8.0, 2.0]


def test_a_tensor_is_the_mean_over_those_who_trained_it() -> None:
    both = contribution(1, a=[2.0, 2.0, 2.0, 2.0], b=[4.0, 4.0, 4.0, 4.0])
    only_b = contribution(1, b=[0.0, 0.0, 0.0, 8.0])
    assert mean(both, only_b) == {"a": [2.0, 2.0, 2.0, 2.0], "b": [2.0, 2.0, 2.0, 6.0]}


def test_one_contribution_may_weigh_differently_in_each_tensor() -> None:
    """The hub's: it served other edges at other layers."""
    hub = Contribution({"a": torch.ones(4), "b": torch.ones(4)}, {"a": 30, "b": 10})
    edge = contribution(10, a=[5.0, 5.0, 5.0, 5.0], b=[5.0, 5.0, 5.0, 5.0])
    assert mean(hub, edge) == {"a": [2.0] * 4, "b": [3.0] * 4}


def test_what_nobody_trained_keeps_its_value() -> None:
    assert mean() == {"a": [9.0] * 4, "b": [7.0] * 4}
    without_tokens = contribution(0, a=[1.0, 1.0, 1.0, 1.0])
    assert mean(without_tokens)["a"] == [9.0] * 4
    assert mean(contribution(1, c=[1.0, 1.0, 1.0, 1.0])).keys() == PREVIOUS.keys()


def test_the_result_is_new_memory() -> None:
    result = weighted_mean(PREVIOUS, [contribution(1, a=[1.0, 1.0, 1.0, 1.0])])
    result["a"].zero_()
    result["b"].zero_()
    assert PREVIOUS["a"].tolist() == [9.0] * 4
    assert PREVIOUS["b"].tolist() == [7.0] * 4
