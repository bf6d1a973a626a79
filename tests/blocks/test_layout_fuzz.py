"""Layouts off the wire: any integers give a layout that can be used, or a ProtocolError."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.layout import COLUMNS, FROM, REAL, SEGMENTS, Layout
from messaging.errors import ProtocolError
from tools.fuzz.meter import Meter

MOST = 512
NUMBERS = st.integers(0, 12) | st.sampled_from([127, 128, 129, MOST, (1 << 31) - 1, 1 << 31, (1 << 53) - 1, -1])
SIZES = st.integers(1, 6), st.integers(0, 20), st.integers(1, 20)


def usable_or_refused(ints: tuple[int, ...], rows: int, past: int, width: int) -> None:
    try:
        layout = Layout.from_ints(ints, rows, past, width, MOST)
    except ProtocolError:
        return
    mask, positions = layout.mask(), layout.positions()
    assert mask is None or mask.shape == (rows, past + width)
    assert positions.shape == (rows, width)
    assert 0 <= int(positions.min()) <= int(positions.max()) < MOST
    assert layout.real().shape == (rows, width)
    if past:
        assert layout.replay(past - 1).width == 1
    assert Layout.from_ints(layout.to_ints(), rows, past, width, MOST).to_ints() == layout.to_ints()


@given(st.lists(st.integers(-(1 << 63), 1 << 64), max_size=12).map(tuple), *SIZES)
@settings(max_examples=300, deadline=None)
def test_any_integers(ints: tuple[int, ...], rows: int, past: int, width: int) -> None:
    usable_or_refused(ints, rows, past, width)


@given(st.sampled_from([COLUMNS, REAL, FROM, SEGMENTS]), st.data(), *SIZES)
@settings(max_examples=400, deadline=None)
def test_integers_of_the_right_form(rule: int, data: st.DataObject, rows: int, past: int, width: int) -> None:
    ints = [rule]
    for _ in range(rows * (2 if rule in (FROM, SEGMENTS) else 1)):
        row = data.draw(st.lists(NUMBERS, max_size=4))
        ints += [data.draw(st.sampled_from([len(row), len(row), len(row), len(row) + 1])), *row]
    usable_or_refused(tuple(ints), rows, past, width)


@given(*[st.integers(-3, 3)] * 3)
def test_any_sizes(rows: int, past: int, width: int) -> None:
    if rows < 1 or past < 0 or width < 1:
        with pytest.raises(ProtocolError):
            Layout.from_ints((), rows, past, width)


@pytest.mark.parametrize(
    ("ints", "past", "width"),
    [((FROM, 0, 1, MOST - 2), 0, 3), ((SEGMENTS, 0, 2, MOST - 2, 3), 0, 3), ((FROM, 0, 1, (1 << 31) - 1), 4, 1)],
)
def test_positions_that_the_model_does_not_have(ints: tuple[int, ...], past: int, width: int) -> None:
    Layout.from_ints(ints, 1, past, width).positions()
    with pytest.raises(ProtocolError, match="beyond"):
        Layout.from_ints(ints, 1, past, width, MOST)


@pytest.mark.skipif(sys.platform != "linux", reason="memory and time are read from /proc")
def test_no_layout_takes_more_than_its_rows() -> None:
    worst = Meter()
    huge = (1 << 31) - 1
    for ints in (
        (0, 4, *[huge] * 4) * 800,
        (1, 128, *[huge] * 128) * 30,
        (2, 0, 1, huge) * 1000,
        (3, 0, 2, 0, 1) * 800,
    ):
        for rows in (1, 1024):
            with pytest.raises(ProtocolError):
                worst.measure(lambda ints=ints, rows=rows: Layout.from_ints(ints[:4096], rows, 0, 1, 1 << 20))
    assert worst.worst_mb < 4
    assert worst.worst_ms < 100
