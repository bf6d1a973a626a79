"""Masks and positions as a few integers: what a call says comes out again at the hub."""

from __future__ import annotations

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.layout import COLUMNS, FROM, MAX_INTS_PER_ROW, REAL, SEGMENTS, Layout
from messaging.errors import ProtocolError

Padding = tuple[int, int]


@st.composite
def masks(draw: st.DrawFn, last_is_real: bool = False) -> tuple[torch.Tensor, int]:
    """A bool mask [rows, past + width] with padding on either side of each row, and past."""
    width = draw(st.integers(1, 12))
    past = draw(st.integers(0, 12))
    length, rows = past + width, draw(st.integers(1, 4))
    mask = torch.ones(rows, length, dtype=torch.bool)
    for row in mask:
        left = draw(st.integers(0, length - 1 if last_is_real else length))
        right = 0 if last_is_real else draw(st.integers(0, length))
        row[:left], row[length - right :] = False, False
    return mask, past


def over_the_wire(layout: Layout) -> Layout:
    return Layout.from_ints(layout.to_ints(), layout.rows, layout.past, layout.width)


def positions_by(rule: int, mask: torch.Tensor, past: int, start: int) -> torch.Tensor | None:
    """What a caller may give for the new columns: nothing, columns, real columns, or these from somewhere else on."""
    rows, length = mask.shape
    if rule == COLUMNS:
        return torch.arange(past, length).expand(rows, -1)
    counted = mask.long().cumsum(1) - 1 + (start if rule == FROM else 0)
    return (counted * mask)[:, past:]


def assert_says(layout: Layout, mask: torch.Tensor, positions: torch.Tensor) -> None:
    """The layout's mask is the given one, and so are the positions of real columns."""
    said = layout.mask()
    assert torch.equal(mask, torch.ones_like(mask) if said is None else said)
    real = mask[:, layout.past :]
    assert torch.equal(layout.real(), real)
    assert torch.equal(layout.positions()[real], positions[real])


# -- round trips -------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(masks(), st.sampled_from([COLUMNS, REAL, FROM]), st.integers(1, 9))
def test_mask_and_positions_come_out_again(given_mask: tuple[torch.Tensor, int], rule: int, start: int) -> None:
    mask, past = given_mask
    positions = positions_by(rule, mask, past, start)
    assert positions is not None
    layout = Layout.from_call(mask.shape[0], past, mask.shape[1] - past, mask.long(), positions)
    assert over_the_wire(layout) == layout
    assert_says(over_the_wire(layout), mask, positions)


@settings(deadline=None)
@given(masks())
def test_without_positions_columns_are_counted(given_mask: tuple[torch.Tensor, int]) -> None:
    mask, past = given_mask
    layout = over_the_wire(Layout.from_call(mask.shape[0], past, mask.shape[1] - past, mask, None))
    assert_says(layout, mask, positions_by(COLUMNS, mask, past, 0))  # type: ignore[arg-type]


@settings(deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 6)), min_size=1, max_size=5), min_size=1, max_size=3)
)
def test_segments_come_out_again(rows: list[list[tuple[int, int]]]) -> None:
    longest = max(sum(length for _, length in row) for row in rows)
    positions = torch.stack(
        [
            torch.cat([*(torch.arange(first, first + n) for first, n in row), torch.arange(longest)])[:longest]
            for row in rows
        ]
    )
    layout = Layout.from_call(len(rows), 0, longest, None, positions)
    assert torch.equal(over_the_wire(layout).positions(), positions)
    assert layout.mask() is None


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=MAX_INTS_PER_ROW))
def test_masks_with_holes_come_out_again(row: list[bool]) -> None:
    mask = torch.tensor([row])
    layout = over_the_wire(Layout.from_call(1, 0, len(row), mask, None))
    assert_says(layout, mask, torch.arange(len(row))[None])


def test_a_plain_batch_says_nothing() -> None:
    layout = Layout.from_call(3, 5, 2, torch.ones(3, 7), torch.arange(5, 7)[None])
    assert layout.to_ints() == ()
    assert layout.mask() is None
    assert Layout.from_ints((), 3, 5, 2) == layout


@pytest.mark.parametrize(
    ("mask", "ints"),
    [
        ([[1, 1, 1, 1], [0, 0, 1, 1]], (COLUMNS, 0, 1, 2)),
        ([[1, 1, 1, 0], [1, 1, 1, 1]], (COLUMNS, 2, 0, 3, 0)),
        ([[0, 1, 1, 0], [0, 0, 0, 0]], (COLUMNS, 2, 1, 2, 1, 4)),
    ],
)
def test_runs_are_written_without_the_last(mask: list[list[int]], ints: tuple[int, ...]) -> None:
    assert Layout.from_call(2, 0, 4, torch.tensor(mask), None).to_ints() == ints


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60_000), st.integers(0, 4000)), min_size=1, max_size=8),
    st.sampled_from([COLUMNS, REAL, FROM]),
)
def test_a_padding_mask_takes_at_most_16_bytes_a_row(paddings: list[Padding], rule: int) -> None:
    """Whatever the length: a row's length stays below 2 ** 16 here, as msgpack's 3-byte integers hold."""
    length = 65_000
    runs = tuple((left, length - left - right) if right else (left,) if left else () for left, right in paddings)
    starts = tuple((60_000,) for _ in paddings) if rule == FROM else ()
    layout = Layout(len(paddings), length - 1, 1, rule, runs, starts)
    packed = len(msgpack.packb(layout.to_ints())) - len(msgpack.packb(list(range(2))))
    assert packed <= 16 * len(paddings)


# -- replay ------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(masks(last_is_real=True), st.sampled_from([COLUMNS, REAL, FROM]), st.integers(1, 9), st.data())
def test_a_replay_says_of_the_prefix_what_the_requests_said(
    given_mask: tuple[torch.Tensor, int], rule: int, start: int, data: st.DataObject
) -> None:
    mask, past = given_mask
    if past == 0:
        return
    have = data.draw(st.integers(0, past - 1))
    positions = positions_by(rule, mask, 0, start)
    assert positions is not None
    layout = Layout.from_call(mask.shape[0], past, mask.shape[1] - past, mask, positions[:, past:])
    replay = over_the_wire(layout.replay(have))
    assert (replay.past, replay.width) == (have, past - have)
    assert_says(replay, mask[:, :past], positions[:, have:past])


# -- what is refused ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.integers(-2, 12), st.integers(-(1 << 60), 1 << 60)), max_size=40),
    st.integers(-1, 4),
    st.integers(-1, 10),
    st.integers(-1, 10),
)
def test_hostile_integers_are_refused_or_harmless(ints: list[int], rows: int, past: int, width: int) -> None:
    try:
        layout = Layout.from_ints(ints, rows, past, width)
    except ProtocolError:
        return
    assert layout.positions().shape == layout.real().shape == (rows, width)
    mask = layout.mask()
    assert mask is None or mask.shape == (rows, past + width)
    if past:
        layout.replay(0).positions()


@pytest.mark.parametrize(
    ("ints", "reason"),
    [
        ((4, 0), "unknown rule"),
        ((-1, 0), "unknown rule"),
        ((COLUMNS,), "cut short"),
        ((COLUMNS, 3, 1), "cut short"),
        ((COLUMNS, -1), "cut short"),
        ((COLUMNS, 1, -1), "no row has"),
        ((COLUMNS, 1, 1 << 60), "no row has"),
        ((COLUMNS, 2, 3, 4), "longer than the row"),
        ((COLUMNS, 1, 2, 0), "more integers"),
        ((FROM, 0, 0), "one first position"),
        ((FROM, 0, 2, 1, 1), "one first position"),
        ((SEGMENTS, 0, 0), "segments"),
        ((SEGMENTS, 0, 3, 0, 6, 0), "segments"),
        ((SEGMENTS, 0, 4, 0, 5, 0, 0), "segments"),
        ((SEGMENTS, 1, 1, 2, 0, 6), "neither past nor padding"),
    ],
)
def test_integers_that_describe_no_row_of_six(ints: tuple[int, ...], reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        Layout.from_ints(ints, 1, 0, 6)


def test_a_call_that_takes_more_than_a_few_integers_is_refused() -> None:
    holes = torch.arange(2 * MAX_INTS_PER_ROW)[None] % 2
    with pytest.raises(ProtocolError, match="holes"):
        Layout.from_call(1, 0, holes.shape[1], holes, None)
    with pytest.raises(ProtocolError, match="segments"):
        Layout.from_call(1, 0, 2 * MAX_INTS_PER_ROW, None, torch.zeros(1, 2 * MAX_INTS_PER_ROW, dtype=torch.long))
    with pytest.raises(ProtocolError, match="no rule"):
        Layout.from_call(1, 0, 4, torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 3, 1, 2]]))


@pytest.mark.parametrize("shape", [(2, 4), (1, 3), (1, 1, 4, 4)])
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError, match=r"must be \[1, 4\]"):
        Layout.from_call(1, 2, 2, torch.ones(shape), None)
