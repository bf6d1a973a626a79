"""Noise off, float32: the split model is the unsplit one, in logits, tokens, gradients and trained adapters."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from blocks import adapters
from blocks.adapters import Adapter
from blocks.partition import Partition
from blocks.surgery import CutModel
from hub.aggregate import Contribution, weighted_mean
from hub.engine import Engine
from tests.support.models import (
    CONFIGS,
    LAYERS,
    MORE_CONFIGS,
    VOCAB,
    Together,
    difference,
    make_edge,
    make_engine,
    make_schedule,
    middle_of,
    whole_model,
)
from tests.support.training import (
    Batch,
    TrainingEdge,
    Unsplit,
    make_batch,
    record_gradients,
    starting_adapter,
    summed_loss,
    union,
    use_sgd,
)

CLOSE = 1e-5
PARTITIONS = [Partition(1, 0), Partition(1, 1), Partition(2, 1), Partition(1, 3)]
#: (left, right) padding of three rows of 12 columns
PADDINGS = {
    "none": [(0, 0), (0, 0), (0, 0)],
    "left": [(0, 0), (3, 0), (7, 0)],
    "right": [(0, 0), (0, 3), (0, 7)],
}
WIDTH = 12
GREEDY = {"do_sample": False, "eos_token_id": None}


@cache
def whole(name: str) -> PreTrainedModel:
    return whole_model({**CONFIGS, **MORE_CONFIGS}[name]())


@cache
def engine(name: str) -> Engine:
    return make_engine(whole(name))


@cache
def edge(name: str, partition: Partition) -> CutModel:
    """All partitions of a model share its engine, as edges of different partitions share a hub."""
    return make_edge(whole(name), partition, engine(name))


@cache
def prompt(padding: str) -> dict[str, torch.Tensor]:
    batch = make_batch(7, WIDTH, PADDINGS[padding])
    return {"input_ids": batch.ids} if padding == "none" else {"input_ids": batch.ids, "attention_mask": batch.mask}


@cache
def greedy_of_whole(name: str, padding: str, length: int) -> torch.Tensor:
    return whole(name).generate(**prompt(padding), max_new_tokens=length, **GREEDY)


def assert_logits_equal(name: str, partition: Partition, padding: str) -> None:
    given = prompt(padding)
    with torch.no_grad():
        wanted = whole(name)(**given).logits
        split = edge(name, partition).model(**given).logits
    real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    assert difference(split[real], wanted[real]) < CLOSE


@pytest.fixture(autouse=True)
def memory_is_given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every stream that a test opens is closed when its cache is dropped."""
    yield
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    if name:
        if engine(name).streams:
            gc.collect()
        assert (engine(name).streams, engine(name).budget.used) == (0, 0)


# -- forward ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_unsplit_models(name: str, partition: Partition, padding: str) -> None:
    assert_logits_equal(name, partition, padding)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "qwen3"])
def test_packed_rows_keep_their_sequences_apart(name: str) -> None:
    """Position ids that start over cross as segments, and the hub's mask keeps them apart."""
    ids = make_batch(3, WIDTH, PADDINGS["none"]).ids
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None].repeat(3, 1)
    positions[1] = torch.cat([torch.arange(9), torch.arange(3)])
    with torch.no_grad():
        wanted = whole(name)(ids, position_ids=positions, use_cache=False).logits
        plain = whole(name)(ids, use_cache=False).logits
        split = edge(name, Partition(2, 1)).model(ids, position_ids=positions, use_cache=False).logits
    assert difference(split, wanted) < CLOSE
    assert difference(plain, wanted) > 0.01


# -- generation ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_identical(name: str, padding: str) -> None:
    wanted = greedy_of_whole(name, padding, 64)
    assert wanted.shape[1] == WIDTH + 64
    for partition in PARTITIONS:
        tokens = edge(name, partition).model.generate(**prompt(padding), max_new_tokens=64, **GREEDY)
        assert torch.equal(tokens, wanted), partition


DECODING = {
    "beams": {"num_beams": 3, "do_sample": False, "max_new_tokens": 24},
    "beams-returned": {"num_beams": 4, "num_return_sequences": 3, "do_sample": False, "max_new_tokens": 16},
    "sampled": {"do_sample": True, "temperature": 1.3, "num_return_sequences": 3, "max_new_tokens": 16},
}


@pytest.mark.slow
@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "gpt_neox"])
def test_other_decoding_gives_identical_tokens(name: str, decoding: str) -> None:
    results = []
    for model in (whole(name), edge(name, Partition(2, 1)).model):
        torch.manual_seed(11)
        results.append(model.generate(**prompt("left"), eos_token_id=None, **DECODING[decoding]))
    assert torch.equal(*results)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "opt"])
def test_assisted_decoding_gives_identical_tokens(name: str) -> None:
    """Prompt lookup offers several tokens at once and crops the cache where they were wrong."""
    repeating = torch.tensor([[5, 6, 7, 8] * 4])
    given = {"input_ids": repeating, "prompt_lookup_num_tokens": 3, "max_new_tokens": 40, **GREEDY}
    split = edge(name, Partition(1, 1))
    middle_of(split).layouts.clear()
    assert torch.equal(split.model.generate(**given), whole(name).generate(**given))
    pasts = [layout.past for layout in middle_of(split).layouts]
    assert any(layout.width > 1 for layout in middle_of(split).layouts[1:])
    assert len(pasts) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_CONFIGS)
def test_more_architectures(name: str) -> None:
    """Layers that return tuples, ALiBi, mixtures of experts, multipliers."""
    for padding in PADDINGS:
        assert_logits_equal(name, Partition(2, 1), padding)
    tokens = edge(name, Partition(2, 1)).model.generate(**prompt("left"), max_new_tokens=32, **GREEDY)
    assert torch.equal(tokens, greedy_of_whole(name, "left", 32))


# -- training: one edge ----------------------------------------------------------------------------------

#: (left, right) padding of three rows of 14 columns
ROWS = [(0, 0), (3, 0), (0, 4)]


class OneEdge:
    """An edge at a hub of its own, and peft on the unsplit model, both at the same adapter."""

    def __init__(self, name: str, partition: Partition, start: Adapter | None = None) -> None:
        model = whole(name)
        spec = adapters.make_spec(model.config, 4, 8)
        start = start or adapters.initial(model.config, spec, seed=0)
        self.hub = make_engine(model, spec)
        self.hub.set_trained(start)
        self.edge = TrainingEdge(model, partition, self.hub, spec, start)
        self.unsplit = Unsplit(model, spec, start, torch.optim.AdamW, lr=1e-3, eps=1e-5, weight_decay=0.0)

    @property
    def adapter(self) -> Adapter:
        return {**self.hub.trained(), **adapters.read(self.edge.cut)}


def one_partition(name: str) -> Partition:
    """All four partitions in turn, over the architectures."""
    return PARTITIONS[list({**CONFIGS, **MORE_CONFIGS}).index(name) % 4]


def assert_close(given: Adapter, wanted: Adapter) -> None:
    """Each tensor by itself within CLOSE of the wanted one."""
    assert given.keys() == wanted.keys()
    worst = max(wanted, key=lambda name: difference(given[name], wanted[name]))
    assert difference(given[worst], wanted[worst]) < CLOSE, worst


@pytest.mark.parametrize(
    ("name", "partition"),
    [
        *[(name, one_partition(name)) for name in CONFIGS],
        *[("llama", p) for p in PARTITIONS[1:]],
        ("mixtral", PARTITIONS[2]),
    ],
    ids=str,
)
def test_gradients_equal_pefts(name: str, partition: Partition) -> None:
    model = whole(name)
    side = OneEdge(name, partition, starting_adapter(model, adapters.make_spec(model.config, 4, 8)))
    edges, hubs = record_gradients(side.edge.optimizer), record_gradients(side.hub.optimizer)
    batch = make_batch(0, 14, ROWS)
    loss = side.edge.step(batch)
    assert loss == pytest.approx(side.unsplit.step(batch), rel=CLOSE)
    assert not edges.keys() & hubs.keys()
    assert_close({**edges, **hubs}, side.unsplit.gradients)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_after_20_steps_equal_pefts(name: str) -> None:
    """AdamW from the real initial adapter.

    The edge sends the gradient of the summed loss and both sides divide by the tokens, where plain peft derives
    the mean loss: equal but for float32 rounding. Adam divides by the gradient's own size, and so turns
    roundings of the smallest gradients into up to 5e-5 of the largest entry of a tensor that began at zero. So
    each tensor is held against peft with the same division, and the adapter as a whole against the mean loss.
    """
    side = OneEdge(name, one_partition(name))
    divided = OneEdge(name, one_partition(name)).unsplit
    for step in range(20):
        batch = make_batch(step, 14, ROWS)
        side.edge.step(batch)
        side.unsplit.step(batch)
        divided.step(batch, by_sum=True)
    assert_close(side.adapter, divided.adapter)
    assert difference(flat(side.adapter), flat(side.unsplit.adapter)) < CLOSE


def flat(adapter: Adapter) -> torch.Tensor:
    return torch.cat([adapter[name].flatten() for name in sorted(adapter)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_half_precision_weights_train_float32_adapters(name: str, dtype: torch.dtype) -> None:
    """No claim of equality: the loss is the float32 model's to half precision, and adapters take small steps."""
    model = whole(name)
    spec = adapters.make_spec(model.config, 4, 8)
    start = starting_adapter(model, spec)
    hub = make_engine(model, spec, dtype=dtype)
    hub.set_trained(start)
    side = TrainingEdge(model, Partition(1, 1), hub, spec, start)
    batch = make_batch(0, 14, ROWS)
    with torch.no_grad():
        wanted = float(summed_loss(OneEdge(name, Partition(1, 1), start).unsplit.model, batch)) / batch.tokens
    assert side.step(batch) == pytest.approx(wanted, rel=1e-2)
    after = {**hub.trained(), **adapters.read(side.cut)}
    assert all(1e-6 < float((after[key] - start[key]).abs().max()) < 2e-3 for key in start)


def test_training_and_inference_of_one_model_do_not_mix() -> None:
    """Evaluation between steps goes the way of inference, and leaves no trace in the next step."""
    side, other = OneEdge("gpt2", Partition(1, 1)), OneEdge("gpt2", Partition(1, 1))
    for step in range(2):
        batch = make_batch(step, 14, ROWS)
        side.edge.step(batch)
        other.edge.step(batch)
        with torch.no_grad():
            summed_loss(side.edge.cut.model, batch)
        summed_loss(side.edge.cut.model, batch)
    assert len(middle_of(side.edge.cut).layouts) == 4
    assert all(torch.equal(side.adapter[name], other.adapter[name]) for name in side.adapter)


# -- training: two edges, one hub --------------------------------------------------------------------------


class TwoEdges:
    """Two edges with partitions 2:1 and 1:3 at one hub, and the unsplit model, all at the same adapter."""

    partitions = (Partition(2, 1), Partition(1, 3))

    def __init__(self, name: str, lr: float) -> None:
        model = whole(name)
        spec = adapters.make_spec(model.config, 4, 8)
        start = starting_adapter(model, spec)
        self.hub = make_engine(model, spec, make_schedule(lr))
        self.hub.set_trained(start)
        self.together = Together(self.hub)
        self.edges = {
            session: TrainingEdge(model, partition, self.together, spec, start, session, make_schedule(lr))
            for session, partition in enumerate(self.partitions, 1)
        }
        for optimizer in (self.hub.optimizer, *(edge.optimizer for edge in self.edges.values())):
            use_sgd(optimizer)
        self.unsplit = Unsplit(model, spec, start, torch.optim.SGD, lr=lr)

    @staticmethod
    def batches(seed: int) -> dict[int, Batch]:
        return {1: make_batch(seed, 14, ROWS), 2: make_batch(100 + seed, 9, [(2, 0), (0, 1)])}

    def step(self, batches: dict[int, Batch]) -> None:
        """One joined step of both edges, and one of the unsplit model on the union of their batches."""
        self.together.run({s: lambda s=s: self.edges[s].step(batches[s]) for s in self.edges})  # type: ignore[misc]
        self.unsplit.step(union(list(batches.values())))

    def hub_tokens(self) -> dict[str, int]:
        return {name: self.hub.layer_tokens[adapters.layer_of(name, self.hub.names)] for name in self.hub.trained()}


@pytest.mark.parametrize("name", [*CONFIGS, "bloom", "mixtral"])
def test_gradients_of_two_edges_are_the_unions(name: str) -> None:
    """Token-weighted over all who train a layer: each edge's A and C, and the hub's B."""
    side = TwoEdges(name, lr=1e-3)
    batches = side.batches(0)
    by_edge = {session: record_gradients(edge.optimizer) for session, edge in side.edges.items()}
    by_hub = record_gradients(side.hub.optimizer)
    side.step(batches)
    parts = [Contribution(g, dict.fromkeys(g, batches[s].tokens)) for s, g in by_edge.items()]
    parts.append(Contribution(by_hub, side.hub_tokens()))
    zeros = {name: torch.zeros_like(g) for name, g in side.unsplit.gradients.items()}
    assert batches[1].tokens != batches[2].tokens
    assert_close(weighted_mean(zeros, parts), side.unsplit.gradients)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_sgd_with_one_step_rounds_is_training_on_the_union(name: str) -> None:
    side = TwoEdges(name, lr=0.1)
    merged = start = side.unsplit.adapter
    for step in range(20):
        batches = side.batches(step)
        side.step(batches)
        parts = [edge.contribution(batches[session].tokens) for session, edge in side.edges.items()]
        merged = weighted_mean(merged, [*parts, Contribution(side.hub.trained(), side.hub_tokens())])
        side.hub.begin_round(0, merged, ())
        for edge_ in side.edges.values():
            adapters.write(edge_.cut, merged)
    assert_close(merged, side.unsplit.adapter)
    assert difference(flat(merged), flat(start)) > 1000 * CLOSE


def test_two_edges_make_one_forward_in_which_rows_come_and_go() -> None:
    side = TwoEdges("llama", lr=1e-3)
    rows: dict[int, list[int]] = {}
    for layer, module in enumerate(side.hub._tuned.cut.layers, 1):
        module.self_attn.register_forward_hook(  # type: ignore[union-attr]
            lambda _module, _args, output, layer=layer: rows.setdefault(layer, []).append(len(output[0]))
        )
    side.step(side.batches(0))
    assert side.hub.forwards == 1
    # 2:1 gives three rows to layers 2 to 4, 1:3 two rows to layers 1 and 2 (of 0 to 5)
    assert rows == {1: [2], 2: [5], 3: [3], 4: [3]}
    n = {session: batch.tokens for session, batch in side.batches(0).items()}
    assert side.hub.layer_tokens == [0, n[2], n[1] + n[2], n[1], n[1], 0]
    assert len(side.hub.layer_tokens) == LAYERS


def test_prompts_of_the_fixtures_are_unequal_and_inside_the_vocabulary() -> None:
    lengths = {tuple(prompt(padding)["attention_mask"].sum(1).tolist()) for padding in ("left", "right")}
    assert lengths == {(12, 9, 5)}
    assert int(prompt("left")["input_ids"].max()) < VOCAB
