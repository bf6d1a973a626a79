"""Which batches of several edges are joined, and how their rows lie in the joined one."""

from __future__ import annotations

import torch

from blocks.layout import REAL, SEGMENTS, Layout
from hub.jobs import Place
from hub.joining import Part, join


def part(layout: Layout, value: float, enter: int = 1, leave: int = 5) -> Part:
    return Part(torch.full((layout.rows, layout.width, 2), value), layout, Place(enter, leave))


PLAIN = Layout(1, 0, 4)
LEFT = Layout(2, 0, 3, REAL, ((), (1,)))
PACKED = Layout(1, 0, 4, SEGMENTS, (), ((0, 3, 0, 1),))
#: as long as what it is joined with, so that nothing has to be filled up
PACKED_SHORT = Layout(1, 0, 2, SEGMENTS, (), ((0, 1, 0, 1),))


def test_one_part_stays_as_it_is() -> None:
    only = part(PLAIN, 1.0)
    (joined,) = join([only])
    assert joined.states is only.states
    assert joined.mask is None
    assert joined.positions.tolist() == [[0, 1, 2, 3]]
    assert (joined.enters, joined.leaves, joined.slices) == ([1], [5], [(0, 0, 1, 4)])


def test_shorter_rows_are_filled_up_on_the_right_and_masked() -> None:
    (joined,) = join([part(PLAIN, 1.0, 2, 5), part(LEFT, 2.0, 1, 3)])
    assert joined.states[:, :, 0].tolist() == [[1, 1, 1, 1], [2, 2, 2, 0], [2, 2, 2, 0]]
    assert joined.mask is not None
    assert joined.mask.int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 0]]
    assert joined.positions[:, :3].tolist() == [[0, 1, 2], [0, 1, 2], [0, 0, 1]]
    assert (joined.enters, joined.leaves) == ([2, 1, 1], [5, 3, 3])
    assert joined.slices == [(0, 0, 1, 4), (1, 1, 3, 3)]


def test_rows_keep_the_order_of_the_parts() -> None:
    (joined,) = join([part(PLAIN, value) for value in (3.0, 1.0, 2.0)])
    assert joined.states[:, 0, 0].tolist() == [3, 1, 2]
    assert joined.mask is None


def test_packed_rows_join_plain_ones_without_a_mask() -> None:
    """Packing is found in the positions, and only where there is no mask: what fills a row up is a segment too."""
    (joined,) = join([part(PACKED_SHORT, 1.0), part(PLAIN, 2.0), part(PACKED, 3.0)])
    assert joined.mask is None
    assert joined.positions.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3], [0, 1, 2, 0]]


def test_packed_rows_do_not_join_padded_ones() -> None:
    padded, packed = join([part(PACKED, 1.0), part(LEFT, 2.0), part(PLAIN, 3.0)])
    assert padded.slices == [(1, 0, 2, 3), (2, 2, 3, 4)]
    assert padded.mask is not None
    assert packed.slices == [(0, 0, 1, 4)]
    assert packed.mask is None


def test_nothing_makes_no_batch() -> None:
    assert join([]) == []
