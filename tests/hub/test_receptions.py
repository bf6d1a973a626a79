"""Uploads of adapters at the hub: in order, from where they ended, bounded, forgotten when the round is over."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from hub.receptions import Receptions
from messaging.errors import ProtocolError
from messaging.messages import Tensor, Upload

DATA = bytes(range(250)) * 4
MOST = 2000


def piece(begin: int, end: int, data: bytes = DATA, round_: int = 0) -> Upload:
    part = data[begin:end]
    return Upload(round_, 7, begin, len(data), hashlib.sha256(data).hexdigest(), Tensor("u8", (len(part),), (part,)))


@pytest.fixture
def receptions() -> Receptions:
    return Receptions(MOST)


def test_an_upload_goes_on_where_it_ended(receptions: Receptions) -> None:
    assert receptions.take("ann", piece(0, 0)) == (0, None)
    assert receptions.take("ann", piece(0, 300)) == (300, None)
    assert receptions.take("ann", piece(0, 0)) == (300, None)
    assert receptions.take("ann", piece(300, 1000)) == (1000, DATA)
    # Asked again, as by an edge that was killed before it heard: it is still here.
    assert receptions.take("ann", piece(0, 0)) == (1000, DATA)


def test_pieces_out_of_order_are_left_out(receptions: Receptions) -> None:
    assert receptions.take("ann", piece(300, 600)) == (0, None)
    receptions.take("ann", piece(0, 300))
    assert receptions.take("ann", piece(0, 300)) == (300, None)
    assert receptions.take("ann", piece(200, 600)) == (300, None)
    assert receptions.take("ann", piece(600, 1000)) == (300, None)
    assert receptions.take("ann", piece(300, 1000)) == (1000, DATA)


def test_edges_do_not_see_each_other(receptions: Receptions) -> None:
    receptions.take("ann", piece(0, 300))
    assert receptions.take("bob", piece(0, 0)) == (0, None)
    assert receptions.take("ann", piece(0, 0)) == (300, None)


@pytest.mark.parametrize("other", [{"round_": 1}, {"data": DATA[::-1]}, {"data": DATA[:900]}])
def test_another_file_begins_anew_and_takes_the_place(receptions: Receptions, other: dict[str, object]) -> None:
    receptions.take("ann", piece(0, 300))
    assert receptions.take("ann", piece(0, 0, **other)) == (0, None)  # type: ignore[arg-type]
    assert receptions.take("ann", piece(0, 0)) == (0, None)


def test_a_file_of_a_round_that_is_over_is_forgotten_and_not_wanted(receptions: Receptions) -> None:
    receptions.take("ann", piece(0, 300))
    receptions.take("bob", piece(0, 300, round_=5))
    receptions.round_over(1)
    assert receptions.take("bob", piece(0, 0, round_=5)) == (0, None)
    assert receptions.take("ann", piece(300, 600)) == (1000, None)
    assert receptions.take("ann", piece(0, 0, round_=1)) == (0, None)


def test_no_more_is_held_than_an_adapter_can_have(receptions: Receptions) -> None:
    large = DATA * 3
    with pytest.raises(ProtocolError, match="larger than"):
        receptions.take("ann", piece(0, 10, large))
    with pytest.raises(ProtocolError, match="beyond its end"):
        receptions.take("ann", replace(piece(0, 1000), total=999))
    with pytest.raises(ProtocolError, match="beyond its end"):
        receptions.take("ann", replace(piece(0, 0), data=Tensor("f32", (10,), (bytes(40),))))


def test_a_damaged_file_is_refused_and_begun_anew(receptions: Receptions) -> None:
    spoilt = replace(piece(0, 300), data=Tensor("u8", (300,), (bytes(300),)))
    receptions.take("ann", spoilt)
    with pytest.raises(ProtocolError, match="damaged"):
        receptions.take("ann", piece(300, 1000))
    assert receptions.take("ann", piece(0, 1000)) == (1000, DATA)
