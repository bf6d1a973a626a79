"""A batch's mask and positions as a few integers, instead of a mask that grows with the square of the length.

A `Layout` describes `rows` rows of `past + width` positions each, of which the last `width` are new. Per row
the mask is the lengths of its alternating runs, first padding, then real, then padding, ...; the last run
reaches to the end and is not written, and a row that is real throughout has none. Positions follow from it
by one of four rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from messaging.errors import ProtocolError

#: Position of the i-th column is i, padding or not (what a transformers forward does by itself).
COLUMNS = 0
#: Position is the number of real columns before it (what `generate()` does).
REAL = 1
#: As REAL, but the first *new* real column of each row has the position that is given.
FROM = 2
#: No mask: each row is cut into segments (position of the first column, length), each its own sequence.
SEGMENTS = 3

MAX_INTS_PER_ROW = 64
_MAX_POSITION = (1 << 31) - 1


@dataclass(frozen=True)
class Layout:
    """rows, past, width as above; `rule` one of the four; `runs` the mask per row; `starts` what the rule needs."""

    rows: int
    past: int
    width: int
    rule: int = COLUMNS
    runs: tuple[tuple[int, ...], ...] = ()
    starts: tuple[tuple[int, ...], ...] = ()

    @property
    def plain(self) -> bool:
        """No padding, positions counted from 0: nothing needs to be said."""
        return self.rule == COLUMNS and not any(self.runs)

    def mask(self) -> torch.Tensor | None:
        """Bool [rows, past + width], True where a column is real; None where all are."""
        if self.rule == SEGMENTS or not any(self.runs):
            return None
        mask = torch.ones(self.rows, self.past + self.width, dtype=torch.bool)
        for row, runs in zip(mask, self.runs, strict=True):
            if not runs:
                continue
            column, real = 0, False
            for length in runs:
                row[column : column + length] = real
                column, real = column + length, not real
            row[column:] = real
        return mask

    def positions(self) -> torch.Tensor:
        """Int64 [rows, width]: the position ids of the new columns (of padding: 0)."""
        if self.rule == COLUMNS:
            return torch.arange(self.past, self.past + self.width).expand(self.rows, -1)
        if self.rule == SEGMENTS:
            return torch.stack([_segment_positions(row) for row in self.starts])
        mask = self.mask()
        real = torch.ones(self.rows, self.past + self.width, dtype=torch.long) if mask is None else mask.long()
        counted = real.cumsum(1)[:, self.past :] - 1
        new = real[:, self.past :]
        if self.rule == FROM:
            first = torch.tensor([row[0] for row in self.starts])[:, None]
            counted = first + new.cumsum(1) - 1
        return counted * new

    def real(self) -> torch.Tensor:
        """Bool [rows, width]: which of the new columns hold a token of the user's (packed padding counts as real)."""
        mask = self.mask()
        if mask is None:
            return torch.ones(self.rows, self.width, dtype=torch.bool)
        return mask[:, self.past :]

    def replay(self, have: int) -> Layout:
        """The layout that sends columns have .. past again, as one request built on `have`."""
        starts = self.starts
        if self.rule == FROM:
            mask = self.mask()
            real = torch.ones(self.rows, self.past) if mask is None else mask[:, : self.past].long()
            starts = tuple(
                (max(int(row[0]) - int(real[i, have : self.past].sum()), 0),) for i, row in enumerate(self.starts)
            )
        return Layout(self.rows, have, self.past - have, self.rule, _clip(self.runs, self.past), starts)

    # -- on the wire ---------------------------------------------------------------------------------

    def to_ints(self) -> tuple[int, ...]:
        """The integers that cross the wire; none at all for a plain layout."""
        if self.plain:
            return ()
        out = [self.rule]
        for row in range(self.rows):
            runs = self.runs[row] if self.runs else ()
            starts = self.starts[row] if self.starts else ()
            out += [len(runs), *runs, *((len(starts), *starts) if self.rule in (FROM, SEGMENTS) else ())]
        return tuple(out)

    @classmethod
    def from_ints(cls, ints: Sequence[int], rows: int, past: int, width: int, most: int = _MAX_POSITION + 1) -> Layout:
        """Undo `to_ints`. Raises ProtocolError on anything that describes no batch of this shape, or that has a
        position from `most` on: some models look positions up in a table of that size."""
        if rows < 1 or width < 1 or past < 0:
            raise ProtocolError(f"layout: a batch of {rows} rows, {past} + {width} positions")
        if not ints:
            return cls(rows, past, width)
        rule, at = ints[0], 1
        if rule not in (COLUMNS, REAL, FROM, SEGMENTS):
            raise ProtocolError(f"layout: unknown rule {rule}")
        runs: list[tuple[int, ...]] = []
        starts: list[tuple[int, ...]] = []
        for _ in range(rows):
            row, at = _take(ints, at)
            runs.append(row)
            if rule in (FROM, SEGMENTS):
                row, at = _take(ints, at)
                starts.append(row)
        layout = cls(rows, past, width, rule, tuple(runs) if any(runs) else (), tuple(starts))
        if at != len(ints):
            raise ProtocolError("layout: more integers than rows")
        layout._check(most)
        return layout

    def _check(self, most: int) -> None:
        for runs in self.runs:
            if sum(runs) > self.past + self.width:
                raise ProtocolError("layout: runs are longer than the row")
        if self.rule == FROM and any(len(row) != 1 for row in self.starts):
            raise ProtocolError("layout: a row needs one first position")
        if self.rule == FROM and any(first + self.width > most for (first,) in self.starts):
            raise ProtocolError(f"layout: positions beyond {most}")
        if self.rule == SEGMENTS:
            if self.past or any(self.runs):
                raise ProtocolError("layout: packed rows have neither past nor padding")
            for row in self.starts:
                if len(row) % 2 or any(n < 1 for n in row[1::2]) or sum(row[1::2]) != self.width:
                    raise ProtocolError("layout: segments do not fill the row")
                if any(first + n > most for first, n in zip(row[::2], row[1::2], strict=True)):
                    raise ProtocolError(f"layout: positions beyond {most}")

    # -- from a transformers call --------------------------------------------------------------------

    @classmethod
    def from_call(
        cls, rows: int, past: int, width: int, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> Layout:
        """Describe one forward call.

        attention_mask: [rows, past + width] of 0 and 1, or None. position_ids: [rows or 1, width] or None.
        Raises ProtocolError when the call cannot be told in a few integers per row.
        """
        runs: tuple[tuple[int, ...], ...] = ()
        if attention_mask is not None:
            if attention_mask.shape != (rows, past + width):
                raise ProtocolError(
                    f"an attention mask must be [{rows}, {past + width}] of 0 and 1 here, "
                    f"cached positions included, not {list(attention_mask.shape)}"
                )
            attention_mask = attention_mask.bool()
            if not attention_mask.all():
                runs = tuple(_runs(row) for row in attention_mask)
        plain = cls(rows, past, width, COLUMNS, runs)
        if position_ids is None:
            return plain
        if width == 1 and not runs and rows == 1 and int(position_ids[0, 0]) == past:
            return plain
        positions = position_ids.expand(rows, width)
        return _with_positions(plain, positions, attention_mask is None)


def _with_positions(plain: Layout, positions: torch.Tensor, unmasked: bool) -> Layout:
    """Find the rule by which `positions` [rows, width] follow from the mask.

    A rule that also gives padding its position comes first: what the model makes of padding is seen where
    somebody generates from right-padded rows.
    """
    rows, past, width, runs = plain.rows, plain.past, plain.width, plain.runs
    real = plain.real()
    positions = positions.cpu()
    firsts = tuple((int(row[keep][0]) if keep.any() else 0,) for row, keep in zip(positions, real, strict=True))
    candidates = [
        plain,
        Layout(rows, past, width, REAL, runs),
        Layout(rows, past, width, FROM, runs, firsts),
    ]
    for everywhere in (True, False):
        for layout in candidates:
            given = layout.positions()
            if torch.equal(positions, given) if everywhere else torch.equal(positions[real], given[real]):
                return layout
    if unmasked and past == 0:
        return Layout(rows, 0, width, SEGMENTS, (), tuple(_segments(row) for row in positions))
    raise ProtocolError("these position ids follow no rule that the wire knows; leave them to the model")


def _runs(row: torch.Tensor) -> tuple[int, ...]:
    """Lengths of the alternating runs of a bool row, padding first, without the last one."""
    values, lengths = torch.unique_consecutive(row, return_counts=True)
    runs = lengths.tolist()
    if len(runs) > MAX_INTS_PER_ROW:
        raise ProtocolError("attention mask with too many holes: only padding and packing cross the wire")
    if len(runs) == 1:
        return () if bool(values[0]) else tuple(runs)
    return (0, *runs[:-1]) if bool(values[0]) else tuple(runs[:-1])


def _clip(runs: tuple[tuple[int, ...], ...], length: int) -> tuple[tuple[int, ...], ...]:
    """The runs of the first `length` columns."""
    clipped = []
    for row in runs:
        out: list[int] = []
        column = 0
        for run in row:
            if column + run >= length:
                if not out or column < length:
                    out.append(length - column)
                break
            out.append(run)
            column += run
        clipped.append(tuple(out))
    return tuple(clipped)


def _segments(positions: torch.Tensor) -> tuple[int, ...]:
    """(first position, length) of every stretch of consecutive positions."""
    cuts = (torch.diff(positions) != 1).nonzero()[:, 0].add(1).tolist()
    edges = [0, *cuts, len(positions)]
    if len(edges) > MAX_INTS_PER_ROW:
        raise ProtocolError("too many packed segments in one row")
    return tuple(n for a, b in pairwise(edges) for n in (int(positions[a]), b - a))


def _segment_positions(row: tuple[int, ...]) -> torch.Tensor:
    return torch.cat([torch.arange(first, first + n) for first, n in zip(row[::2], row[1::2], strict=True)])


def _take(ints: Sequence[int], at: int) -> tuple[tuple[int, ...], int]:
    if at >= len(ints) or not 0 <= ints[at] <= 2 * MAX_INTS_PER_ROW or at + 1 + ints[at] > len(ints):
        raise ProtocolError("layout: cut short")
    end = at + 1 + ints[at]
    row = tuple(ints[at + 1 : end])
    if any(not 0 <= n <= _MAX_POSITION for n in row):
        raise ProtocolError("layout: a length or position that no row has")
    return row, end
