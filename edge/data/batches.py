"""Examples become batches: padded or packed rows, in an order that follows from the seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edge.data.encode import MIN_TOKENS, NOT_A_TARGET, Example
from edge.data.packing import Row, pack


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of equal length S, on the CPU, int64.

    A padded batch has `attention_mask`; a packed one has `position_ids`, which start again at 0 with every
    segment, and a row's padding is one more segment. Where neither is needed, both are None.
    transformers finds the segments only if the model is called with `use_cache=False`.
    """

    input_ids: torch.Tensor  # [B, S]
    labels: torch.Tensor  # [B, S], -100: not a target; always so at the first position of a segment
    attention_mask: torch.Tensor | None  # [B, S], 1: a real token
    position_ids: torch.Tensor | None  # [B, S]
    tokens: int  # targets that count in the shifted loss


class BatchSource:
    """An endless, rewindable run of batches: batch k is a function of the arguments and k alone.

    Every epoch shows every example once, in an order of its own; its last batch may have fewer rows.

    Raises ValueError if there are no examples, or one is longer than `seq` or shorter than 2 tokens.
    """

    def __init__(
        self, examples: Sequence[Example], batch_size: int, seq: int, seed: int, packing: bool, pad_id: int
    ) -> None:
        # Packed once, not every epoch, so that every epoch has the same number of batches.
        mixed = [examples[at] for at in _permutation(len(examples), seed, stream=0)]
        self._rows = _rows(mixed if packing else examples, seq, packing)
        self._batch_size = batch_size
        self._seed = seed
        self._packing = packing
        self._pad_id = pad_id
        #: The epoch asked for last and its order of rows, which is slow to make for every batch.
        self._last_order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self._rows) // self._batch_size)

    def batch(self, k: int) -> Batch:
        """Batch number `k`, counted from 0 over all epochs; a negative one raises IndexError."""
        if k < 0:
            raise IndexError(f"there is no batch {k}")
        epoch, place = divmod(k, len(self))
        if self._last_order[0] != epoch:
            self._last_order = (epoch, _permutation(len(self._rows), self._seed, stream=epoch + 1))
        order = self._last_order[1][place * self._batch_size : (place + 1) * self._batch_size]
        return collate([self._rows[at] for at in order], self._packing, self._pad_id)


def eval_batches(examples: Sequence[Example], batch_size: int, seq: int, packing: bool, pad_id: int) -> Iterator[Batch]:
    """Every example once, always in the same order. Raises ValueError as BatchSource does."""
    rows = _rows(examples, seq, packing)
    for start in range(0, len(rows), batch_size):
        yield collate(rows[start : start + batch_size], packing, pad_id)


def collate(rows: Sequence[Row], packing: bool, pad_id: int) -> Batch:
    """One batch of the rows, padded on the right to the longest of them."""
    used = np.array([sum(map(len, row)) for row in rows])  # [B]
    size = (len(rows), int(used.max()))
    ids = np.full(size, pad_id, dtype=np.int64)
    labels = np.full(size, NOT_A_TARGET, dtype=np.int64)
    positions = np.zeros(size, dtype=np.int64)
    for at, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + len(example)
            ids[at, start:end] = example.input_ids
            labels[at, start + 1 : end] = example.labels[1:]
            positions[at, start:end] = np.arange(end - start)
            start = end
        positions[at, start:] = np.arange(size[1] - start)
    real = np.arange(size[1]) < used[:, None]  # [B, S]
    plain = bool(real.all()) and all(len(row) == 1 for row in rows)
    return Batch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        attention_mask=None if plain or packing else torch.from_numpy(real.astype(np.int64)),
        position_ids=torch.from_numpy(positions) if packing and not plain else None,
        tokens=int((labels != NOT_A_TARGET).sum()),
    )


def _rows(examples: Sequence[Example], seq: int, packing: bool) -> list[Row]:
    if not examples:
        raise ValueError("there are no examples to make batches of")
    for example in examples:
        if not MIN_TOKENS <= len(example) <= seq:
            raise ValueError(f"an example has {len(example)} tokens; it must have {MIN_TOKENS} to {seq}")
    return pack(examples, seq) if packing else [(example,) for example in examples]


def _permutation(size: int, seed: int, stream: int) -> list[int]:
    """The numbers below `size` in an order that follows from (seed, stream)."""
    order: list[int] = np.random.default_rng((seed, stream)).permutation(size).tolist()
    return order
