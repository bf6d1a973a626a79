"""Linear layers that compute few positions another way give the same, and take the way that was fastest when tried."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from blocks import decoding
from blocks.decoding import DecodingLinear, Way, fastest, multiply, pack, speed_up_decoding, try_ways
from tests.support.models import CONFIGS

SHAPES = [(5,), (1, 5), (1, 1, 5), (2, 1, 5), (1, 3, 5), (2, 2, 5), (4, 2, 5), (0, 5)]


@pytest.fixture
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_SMALL_BYTES", 0)


@pytest.mark.usefixtures("small_ones_too")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("way", Way)
def test_a_model_that_decodes_fast_is_the_same_model(way: Way, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS["llama"]()
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config).eval()
    texts = [torch.arange(10, 10 + length)[None] for length in (1, 2, 4, 9, 40)]
    monkeypatch.setattr(decoding, "try_ways", lambda weights, packed: favour(way, weights))
    with torch.no_grad():
        before, weights = [model(ids).logits for ids in texts], model.state_dict()
        weights = {name: value.clone() for name, value in weights.items()}
        speed_up_decoding(model.model.layers, model.get_output_embeddings(), room=1 << 30)
        after = [model(ids).logits for ids in texts]
    head = model.get_output_embeddings().weight
    assert head.stride() == (1, head.shape[0])
    assert (head is model.get_input_embeddings().weight) is tied
    assert model.get_output_embeddings().ways[1] is model.model.layers[0].mlp.up_proj.ways[1] is way
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(after, before)


def favour(way: Way, weights: Sequence[torch.Tensor]) -> dict[decoding.Kind, decoding.Seconds]:
    """Made-up seconds by which this way is the fastest, of those that are tried for a number of positions."""
    ways = {
        1: tuple(Way),
        **dict.fromkeys((2, 4, 8), (Way.ROWS_FIRST, Way.WEIGHT_FIRST, Way.PACKED)),
        128: (Way.ROWS_FIRST, Way.PACKED),
    }
    seconds = {n: {each: 1.0 if each is way else 2.0 for each in tried} for n, tried in ways.items()}
    return {(tuple(weight.shape), weight.is_contiguous()): seconds for weight in weights}


def layer_with(way: Way, bias: bool = True, width: int = 5, out: int = 7) -> DecodingLinear:
    layer = DecodingLinear(width, out, bias=bias)
    layer.ways = (Way.ROWS_FIRST, *[way] * 8, Way.ROWS_FIRST)
    layer.packed = pack(layer.weight)
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_positions_in_any_shape(shape: tuple[int, ...], bias: bool) -> None:
    """And the ways for a single position, where there is one."""
    for way in (Way.WEIGHT_FIRST, Way.TWICE_ROWS_FIRST, Way.TWICE_WEIGHT_FIRST, Way.PACKED):
        layer = layer_with(way, bias)
        if way in (Way.TWICE_ROWS_FIRST, Way.TWICE_WEIGHT_FIRST):
            layer.ways = (*layer.ways[:2], Way.ROWS_FIRST)
        with torch.inference_mode():
            x = torch.randn(shape)
            torch.testing.assert_close(layer(x), linear(x, layer.weight, layer.bias))
            strided = torch.randn(*reversed(shape)).permute(*range(len(shape) - 1, -1, -1))
            torch.testing.assert_close(layer(strided), linear(strided, layer.weight, layer.bias))


@pytest.mark.parametrize("way", Way)
def test_every_way_is_the_same_product(way: Way) -> None:
    rows, weight = torch.randn(1, 5), torch.randn(7, 5)
    torch.testing.assert_close(multiply(way, rows, weight, pack(weight)), rows @ weight.T)


def test_the_chosen_way_is_for_few_positions_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, next_one, multiplied = layer_with(Way.WEIGHT_FIRST), layer_with(Way.WEIGHT_FIRST, True, 7, 3), []
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: multiplied.append((a, b)) or product(a, b))
    with torch.no_grad():
        for positions in (1, 8, 9):
            next_one(layer(torch.randn(positions, 5)))
    assert [(a.shape, b.shape) for a, b in multiplied] == [
        ((7, 5), (5, 1)), ((3, 7), (7, 1)), ((7, 5), (5, 8)), ((3, 7), (7, 8))
    ]  # fmt: skip
    # The other way round it is slow, also behind a layer whose output has the other strides.
    assert all(a.is_contiguous() and b.t().is_contiguous() for a, b in multiplied)
    x = torch.randn(2, 5, requires_grad=True)
    layer(x).sum().backward()
    assert len(multiplied) == 4
    torch.testing.assert_close(x.grad, layer.weight.detach().sum(0).expand(2, -1))


# -- which way is chosen -----------------------------------------------------------------------------------


def test_the_fastest_way_is_taken_where_it_is_worth_it() -> None:
    rows, weight, twice = Way.ROWS_FIRST, Way.WEIGHT_FIRST, Way.TWICE_ROWS_FIRST
    ways = fastest({
        1: {rows: 1.0, weight: 1.1, twice: 0.5, Way.TWICE_WEIGHT_FIRST: 0.6},
        2: {rows: 1.0, weight: 0.5},
        4: {rows: 1.0, weight: 0.95},
        8: {rows: 1.0, weight: 0.9},
    })  # fmt: skip
    assert ways == (rows, twice, weight, rows, rows, weight, weight, weight, weight)


def test_ways_are_timed_by_kind_of_weight() -> None:
    now, weights = [0.0], [torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(3, 2), torch.zeros(2, 4).t()]

    def take_time(way: Way, rows: torch.Tensor, weight: torch.Tensor, copy: object) -> None:
        assert rows.shape[1] == weight.shape[1]
        assert copy is None
        slow = 3 if (way is Way.WEIGHT_FIRST) == (len(rows) < 8) else 1
        now[0] += slow * len(weight) * 1e-6

    seconds = try_ways(weights, False, take_time, lambda: now[0])
    assert seconds.keys() == {((3, 2), True), ((4, 2), True), ((4, 2), False)}
    for (shape, _), by_positions in seconds.items():
        assert by_positions[1][Way.TWICE_ROWS_FIRST] == pytest.approx(shape[0] * 1e-6)
        assert by_positions.pop(128).keys() == {Way.ROWS_FIRST}
        for positions, by_way in by_positions.items():
            slow, fast = (Way.WEIGHT_FIRST, Way.ROWS_FIRST) if positions < 8 else (Way.ROWS_FIRST, Way.WEIGHT_FIRST)
            assert by_way[slow] == pytest.approx(3 * by_way[fast])


def test_trying_takes_one_round_where_it_takes_long() -> None:
    now = [0.0]

    def take_time(way: Way, rows: torch.Tensor, weight: torch.Tensor, copy: object) -> None:
        now[0] += 1.0

    assert try_ways([torch.zeros(3, 2)], False, take_time, lambda: now[0])
    assert now[0] == 23
    now[0] = 0.0
    assert try_ways([torch.zeros(3, 2)], True, take_time, lambda: now[0])
    assert now[0] == 34


def test_a_part_of_a_large_weight_stands_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_SMALL_BYTES", 0)
    monkeypatch.setattr(decoding, "_TRIED_BYTES", 1 << 10)
    tried: list[torch.Tensor] = []

    def times(weights: list[torch.Tensor], packed: bool) -> dict[decoding.Kind, decoding.Seconds]:
        tried.extend(weights)
        return favour(Way.WEIGHT_FIRST, weights)

    monkeypatch.setattr(decoding, "try_ways", times)
    layer, twin = nn.Linear(16, 100), nn.Linear(16, 100)
    twin.weight = layer.weight
    speed_up_decoding([layer, twin], nn.Linear(16, 200))
    # Shared weights once.
    assert [tuple(weight.shape) for weight in tried] == [(16, 16)] * 2
    assert layer.ways[1] is twin.ways[1] is Way.WEIGHT_FIRST


@pytest.mark.usefixtures("small_ones_too")
def test_copies_are_made_where_there_is_room_once_for_each_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def times(weights: list[torch.Tensor], packed: bool) -> dict[decoding.Kind, decoding.Seconds]:
        asked.append(packed)
        return favour(Way.PACKED if packed else Way.WEIGHT_FIRST, weights)

    monkeypatch.setattr(decoding, "try_ways", times)
    for room in (2 * 16 * 4 * 4 - 1, 2 * 16 * 4 * 4):
        first, second, twin = nn.Linear(4, 16), nn.Linear(4, 16), nn.Linear(4, 16)
        twin.weight = first.weight
        speed_up_decoding([first, second, twin], room=room)
        assert (first.packed is None) is (second.packed is None) is not asked[-1]
        assert first.packed is twin.packed
        assert first.ways[200:] == ()
        assert first.ways[-1] is (Way.PACKED if asked[-1] else Way.ROWS_FIRST)
    assert asked == [False, True]
    assert first.packed is not second.packed
    with torch.inference_mode():
        x = torch.randn(300, 4)
        torch.testing.assert_close(second(x), linear(x, second.weight, second.bias))


def test_a_copy_is_tried_for_any_number_of_positions() -> None:
    seconds = try_ways([torch.randn(6, 5)], True)
    ((_, by_positions),) = seconds.items()
    assert all(Way.PACKED in by_way for by_way in by_positions.values())
    assert by_positions[128].keys() == {Way.ROWS_FIRST, Way.PACKED}


@pytest.mark.usefixtures("small_ones_too")
def test_only_float32_weights_on_the_cpu_are_concerned() -> None:
    half, head = nn.Linear(4, 6, dtype=torch.bfloat16), nn.Linear(4, 6, dtype=torch.bfloat16)
    speed_up_decoding([half], head)
    assert type(half) is type(head) is nn.Linear
    assert head.weight.stride() == (4, 1)
    speed_up_decoding([], None)


def test_small_models_go_the_usual_way() -> None:
    """They lie in the processor's caches, where little is gained; and so their bits depend on no clock."""
    layer, head = nn.Linear(64, 64), nn.Linear(64, 200)
    speed_up_decoding([layer], head)
    assert type(layer) is type(head) is nn.Linear
    assert head.weight.stride() == (1, 200)
