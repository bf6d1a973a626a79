"""Prompts that an edge sends again: the hub computes their first columns once, and tells no other edge."""

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
from hub.prefixes import BLOCK
from messaging.messages import Tensor
from tests.support.models import CONFIGS, difference, make_engine, whole_model

#: bytes of one column: layers 1 to 4, two heads of 16, keys and values, float32; and its hidden state of 64
KV, HIDDEN = 4 * 2 * (16 + 16) * 4, 64 * 4


@cache
def whole() -> PreTrainedModel:
    return whole_model(CONFIGS["llama"]())


def random_states(width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, width, 64, generator=torch.Generator().manual_seed(seed))


def item(states: torch.Tensor, stream: int = 1, past: int = 0, owner: str = "edge", session: int = 1) -> InferItem:
    width = states.shape[1]
    return InferItem(
        session, 1, stream, Place(1, 5), 0, Layout(1, past, width), (), to_wire(states.clone()), owner
    )  # fmt: skip


def tensor(outcome: Outcome | None) -> torch.Tensor:
    assert isinstance(outcome, Tensor), outcome
    return from_wire(outcome, dtype=torch.float32, shape=(None, None, None))


def ask(engine: Engine, asked: InferItem) -> torch.Tensor:
    return tensor(engine.infer([asked])[0])


def reused(engine: Engine) -> int:
    return engine._streams.prefixes.reused


def sent_twice(states: torch.Tensor, **kwargs: int) -> Engine:
    """An engine that saw a prompt twice; both streams are closed again."""
    engine = make_engine(whole(), **kwargs)
    for stream in (1, 2):
        ask(engine, item(states, stream))
        engine.close_stream(1, stream)
    return engine


def test_what_is_sent_a_third_time_is_not_computed_again() -> None:
    states, more = random_states(2 * BLOCK + 10), random_states(1, 1)
    engine, alone = sent_twice(states), make_engine(whole())
    assert reused(engine) == 0
    wanted = ask(alone, item(states))
    assert difference(ask(engine, item(states, 3)), wanted) < 1e-5
    assert reused(engine) == 2 * BLOCK
    past = states.shape[1]
    assert difference(ask(engine, item(more, 3, past)), ask(alone, item(more, 1, past))) < 1e-5


def test_a_prompt_of_whole_blocks_needs_no_forward_at_all() -> None:
    states = random_states(BLOCK)
    engine = sent_twice(states)
    before = engine.forwards
    assert difference(ask(engine, item(states, 3)), ask(make_engine(whole()), item(states))) < 1e-5
    assert engine.forwards == before


def test_pieces_go_on_behind_what_is_known() -> None:
    states = random_states(2 * BLOCK + 10)
    engine, asked = sent_twice(states), item(states, 3)
    before = engine.forwards
    assert engine.infer([asked], {0: BLOCK}) == [None]
    assert engine.forwards == before
    assert difference(ask(engine, asked), ask(make_engine(whole()), item(states))) < 1e-5


def test_another_prompt_that_begins_alike_takes_over_what_is_alike() -> None:
    states = random_states(3 * BLOCK)
    engine = sent_twice(states)
    other = torch.cat([states[:, : BLOCK + 5], random_states(2 * BLOCK, 2)], dim=1)
    wanted = ask(make_engine(whole()), item(other))
    assert difference(ask(engine, item(other, 3)), wanted) < 1e-5
    assert reused(engine) == BLOCK


@pytest.mark.parametrize(
    "change",
    [{"owner": "another"}, {"owner": ""}, {"place": Place(2, 5)}, {"layout": Layout(1, 0, 2 * BLOCK, 0, ((3,),))}],
    ids=["edge", "nobody", "place", "padding"],
)
def test_what_is_not_the_same_is_computed(change: dict[str, object]) -> None:
    """Another edge with the same bytes too: it could tell from the time that they were sent before."""
    states = random_states(2 * BLOCK)
    engine, asked = sent_twice(states), replace(item(states, 3, session=2), **change)  # type: ignore[arg-type]
    assert difference(ask(engine, asked), ask(make_engine(whole()), asked)) < 1e-5
    assert reused(engine) == 0


def test_another_version_is_computed() -> None:
    states = random_states(BLOCK)
    engine = sent_twice(states)
    engine.publish(1, {name: value + 0.05 for name, value in engine.trained().items()}, {0})
    asked = replace(item(states, 3), version=1)
    assert difference(ask(engine, asked), ask(engine, item(states, 4))) > 1e-3


def test_noise_that_never_repeats_leaves_nothing_behind() -> None:
    engine = make_engine(whole())
    for stream in range(1, 4):
        ask(engine, item(random_states(2 * BLOCK, stream), stream))
        engine.close_stream(1, stream)
    assert (len(engine._streams.prefixes), engine.budget.used) == (0, 0)


def test_its_bytes_are_counted_once_and_go_with_the_edges_last_session() -> None:
    states = random_states(2 * BLOCK + 10)
    engine = sent_twice(states)
    size = 2 * BLOCK * (KV + HIDDEN)
    assert engine.budget.used == size
    longer = torch.cat([states[:, : 2 * BLOCK], random_states(BLOCK, 5)], dim=1)
    for stream in (3, 4, 5):
        ask(engine, item(longer, stream, session=2))
        engine.close_stream(2, stream)
    assert engine.budget.used == size // 2 * 3, "the longer one has the shorter one inside"
    assert reused(engine) == (2 + 2 + 3) * BLOCK
    engine.close_session(1)
    assert engine.budget.used == size // 2 * 3
    engine.close_session(2)
    assert (engine.budget.used, len(engine._streams.prefixes), engine._streams.prefixes._where) == (0, 0, {})


def test_streams_have_its_room_when_they_need_it() -> None:
    states = random_states(2 * BLOCK)
    engine = sent_twice(states, kv_bytes=310 * KV)
    assert engine.budget.used == 2 * BLOCK * (KV + HIDDEN)
    wanted = ask(make_engine(whole()), item(random_states(250, 7)))
    assert difference(ask(engine, item(random_states(250, 7), 3)), wanted) < 1e-5
    assert len(engine._streams.prefixes) == 0
    assert engine.budget.used == 272 * KV


def test_nothing_is_kept_where_there_is_no_room_for_it() -> None:
    states = random_states(2 * BLOCK)
    engine = make_engine(whole(), kv_bytes=150 * KV)
    for stream in (1, 2, 3):
        ask(engine, item(states, stream))
        engine.close_stream(1, stream)
    assert (engine.budget.used, reused(engine)) == (0, 0)
