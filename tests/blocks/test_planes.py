"""Packing weights by byte planes: nothing is lost, weights shrink, and a packed piece cannot be a bomb."""

from __future__ import annotations

import os
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.planes import pack, unpack
from messaging.errors import ProtocolError


def weights(dtype: torch.dtype, count: int = 100_000) -> bytes:
    values = torch.empty(count).normal_(0, 0.02, generator=torch.Generator().manual_seed(1)).to(dtype)
    return bytes(values.view(torch.uint8).numpy())


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([1, 2, 4, 8]), st.integers(0, 7))
def test_what_was_packed_comes_back(data: bytes, element: int, times: int) -> None:
    data *= 2**times
    packed = pack(data, element)
    if packed is not None:
        assert len(packed) < len(data)
        cut = len(packed) // 2
        assert unpack((packed[:cut], memoryview(packed)[cut:]), element, len(data)) == data


@pytest.mark.parametrize(
    ("dtype", "least"), [(torch.bfloat16, 1.4), (torch.float16, 1.15), (torch.float32, 1.15)], ids=str
)
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_weights_shrink_wherever_the_piece_begins(dtype: torch.dtype, least: float, shift: int) -> None:
    data = weights(dtype)[shift:]
    packed = pack(data, dtype.itemsize)
    assert packed is not None
    assert len(data) / len(packed) > least
    assert unpack([packed], dtype.itemsize, len(data)) == data


def test_noise_is_left_as_it_is() -> None:
    assert pack(os.urandom(100_000), 4) is None
    assert pack(b"", 4) is None
    assert pack(b"abc", 4) is None


def test_a_bomb_takes_no_memory() -> None:
    bomb = zlib.compress(bytes(200 << 20), 9)
    tracemalloc.start()
    with pytest.raises(ProtocolError, match="more bytes than"):
        unpack([bomb], 4, 1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_only_the_exact_bytes_are_taken() -> None:
    data = weights(torch.bfloat16)
    packed = pack(data, 2)
    assert packed is not None
    for wrong in (packed[:-1], packed + b"x", b"", b"no deflate", bytes([packed[0] ^ 0xFF]) + packed[1:]):
        with pytest.raises(ProtocolError, match="packed piece"):
            unpack([wrong], 2, len(data))
    for size in (0, len(data) - 1, len(data) + 1):
        with pytest.raises(ProtocolError, match="packed piece"):
            unpack([packed], 2, size)
