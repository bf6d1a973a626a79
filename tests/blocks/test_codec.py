"""Tensors to bytes and back, and what is refused on the way in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.codec import from_wire, to_rows, to_wire, wire_dtype
from messaging.errors import InputError, NotFinite, ProtocolError
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
        (Tensor("u8", (2,), (bytes(2),)), "expected a tensor of f32"),
        (Tensor("i32", (2,), (bytes(8),)), "expected a tensor of f32"),
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


# -- another dtype on the wire than in memory -----------------------------------------------------------


@pytest.mark.parametrize(("wire", "most"), [("f32", 0.0), ("bf16", 2**-8), ("f16", 2**-11), ("q8", 1 / 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_states_cross_in_any_floating_dtype(wire: str, most: float, dtype: torch.dtype) -> None:
    values = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    sent = to_wire(values, wire)
    back = from_wire(sent, dtype=dtype, shape=(3, 5, 64))
    assert (sent.dtype, back.dtype, back.shape) == (wire, dtype, values.shape)
    largest = values.abs().amax(-1, keepdim=True)
    # Rounding to the dtype in memory comes on top.
    assert bool(((back.float() - values.float()).abs() <= (most + torch.finfo(dtype).eps / 2) * largest).all())


def test_integers_are_not_converted() -> None:
    with pytest.raises(ProtocolError, match="expected a tensor of i32"):
        from_wire(to_wire(torch.zeros(3)), dtype=torch.int32, shape=(3,))
    with pytest.raises(ProtocolError, match="expected a tensor of u8"):
        from_wire(to_wire(torch.zeros(3), "q8"), dtype=torch.uint8, shape=(3,))


def test_what_float16_cannot_hold_is_told_before_it_is_sent() -> None:
    values = torch.zeros(2, 8)
    values[1, 3] = -70_000.0
    with pytest.raises(InputError, match=r"as large as 7e\+04: use --wire bf16 or int8"):
        to_wire(values, "f16")
    with pytest.raises(InputError):
        to_rows(values, "f16")
    for wire in ("bf16", "q8"):
        assert from_wire(to_wire(values, wire), dtype=torch.float32, shape=(2, 8))[1, 3] == pytest.approx(-70_000, 0.01)


def test_what_was_not_finite_before_is_the_receivers_to_refuse() -> None:
    for wire in ("f32", "bf16", "f16", "q8"):
        for bad in (torch.nan, torch.inf, -torch.inf):
            sent = to_wire(torch.tensor([[1.0, bad, 2.0]]), wire)
            with pytest.raises(NotFinite):
                from_wire(sent, dtype=torch.float32, shape=(1, 3))


def test_values_that_overflow_the_dtype_in_memory_are_refused() -> None:
    for wire in ("f32", "bf16", "q8"):
        with pytest.raises(NotFinite):
            from_wire(to_wire(torch.full((1, 4), 70_000.0), wire), dtype=torch.float16, shape=(1, 4))


@pytest.mark.parametrize("wire", [None, "f32", "bf16", "f16", "q8"])
def test_rows_that_are_kept_are_sent_again_as_the_same_bytes(wire: str | None) -> None:
    values = torch.randn(2, 6, 300)
    kept = to_rows(values, wire)
    for part, again in ((values, kept.data), (values[:, 2:5], kept.data[:, 2:5]), (values[[1, 0]], kept.data[[1, 0]])):
        sent, resent = to_wire(part, wire), replace(kept, data=again).to_wire()
        assert (resent.dtype, resent.shape) == (sent.dtype, sent.shape)
        assert b"".join(resent.chunks) == b"".join(sent.chunks)


def test_the_names_of_wire_dtypes() -> None:
    names = ("fp32", "bf16", "fp16", "int8", None)
    assert [wire_dtype(name) for name in names] == ["f32", "bf16", "f16", "q8", None]
    with pytest.raises(InputError, match="--wire must be one of fp32, bf16, fp16, int8, not int4"):
        wire_dtype("int4")
