"""int8 with scales: how much is lost, where, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks import quantised
from blocks.codec import from_wire
from blocks.quantised import pack, unpack
from messaging.errors import NotFinite, ProtocolError
from messaging.messages import Tensor, nbytes_of, q8_group

#: Half a step of a scale that is at most 1 + 2^-7 of the largest magnitude / 127.
WORST = (1 + 2**-7) / 127 / 2


def there_and_back(values: torch.Tensor) -> torch.Tensor:
    return unpack(pack(values).view(-1, pack(values).shape[-1]), values.shape[-1], torch.float32).view(values.shape)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 4), st.integers(1, 700), st.integers(-30, 30), st.integers(0, 1 << 30))
def test_a_value_is_off_by_half_a_step_of_its_group_at_most(rows: int, width: int, power: int, seed: int) -> None:
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 10.0**power
    back = there_and_back(values)
    for first in range(0, width, q8_group(width)):
        group, ours = (tensor[:, first : first + q8_group(width)] for tensor in (values, back))
        most = group.abs().amax(-1, keepdim=True)
        # Below the least scale everything is zero.
        assert bool(((group - ours).abs() <= WORST * most * 1.0001 + 1e-37).all())


@pytest.mark.parametrize("width", [1, 64, 128, 300, 512, 2048, 2500, 4096, 16384])
def test_the_bytes_are_those_that_the_shape_says(width: int) -> None:
    packed = pack(torch.randn(3, 2, width))
    assert packed.shape == (3, 2, nbytes_of("q8", (width,)))
    assert packed.numel() == nbytes_of("q8", (3, 2, width))
    assert nbytes_of("q8", (width,)) - width <= 16


@pytest.mark.parametrize(("shape", "nbytes"), [((), 3), ((0,), 0), ((4, 0), 0), ((0, 8), 0), ((2, 3, 8), 60)])
def test_odd_shapes(shape: tuple[int, ...], nbytes: int) -> None:
    assert nbytes_of("q8", shape) == nbytes


def test_an_outlier_coarsens_its_own_group_and_nothing_else() -> None:
    """As in large models, where a few dimensions of a state are a thousand times the others."""
    values = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    outlier = values.clone()
    outlier[0, 700] = 1000.0
    plain, off = there_and_back(values), there_and_back(outlier)
    group = slice(512, 1024)
    assert torch.equal(off[0, :512], plain[0, :512])
    assert torch.equal(off[0, 1024:], plain[0, 1024:])
    assert float((off - outlier)[0, group].abs().max()) > 1.0


def test_a_row_has_the_same_bytes_whatever_stands_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(7, 11, 300)
    whole = pack(values)
    monkeypatch.setattr(quantised, "_BLOCK", 1000)
    assert torch.equal(pack(values), whole)
    for at in (slice(0, 1), slice(3, 4), slice(2, 7)):
        assert torch.equal(pack(values[at]), whole[at])
        assert torch.equal(pack(values[:, at]), whole[:, at])


def test_the_values_that_are_given_stay_as_they_are() -> None:
    values = torch.randn(2, 256)
    before = values.clone()
    pack(values)
    assert torch.equal(values, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zeros_stay_zeros(dtype: torch.dtype) -> None:
    assert not there_and_back(torch.zeros(2, 256, dtype=dtype)).any()
    assert not there_and_back(torch.full((1, 8), 1e-40)).any()
    values = torch.zeros(1, 512, dtype=dtype)
    values[0, 300] = 3.0
    assert there_and_back(values).nonzero().tolist() == [[0, 300]]


def test_the_largest_values_stay_finite() -> None:
    assert bool(torch.isfinite(there_and_back(torch.tensor([[3e38, -3e38, 1.0]]))).all())


# -- what is refused ---------------------------------------------------------------------------------------


def wire(scale: float, values: list[int]) -> Tensor:
    """A row of these int8 values under one scale."""
    scales = torch.tensor([scale]).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    return Tensor("q8", (1, len(values)), (scales + bytes(value % 256 for value in values),))


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_scales_that_are_not_finite(scale: float) -> None:
    with pytest.raises(NotFinite):
        from_wire(wire(scale, [0, 0, 0]), dtype=torch.float32, shape=(1, 3))


@pytest.mark.parametrize("scale", [-1.0, 0.0, -0.0])
def test_scales_that_are_not_above_zero(scale: float) -> None:
    with pytest.raises(ProtocolError, match="above zero"):
        from_wire(wire(scale, [1, 2, 3]), dtype=torch.float32, shape=(1, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scales_that_make_values_overflow(dtype: torch.dtype) -> None:
    scale = torch.finfo(dtype).max / 64
    with pytest.raises(NotFinite):
        from_wire(wire(scale, [0, 127]), dtype=dtype, shape=(1, 2))
    assert bool(torch.isfinite(from_wire(wire(scale, [0, 32]), dtype=dtype, shape=(1, 2))).all())


def test_no_axis() -> None:
    with pytest.raises(ProtocolError, match="at least one axis"):
        from_wire(Tensor("q8", (), (bytes(3),)), dtype=torch.float32, shape=())


@given(st.integers(0, 3), st.integers(0, 140), st.data())
@settings(max_examples=150, deadline=None)
def test_any_bytes_give_finite_values_or_a_named_error(rows: int, width: int, data: st.DataObject) -> None:
    size = nbytes_of("q8", (rows, width))
    raw = data.draw(st.binary(min_size=size, max_size=size))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    try:
        values = from_wire(Tensor("q8", (rows, width), (raw,)), dtype=dtype, shape=(rows, width))
    except (NotFinite, ProtocolError):
        return
    assert (values.dtype, values.shape) == (dtype, (rows, width))
    assert bool(torch.isfinite(values).all())
