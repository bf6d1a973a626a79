"""How a step goes through: what the memory needs, what pays, what a training began with, what was asked for."""

from __future__ import annotations

from typing import Any, cast

import pytest

from blocks.partition import Partition
from edge.planning import Planned, in_micro_batches
from messaging.errors import InputError
from profiles.planner import Plan


def planned(rows: int = 4, needed: int = 1, under_way: int = 1) -> Planned:
    plan = Plan(1, 1, "float32", needed, under_way, cast(Any, None), 1.0, 1)
    return Planned(Partition(1, 1), rows, plan)


@pytest.mark.parametrize(
    ("rows", "seq", "count"),
    [(4, 128, 2), (6, 128, 3), (8, 128, 4), (2, 128, 2), (1, 512, 1), (4, 64, 2), (4, 16, 1), (4, 2048, 4)],
)
def test_auto_cuts_into_parts_that_are_worth_it(rows: int, seq: int, count: int) -> None:
    found = in_micro_batches(planned(rows), "auto", None, seq)
    assert (found.micro_batches, found.under_way, found.rows_at_once) == (count, count, rows)


def test_where_memory_is_short_it_says_how_many_and_how_many_at_once() -> None:
    found = in_micro_batches(planned(8, needed=4, under_way=2), "auto", None, 16)
    assert (found.micro_batches, found.under_way, found.rows_at_once) == (4, 2, 2)


def test_a_training_keeps_what_it_began_with_as_far_as_it_fits() -> None:
    assert in_micro_batches(planned(), "auto", 1, 128).micro_batches == 1
    assert in_micro_batches(planned(8, needed=4), "auto", 2, 128).micro_batches == 4


def test_what_is_asked_for_is_taken() -> None:
    assert in_micro_batches(planned(), "3", 1, 128).micro_batches == 3
    assert str(in_micro_batches(planned(), "3", 1, 128)) == "a step takes its 4 rows in 3 micro-batches, 3 under way"
    assert str(in_micro_batches(planned(), "1", 4, 128)) == "a step takes its 4 rows at once"


@pytest.mark.parametrize("asked", ["0", "17", "-1", "two", "1.5", ""])
def test_no_such_number(asked: str) -> None:
    with pytest.raises(InputError, match="from 1 to 16"):
        in_micro_batches(planned(), asked, None, 128)


def test_less_than_what_the_memory_needs_is_refused() -> None:
    with pytest.raises(InputError, match="needs 4 of them to fit"):
        in_micro_batches(planned(8, needed=4), "2", None, 128)
