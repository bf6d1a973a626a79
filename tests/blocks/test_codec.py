"""Tensors to bytes and back, and what is refused on the way in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.codec import from_wire, to_wire
from messaging.errors import NotFinite, ProtocolError
from messaging.messages import MAX_FRAME_BYTES, Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int32]


@settings(deadline=None)
@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4), st.integers(0, 1 << 30))
def test_round_trip(dtype: torch.dtype, shape: list[int], seed: int) -> None:
    values = torch.randint(0, 200, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    wire = to_wire(values)
    assert sum(len(chunk) for chunk in wire.chunks) == wire.nbytes == values.numel() * dtype.itemsize
    back = from_wire(wire, dtype=dtype, shape=tuple(shape))
    assert back.dtype == dtype
    assert torch.equal(back, values)


def test_bytes_are_little_endian_in_c_order() -> None:
    wire = to_wire(torch.tensor([[1, 2], [3, 256]], dtype=torch.int32).T)
    assert b"".join(wire.chunks) == np.array([1, 3, 2, 256], "<i4").tobytes()


def test_a_large_tensor_goes_in_frames_of_a_mebibyte() -> None:
    values = torch.arange(600_000, dtype=torch.int32)
    wire = to_wire(values)
    assert [len(chunk) for chunk in wire.chunks] == [MAX_FRAME_BYTES, MAX_FRAME_BYTES, 2_400_000 - 2 * MAX_FRAME_BYTES]
    assert torch.equal(from_wire(wire, dtype=torch.int32, shape=(None,)), values)


def test_what_arrives_has_memory_of_its_own() -> None:
    values = torch.zeros(4)
    back = from_wire(to_wire(values), dtype=torch.float32, shape=(4,))
    values += 1
    assert back.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (Tensor("f16", (2,), (bytes(4),)), "expected a tensor of f32"),
        (Tensor("f99", (2,), (bytes(8),)), "expected a tensor of f32"),
        (Tensor("f32", (2, 1), (bytes(8),)), "expected a tensor of shape"),
        (Tensor("f32", (3,), (bytes(12),)), "expected a tensor of shape"),
        (Tensor("f32", (2,), (bytes(7),)), "bytes do not match"),
        (Tensor("f32", (2,), (bytes(8), bytes(1))), "bytes do not match"),
        (Tensor("f32", (2,), ()), "bytes do not match"),
    ],
)
def test_another_tensor_than_expected_is_refused(tensor: Tensor, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        from_wire(tensor, dtype=torch.float32, shape=(2,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [[torch.nan], [torch.inf], [-torch.inf], [torch.inf, -torch.inf]])
def test_values_that_are_not_finite_are_refused(dtype: torch.dtype, bad: list[float]) -> None:
    values = torch.zeros(100, dtype=dtype)
    values[7 : 7 + len(bad)] = torch.tensor(bad, dtype=dtype)
    with pytest.raises(NotFinite):
        from_wire(to_wire(values), dtype=dtype, shape=(None,))


def test_large_but_finite_values_pass() -> None:
    """Their sum is infinite, which alone proves nothing."""
    values = torch.full((100,), 3e38)
    assert torch.equal(from_wire(to_wire(values), dtype=torch.float32, shape=(100,)), values)
