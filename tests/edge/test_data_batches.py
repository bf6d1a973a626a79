"""Batches: what they hold, and in which order."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import find_packed_sequence_indices

from edge.data import BatchSource, Example, eval_batches
from edge.data.batches import collate

SEQ = 12


def example(ids: list[int], prompt: int = 0) -> Example:
    labels = [-100] * prompt + ids[prompt:]
    return Example(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32))


def numbered(lengths: list[int]) -> list[Example]:
    """Examples whose tokens occur nowhere else, so that a batch shows which examples are in it."""
    return [example([100 * number + at for at in range(length)]) for number, length in enumerate(lengths, start=1)]


def source(examples: list[Example], packing: bool, batch_size: int = 3, seed: int = 5) -> BatchSource:
    return BatchSource(examples, batch_size=batch_size, seq=SEQ, seed=seed, packing=packing, pad_id=0)


def equal(one, other) -> bool:
    return one.tokens == other.tokens and all(
        (a is None and b is None) or torch.equal(a, b)
        for a, b in (
            (one.input_ids, other.input_ids),
            (one.labels, other.labels),
            (one.attention_mask, other.attention_mask),
            (one.position_ids, other.position_ids),
        )
    )


def test_padded_batch():
    batch = collate([(example([7, 8, 9], prompt=2),), (example([5, 6]),)], packing=False, pad_id=1)
    assert batch.input_ids.tolist() == [[7, 8, 9], [5, 6, 1]]
    assert batch.labels.tolist() == [[-100, -100, 9], [-100, 6, -100]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.position_ids is None
    assert batch.tokens == 2
    assert {t.dtype for t in (batch.input_ids, batch.labels, batch.attention_mask)} == {torch.int64}


def test_packed_batch_isolates_segments_and_padding():
    rows = [(example([7, 8, 9], prompt=2), example([3, 4])), (example([5, 6]),)]
    batch = collate(rows, packing=True, pad_id=1)
    assert batch.input_ids.tolist() == [[7, 8, 9, 3, 4], [5, 6, 1, 1, 1]]
    assert batch.labels.tolist() == [[-100, -100, 9, -100, 4], [-100, 6, -100, -100, -100]]
    assert batch.attention_mask is None
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    segments = find_packed_sequence_indices(batch.position_ids)
    assert segments is not None
    assert segments.tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]
    assert batch.tokens == 3


@pytest.mark.parametrize("packing", [False, True])
def test_rows_without_padding_need_neither_mask_nor_positions(packing):
    batch = collate([(example([1, 2]),), (example([3, 4]),)], packing=packing, pad_id=0)
    assert batch.attention_mask is None
    assert batch.position_ids is None


lengths = st.lists(st.integers(2, SEQ), min_size=1, max_size=40)


@given(lengths=lengths, packing=st.booleans(), batch_size=st.integers(1, 5), epoch=st.integers(0, 3))
@settings(deadline=None)
def test_every_epoch_shows_every_example_once_and_loses_no_target(lengths, packing, batch_size, epoch):
    examples = numbered(lengths)
    run = source(examples, packing, batch_size)
    batches = [run.batch(epoch * len(run) + place) for place in range(len(run))]
    seen = sorted(token for batch in batches for token in batch.input_ids.flatten().tolist() if token)
    assert seen == sorted(token for e in examples for token in e.input_ids.tolist())
    assert sum(batch.tokens for batch in batches) == sum(e.targets for e in examples)
    assert all(batch.tokens == (batch.labels[:, 1:] != -100).sum() for batch in batches)
    assert all(batch.input_ids.shape[0] <= batch_size and batch.input_ids.shape[1] <= SEQ for batch in batches)


@given(lengths=lengths, packing=st.booleans(), seed=st.integers(0, 9), ks=st.lists(st.integers(0, 60), max_size=8))
@settings(deadline=None)
def test_batch_is_a_function_of_seed_and_number(lengths, packing, seed, ks):
    examples = numbered(lengths)
    run = source(examples, packing, seed=seed)
    for k in ks:
        assert equal(run.batch(k), source(examples, packing, seed=seed).batch(k))


@pytest.mark.parametrize("packing", [False, True])
def test_order_depends_on_epoch_and_seed(packing):
    examples = numbered([4, 9] * 20)
    run, other = source(examples, packing), source(examples, packing, seed=6)
    assert not equal(run.batch(0), run.batch(len(run)))
    assert not equal(run.batch(0), other.batch(0))


@given(lengths=lengths, batch_size=st.integers(1, 5))
@settings(deadline=None)
def test_packing_never_needs_more_rows_and_leaves_no_two_rows_that_fit_in_one(lengths, batch_size):
    run = source(numbered(lengths), packing=True, batch_size=1)
    used = [int((run.batch(k).input_ids != 0).sum()) for k in range(len(run))]
    assert len(used) <= len(lengths)
    assert all(a + b > SEQ for at, a in enumerate(used) for b in used[at + 1 :])


@pytest.mark.parametrize("packing", [False, True])
def test_eval_batches_keep_the_order(packing):
    examples = numbered([SEQ, SEQ - 1, SEQ, SEQ, 5])
    batches = list(eval_batches(examples, batch_size=2, seq=SEQ, packing=packing, pad_id=0))
    assert [len(batch.input_ids) for batch in batches] == [2, 2, 1]
    assert [first for batch in batches for first in batch.input_ids[:, 0].tolist()] == [100, 200, 300, 400, 500]


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="no examples"):
        source([], packing=True)
    for bad in (SEQ + 1, 1):
        with pytest.raises(ValueError, match=f"has {bad} tokens"):
            source(numbered([bad]), packing=False)
    with pytest.raises(IndexError):
        source(numbered([3]), packing=False).batch(-1)
