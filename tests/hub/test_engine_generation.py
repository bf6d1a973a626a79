"""Generation at the hub: streams in one batch, their memory, lost caches, repeated requests, adapter versions."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from blocks import adapters, decoding
from blocks.adapters import Adapter
from blocks.codec import from_wire, to_wire
from blocks.decoding import Way
from blocks.layout import Layout
from blocks.partition import Partition
from blocks.surgery import CutModel
from hub.engine import Engine
from hub.jobs import InferItem, Outcome, Place
from messaging.errors import ErrorCode, HubError, NotFinite, ProtocolError
from messaging.messages import Tensor
from tests.support.models import (
    CONFIGS,
    MORE_CONFIGS,
    Together,
    difference,
    make_edge,
    make_engine,
    middle_of,
    whole_model,
)
from tests.support.training import Unsplit, make_batch, starting_adapter

GREEDY = {"do_sample": False, "eos_token_id": None}
PLACE = Place(1, 5)


@cache
def whole(name: str) -> PreTrainedModel:
    return whole_model({**CONFIGS, **MORE_CONFIGS}[name]())


def prompt(width: int, *lefts: int) -> dict[str, torch.Tensor]:
    """One row for each of `lefts`: how many columns of padding on its left."""
    batch = make_batch(width, width, [(left, 0) for left in lefts])
    return {"input_ids": batch.ids, "attention_mask": batch.mask}


#: partition, prompt and new tokens of each session
SESSIONS = {
    1: (Partition(1, 1), prompt(5, 0), 24),
    2: (Partition(2, 1), prompt(11, 0, 4), 20),
    3: (Partition(1, 3), prompt(3, 0), 28),
    4: (Partition(1, 0), prompt(11, 6), 9),
}


@pytest.fixture
def copies_are_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(weights: list[torch.Tensor], packed: bool) -> dict[decoding.Kind, decoding.Seconds]:
        by_way = {Way.ROWS_FIRST: 2.0, Way.PACKED if packed else Way.WEIGHT_FIRST: 1.0}
        return {(tuple(weight.shape), weight.is_contiguous()): {1: by_way, 128: by_way} for weight in weights}

    monkeypatch.setattr(decoding, "_SMALL_BYTES", 0)
    monkeypatch.setattr(decoding, "try_ways", times)


@pytest.mark.usefixtures("copies_are_fastest")
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_copies_of_the_weights_give_the_same_tokens_and_are_both_adapters_base(name: str) -> None:
    engine = make_engine(whole(name))
    layers = [blocks.cut.layers[0].self_attn.q_proj for blocks in (engine._plain, engine._tuned)]
    assert layers[0].packed is layers[1].base_layer.packed is not None
    together = Together(engine)
    edges = {s: make_edge(whole(name), partition, together, s) for s, (partition, _, _) in SESSIONS.items()}
    settings = {s: {**given, "max_new_tokens": new, **GREEDY} for s, (_, given, new) in SESSIONS.items()}
    tokens = together.run({s: (lambda s=s: edges[s].model.generate(**settings[s])) for s in SESSIONS})
    for session in SESSIONS:
        assert torch.equal(tokens[session], whole(name).generate(**settings[session])), session


@pytest.mark.usefixtures("copies_are_fastest")
def test_without_room_for_them_there_are_no_copies_of_weights() -> None:
    engine = make_engine(whole("llama"), kv_bytes=1 << 10)
    assert engine._plain.cut.layers[0].self_attn.q_proj.packed is None


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "bloom"])
def test_sessions_decode_in_one_batch_and_give_the_tokens_they_give_alone(name: str) -> None:
    """Different lengths, partitions, rows and padding; past mistral's and gemma's sliding window of 8."""
    engine = make_engine(whole(name))
    together = Together(engine)
    edges = {s: make_edge(whole(name), partition, together, s) for s, (partition, _, _) in SESSIONS.items()}
    settings = {s: {**given, "max_new_tokens": new, **GREEDY} for s, (_, given, new) in SESSIONS.items()}
    jobs = {s: (lambda s=s: edges[s].model.generate(**settings[s])) for s in SESSIONS}
    tokens = together.run(jobs)
    for session in SESSIONS:
        assert torch.equal(tokens[session], whole(name).generate(**settings[session])), session
    steps = sum(new for _, _, new in SESSIONS.values())
    if name == "bloom":
        # It hands its keys to no attention function: one stream at a time.
        assert engine.forwards == steps
    else:
        # Prompts of three widths make one forward, as all else.
        assert engine.forwards == max(new for _, _, new in SESSIONS.values())
    assert (engine.streams, engine.budget.used) == (0, 0)


def test_requests_without_a_cache_join_too() -> None:
    engine = make_engine(whole("llama"))
    states = [random_states(2, 6, seed) for seed in (1, 2)]
    items = [item(states[0], 0), replace(item(states[1], 0), session=2, place=Place(2, 3))]
    joined = [tensor(outcome) for outcome in engine.infer(items)]
    assert engine.forwards == 1
    for one, given in zip(items, joined, strict=True):
        assert difference(given, tensor(engine.infer([one])[0])) < 1e-5


# -- requests made by hand -------------------------------------------------------------------------------


def random_states(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, 64, generator=torch.Generator().manual_seed(seed))


def item(
    states: torch.Tensor,
    past: int,
    stream: int = 0,
    order: tuple[int, ...] = (),
    session: int = 1,
    version: int = 0,
    layout: Layout | None = None,
) -> InferItem:
    rows, width, _ = states.shape
    layout = layout or Layout(rows, past, width)
    return InferItem(session, past + 1, stream, PLACE, version, layout, order, to_wire(states))


def tensor(outcome: Outcome) -> torch.Tensor:
    assert isinstance(outcome, Tensor), outcome
    return from_wire(outcome, dtype=torch.float32, shape=(None, None, None))


def refusal(outcome: Outcome) -> tuple[ErrorCode, int]:
    assert isinstance(outcome, HubError), outcome
    return outcome.code, outcome.detail


def ask(engine: Engine, states: torch.Tensor, past: int, **kwargs: object) -> torch.Tensor:
    return tensor(engine.infer([item(states, past, stream=1, **kwargs)])[0])  # type: ignore[arg-type]


def test_a_cache_that_holds_less_is_told_with_what_it_holds() -> None:
    engine = make_engine(whole("llama"))
    states = random_states(1, 8, 0)
    assert refusal(engine.infer([item(states[:, 6:], 6, stream=1)])[0]) == (ErrorCode.CACHE_MISS, 0)
    assert engine.streams == 0, "a stream that was never begun costs nothing"
    ask(engine, states[:, :4], 0)
    assert refusal(engine.infer([item(states[:, 6:], 6, stream=1)])[0]) == (ErrorCode.CACHE_MISS, 4)
    assert refusal(engine.infer([item(random_states(2, 1, 1), 4, stream=1)])[0]) == (ErrorCode.CACHE_MISS, 0)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "bloom"])
def test_rolling_back_forgets_what_came_after(name: str) -> None:
    """`past` smaller than what is held crops the cache, behind a sliding window too."""
    engine = make_engine(whole(name))
    states, wrong = random_states(1, 20, 0), random_states(1, 6, 1)
    once = ask(engine, states, 0)
    ask(engine, states[:, :12], 0)
    ask(engine, wrong, 12)
    again = ask(engine, states[:, 11:], 11)
    assert difference(again, once[:, 11:]) < 1e-5


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
def test_the_same_bytes_replayed_after_a_loss_give_the_same_states(name: str) -> None:
    """Left-padded rows: the layout of the replay is made from that of the request that was missed."""
    engine = make_engine(whole(name))
    states = random_states(2, 15, 0)

    def layout(past: int, width: int) -> Layout:
        mask = torch.ones(2, past + width, dtype=torch.long)
        mask[1, :3] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        return Layout.from_call(2, past, width, mask, positions)

    ask(engine, states[:, :10], 0, layout=layout(0, 10))
    for at in range(10, 14):
        ask(engine, states[:, at : at + 1], at, layout=layout(at, 1))
    last = item(states[:, 14:], 14, stream=1, layout=layout(14, 1))
    wanted = tensor(engine.infer([last])[0])

    engine.close_session(1)
    assert refusal(engine.infer([last])[0]) == (ErrorCode.CACHE_MISS, 0)
    replayed = last.layout.replay(0)
    assert (replayed.past, replayed.width) == (0, 14)
    ask(engine, states[:, :14], 0, layout=replayed)
    assert difference(tensor(engine.infer([last])[0]), wanted) < 1e-5

    ask(engine, states[:, :9], 0, layout=layout(0, 9))
    assert refusal(engine.infer([last])[0]) == (ErrorCode.CACHE_MISS, 9)
    ask(engine, states[:, 9:14], 9, layout=last.layout.replay(9))
    assert difference(tensor(engine.infer([last])[0]), wanted) < 1e-5


def test_a_hub_that_forgets_in_the_middle_of_generating_is_not_noticed() -> None:
    """The edge replays the bytes that it sent, also those whose rows beam search has put in another order."""
    engine = make_engine(whole("llama"))
    edge = make_edge(whole("llama"), Partition(1, 1), engine)
    given = {**prompt(9, 0, 3), "max_new_tokens": 16, **GREEDY, "num_beams": 3}
    wanted = edge.model.generate(**given)
    middle, sent = middle_of(edge), {}
    plain = middle.infer

    def forgetful(smashed: torch.Tensor, layout: Layout, stream: int, order: tuple[int, ...]) -> torch.Tensor:
        before = sent.get("states")
        if before is not None:
            before = before[list(order)] if order else before
        states = smashed if before is None else torch.cat([before, smashed], 1)
        sent["states"] = states
        if layout.past and layout.past % 5 == 0:
            engine.close_session(1)
            with pytest.raises(HubError):
                plain(smashed, layout, stream, order)
            plain(states[:, : layout.past], layout.replay(0), stream, ())
            order = ()
        return plain(smashed, layout, stream, order)

    middle.infer = forgetful  # type: ignore[method-assign]
    assert torch.equal(edge.model.generate(**given), wanted)


def test_a_repeated_request_with_a_new_row_order_is_not_carried_out_twice() -> None:
    engine = make_engine(whole("llama"))
    start, more = random_states(3, 5, 0), random_states(3, 1, 1)
    ask(engine, start, 0)
    moved = item(more, 5, stream=1, order=(2, 2, 0))
    first = tensor(engine.infer([moved])[0])
    assert refusal(engine.infer([moved])[0]) == (ErrorCode.CACHE_MISS, 0)
    ask(engine, start[[2, 2, 0]], 0)
    assert difference(ask(engine, more, 5), first) < 1e-5
    unmoved = ask(engine, more, 5)
    assert difference(unmoved, first) < 1e-5, "without a row order a repetition is harmless"


def test_a_row_order_may_change_the_number_of_rows() -> None:
    engine = make_engine(whole("llama"))
    start, more = random_states(1, 5, 0), random_states(3, 1, 1)
    ask(engine, start, 0)
    grown = ask(engine, more, 5, order=(0, 0, 0))
    assert difference(grown[1:2], ask(make_engine_with(start), more[1:2], 5)) < 1e-5
    for order in [(0, 1, 3), (0, 1)]:
        given = item(random_states(3, 1, 2), 6, stream=1, order=order)
        assert refusal(engine.infer([given])[0]) == (ErrorCode.CACHE_MISS, 0)


def make_engine_with(states: torch.Tensor) -> Engine:
    engine = make_engine(whole("llama"))
    ask(engine, states, 0)
    return engine


def test_bad_requests_are_refused_and_do_not_touch_the_others() -> None:
    engine = make_engine(whole("llama"))
    good = item(random_states(1, 4, 0), 0, stream=1)
    broken = replace(item(torch.full((1, 4, 64), torch.nan), 0, stream=2))
    past_without_stream = item(random_states(1, 4, 1), 3)
    wrong_size = replace(good, stream=3, smashed=to_wire(torch.zeros(1, 4, 63)))
    outcomes = engine.infer([good, broken, past_without_stream, wrong_size, good])
    assert difference(tensor(outcomes[0]), ask(engine, random_states(1, 4, 0), 0)) < 1e-6
    assert isinstance(outcomes[1], NotFinite)
    assert isinstance(outcomes[2], ProtocolError)
    assert isinstance(outcomes[3], ProtocolError)
    assert refusal(outcomes[4])[0] is ErrorCode.BUSY
    assert engine.streams == 1


# -- memory ----------------------------------------------------------------------------------------------

#: bytes of one stream of one row, up to 64 positions: layers 1 to 4, two heads of 16, keys and values, float32
STREAM_BYTES = 4 * 2 * 64 * (16 + 16) * 4


def test_a_full_cache_refuses_one_stream_and_leaves_the_others() -> None:
    engine = make_engine(whole("llama"), kv_bytes=2 * STREAM_BYTES)
    states = [random_states(1, 60, seed) for seed in range(3)]
    first, second, third = engine.infer([item(s, 0, stream=1, session=i) for i, s in enumerate(states, 1)])
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    assert refusal(third)[0] is ErrorCode.KV_FULL
    assert (engine.streams, engine.budget.used) == (2, 2 * STREAM_BYTES)

    growing = engine.infer([item(random_states(1, 8, 9), 60, stream=1, session=2)])
    assert refusal(growing[0])[0] is ErrorCode.KV_FULL
    assert (engine.streams, engine.budget.used) == (1, STREAM_BYTES), "what the refused stream held is given back"
    more = random_states(1, 4, 8)
    with_room = make_engine(whole("llama"))
    ask(with_room, states[0], 0)
    assert difference(ask(engine, more, 60), ask(with_room, more, 60)) < 1e-5
    assert isinstance(engine.infer([item(states[2], 0, stream=1, session=3)])[0], Tensor)


def test_new_row_orders_are_paid_for() -> None:
    engine = make_engine(whole("llama"), kv_bytes=3 * STREAM_BYTES)
    ask(engine, random_states(1, 60, 0), 0)
    assert engine.budget.used == STREAM_BYTES
    ask(engine, random_states(3, 1, 1), 60, order=(0, 0, 0))
    assert engine.budget.used == 3 * STREAM_BYTES
    ask(engine, random_states(2, 1, 1), 61, order=(0, 2))
    assert engine.budget.used == 2 * STREAM_BYTES
    too_many = item(random_states(4, 1, 1), 62, stream=1, order=(0, 0, 0, 1))
    assert refusal(engine.infer([too_many])[0])[0] is ErrorCode.KV_FULL
    assert (engine.streams, engine.budget.used) == (0, 0)


def test_bytes_in_use_are_those_of_the_buffers_and_return_to_zero() -> None:
    engine = make_engine(whole("gpt2"))
    for stream in (1, 2, 3):
        states = random_states(stream, 70, stream)
        engine.infer([replace(item(states, 0), stream=stream)])
        engine.infer([replace(item(random_states(stream, 1, 0), 70), stream=stream)])
    held = sum(
        layer.keys.nbytes + layer.values.nbytes
        for stream in engine._streams._caches.values()
        for layer in stream.layers
        if layer.is_initialized
    )
    assert engine.budget.used == held > 0
    engine.close_stream(1, 2)
    engine.close_stream(1, 99)
    assert engine.streams == 2
    engine.close_session(1)
    assert (engine.streams, engine.budget.used) == (0, 0)


# -- adapter versions ------------------------------------------------------------------------------------


def adapter_of(seed: int, name: str) -> Adapter:
    spec = adapters.make_spec(whole(name).config, 4, 8)
    adapter = starting_adapter(whole(name), spec)
    return {key: value * (1 + 0.2 * seed) for key, value in adapter.items()}


def unsplit_tokens(name: str, adapter: Adapter, given: dict[str, torch.Tensor]) -> torch.Tensor:
    spec = adapters.make_spec(whole(name).config, 4, 8)
    model = Unsplit(whole(name), spec, adapter, torch.optim.SGD, lr=0.0).model
    return model.generate(**given, max_new_tokens=16, **GREEDY)


def edge_with(engine: Engine, name: str, version: int, adapter: Adapter) -> CutModel:
    edge = make_edge(whole(name), Partition(1, 1), engine)
    adapters.inject(edge, adapters.make_spec(whole(name).config, 4, 8))
    adapters.write(edge, adapter)
    middle_of(edge).version = version
    return edge


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_session_keeps_the_version_it_began_with(name: str) -> None:
    engine, given = make_engine(whole(name)), prompt(7, 0)
    one, two = adapter_of(1, name), adapter_of(2, name)
    engine.publish(1, one, set())
    old = edge_with(engine, name, 1, one)
    wanted = old.model.generate(**given, max_new_tokens=16, **GREEDY)
    assert torch.equal(wanted, unsplit_tokens(name, one, given))

    engine.publish(2, two, {1})
    engine.set_trained(adapter_of(5, name))
    new = edge_with(engine, name, 2, two)
    assert torch.equal(old.model.generate(**given, max_new_tokens=16, **GREEDY), wanted)
    assert torch.equal(new.model.generate(**given, max_new_tokens=16, **GREEDY), unsplit_tokens(name, two, given))


def test_a_version_that_nobody_holds_is_dropped() -> None:
    engine = make_engine(whole("llama"))
    states = random_states(1, 4, 0)
    for version in (1, 2, 3):
        engine.publish(version, adapter_of(version, "llama"), {1})
    outcomes = engine.infer([item(states, 0, version=version) for version in range(4)])
    assert [isinstance(outcome, Tensor) for outcome in outcomes] == [False, True, False, True]
    assert refusal(outcomes[2])[0] is ErrorCode.BEHIND
    assert difference(tensor(outcomes[1]), tensor(outcomes[3])) > 1e-3


def test_publishing_leaves_training_as_it_was() -> None:
    engine = make_engine(whole("llama"))
    trained = adapter_of(4, "llama")
    engine.set_trained(trained)
    moments = copy.deepcopy(engine.optimizer.state())
    engine.publish(1, adapter_of(1, "llama"), set())
    engine.publish(2, adapter_of(2, "llama"), set())
    assert all(torch.equal(value, trained[name]) for name, value in engine.trained().items())
    assert engine.optimizer.state().keys() == moments.keys()
    live = adapters.parameters(engine._tuned.cut, "training_copy")
    assert all(parameter.requires_grad for parameter in live.values())


def test_the_hubs_layers_multiply_as_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_SMALL_BYTES", 0)
    engine = make_engine(whole("llama"))
    plain, tuned = (blocks.cut.layers[0].mlp.up_proj for blocks in (engine._plain, engine._tuned))
    assert plain.ways == tuned.base_layer.ways != ()
