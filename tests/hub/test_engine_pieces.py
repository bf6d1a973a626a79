"""Requests computed in pieces, and of different widths in one forward: the same states as by themselves."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from blocks.codec import from_wire, to_wire
from blocks.layout import Layout
from hub.engine import Engine
from hub.jobs import InferItem, Outcome, Place
from messaging.errors import ErrorCode, HubError, NotFinite
from messaging.messages import Tensor
from tests.support.models import CONFIGS, MORE_CONFIGS, difference, make_engine, whole_model


@cache
def whole(name: str) -> PreTrainedModel:
    return whole_model({**CONFIGS, **MORE_CONFIGS}[name]())


def random_states(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, 64, generator=torch.Generator().manual_seed(seed))


def padded(rows: int, past: int, width: int) -> Layout:
    """Row i has 2 * i columns of padding on its left."""
    mask = torch.ones(rows, past + width, dtype=torch.long)
    for row in range(rows):
        mask[row, : 2 * row] = 0
    return Layout.from_call(rows, past, width, mask, (mask.cumsum(1) - 1).clamp(min=0)[:, past:])


def item(states: torch.Tensor, past: int, session: int = 1, place: Place = Place(1, 5)) -> InferItem:  # noqa: B008
    rows, width, _ = states.shape
    return InferItem(session, 1, 1, place, 0, padded(rows, past, width), (), to_wire(states))


def tensor(outcome: Outcome | None) -> torch.Tensor:
    assert isinstance(outcome, Tensor), outcome
    return from_wire(outcome, dtype=torch.float32, shape=(None, None, None))


def whole_answer(name: str, states: torch.Tensor, past: int) -> torch.Tensor:
    """One request after the other, each as a whole."""
    engine = make_engine(whole(name))
    tensor(engine.infer([item(states[:, :past], 0)])[0])
    return tensor(engine.infer([item(states[:, past:], past)])[0])


@pytest.mark.parametrize(
    ("name", "rows"), [("llama", 1), ("llama", 3), ("mistral", 3), ("gemma2", 2), ("gpt2", 3), ("bloom", 2)]
)
def test_pieces_give_what_the_whole_gives(name: str, rows: int) -> None:
    """Past the sliding window of 8, with padding, on a stream that holds positions already."""
    states = random_states(rows, 30, 0)
    wanted = whole_answer(name, states, 9)
    engine = make_engine(whole(name))
    first = item(states[:, :9], 0)
    assert engine.infer([first], {0: 4}) == [None]
    tensor(engine.infer([first])[0])
    second = item(states[:, 9:], 9)
    for upto in (1, 7, 20):
        assert engine.infer([second], {0: upto}) == [None]
    given = tensor(engine.infer([second], {0: 21})[0])
    assert difference(given, wanted) < 1e-5
    more = random_states(rows, 1, 1)
    alone = make_engine(whole(name))
    tensor(alone.infer([item(states, 0)])[0])
    assert difference(tensor(engine.infer([item(more, 30)])[0]), tensor(alone.infer([item(more, 30)])[0])) < 1e-5


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
def test_a_prompt_a_draft_and_single_tokens_make_one_forward(name: str) -> None:
    """Of different partitions and numbers of rows; one of them in pieces."""
    places = [Place(1, 5), Place(2, 5), Place(1, 3), Place(1, 6)]
    shapes = [(2, 11, 1), (1, 5, 4), (1, 14, 1), (1, 1, 12)]
    states = [random_states(rows, past + width, seed) for seed, (rows, past, width) in enumerate(shapes)]

    def items(begin: bool) -> list[InferItem]:
        chosen = [(s[:, :past] if begin else s[:, past:], 0 if begin else past)
                  for s, (_, past, _) in zip(states, shapes, strict=True)]  # fmt: skip
        return [item(s, past, n, places[n - 1]) for n, (s, past) in enumerate(chosen, 1)]

    engine, alone = make_engine(whole(name)), make_engine(whole(name))
    for one in items(begin=True):
        assert difference(tensor(engine.infer([one])[0]), tensor(alone.infer([one])[0])) == 0
    wanted = [tensor(alone.infer([one])[0]) for one in items(begin=False)]
    asked, before = items(begin=False), engine.forwards
    given = engine.infer(asked, {3: 5})
    assert (given[3], engine.forwards) == (None, before + 1)
    given[3] = engine.infer([asked[3]])[0]
    for one, other in zip(given, wanted, strict=True):
        assert difference(tensor(one), other) < 1e-5


def begun(engine: Engine, past: int = 0) -> tuple[InferItem, torch.Tensor]:
    """A request of which a part is computed, and its states from the first position on."""
    states = random_states(1, past + 20, 3)
    if past:
        tensor(engine.infer([item(states[:, :past], 0)])[0])
    request = item(states[:, past:], past)
    assert engine.infer([request], {0: 8}) == [None]
    return request, states


def test_a_stream_that_is_lost_between_two_pieces_is_begun_anew_or_told() -> None:
    engine = make_engine(whole("llama"))
    request, _ = begun(engine)
    engine.close_session(1)
    assert engine.infer([request], {0: 16}) == [None]
    assert (
        difference(tensor(make_engine(whole("llama")).infer([request])[0]), tensor(engine.infer([request])[0])) < 1e-5
    )
    request, _ = begun(engine, past=6)
    engine.close_session(1)
    (error,) = engine.infer([request], {0: 16})
    assert isinstance(error, HubError)
    assert (error.code, error.detail) == (ErrorCode.CACHE_MISS, 0)
    assert (engine.streams, engine.budget.used, engine._streams._works) == (0, 0, {})


def test_another_request_of_the_stream_takes_the_place_of_one_that_was_begun() -> None:
    engine = make_engine(whole("llama"))
    _, states = begun(engine, past=6)
    again = item(states[:, 6:], 6)
    assert difference(tensor(engine.infer([again])[0]), whole_answer("llama", states, 6)) < 1e-5
    assert not engine._streams._works


def test_a_budget_that_does_not_hold_the_whole_request_says_so_at_its_first_piece() -> None:
    engine = make_engine(whole("llama"), kv_bytes=4 * 2 * 64 * (16 + 16) * 4)
    request = item(random_states(1, 100, 0), 0)
    (error,) = engine.infer([request], {0: 10})
    assert isinstance(error, HubError)
    assert error.code is ErrorCode.KV_FULL
    assert (engine.streams, engine.budget.used, engine._streams._works) == (0, 0, {})
    assert engine.infer([item(random_states(1, 60, 0), 0)], {0: 10}) == [None]


def test_a_bad_tensor_is_refused_before_its_first_piece() -> None:
    engine = make_engine(whole("llama"))
    states = random_states(1, 20, 0)
    states[0, 15] = torch.nan
    bad = replace(item(random_states(1, 20, 0), 0), smashed=to_wire(states))
    assert isinstance(engine.infer([bad], {0: 8})[0], NotFinite)
    assert engine.streams == 0
