"""A step in micro-batches: the same step, whatever comes when; and what ends one in its middle."""

from __future__ import annotations

from concurrent.futures import Future
from threading import Timer
from typing import Any, cast

import pytest
import torch

import messaging.messages as m
from blocks import adapters
from blocks.adapters import Adapter
from blocks.halves import Halves
from blocks.layout import Layout
from blocks.partition import Partition
from edge.data import Batch
from edge.middle import HubMiddle, Part
from edge.noise import GaussianNoise
from edge.pipeline import Pipeline, split
from messaging.errors import LinkLost, NotFinite
from tests.support.models import CONFIGS, MORE_CONFIGS, make_engine, whole_model
from tests.support.training import Batch as Rows
from tests.support.training import TrainingEdge, Unsplit, make_batch, starting_adapter

PADDINGS = [(3, 0), (0, 2), (0, 0), (1, 1)]


def edge_of(name: str, partition: Partition = Partition(2, 1)) -> tuple[TrainingEdge, Unsplit]:  # noqa: B008
    """A split model and the unsplit one with peft, both at the same adapter in the middle of training."""
    model = whole_model((CONFIGS | MORE_CONFIGS)[name]())
    spec = adapters.make_spec(model.config, 4, 8)
    start = starting_adapter(model, spec)
    hub = make_engine(model, spec)
    hub.set_trained(start)
    unsplit = Unsplit(model, spec, start, torch.optim.AdamW, lr=1e-3, eps=1e-5, weight_decay=0.0)
    return TrainingEdge(model, partition, hub, spec, start), unsplit


def trained(edge: TrainingEdge) -> Adapter:
    middle = cast(Any, edge.cut.layers[2]).middle
    return {**middle.hub.engine.trained(), **adapters.read(edge.cut)}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "mixtral"])
def test_micro_batches_take_the_step_of_the_whole_batch_and_of_the_unsplit_model(name: str) -> None:
    whole, unsplit = edge_of(name)
    parts, _ = edge_of(name)
    for number in range(3):
        batch = make_batch(number, 12, PADDINGS)
        loss = unsplit.step(batch)
        assert whole.step(batch) == pytest.approx(loss, rel=1e-5)
        assert parts.step(batch, micros=4) == pytest.approx(loss, rel=1e-5)
    wanted = unsplit.adapter
    for found in (trained(whole), trained(parts)):
        assert max(float((found[key] - wanted[key]).abs().max()) for key in wanted) < 2e-5


def test_how_many_are_under_way_changes_no_bit() -> None:
    found = []
    for window in (1, 2, 4):
        edge, _ = edge_of("llama")
        for number in range(2):
            edge.step(make_batch(number, 12, PADDINGS), micros=4, window=window)
        found.append(trained(edge))
    assert all(torch.equal(found[0][key], other[key]) for other in found[1:] for key in found[0])


def test_the_halves_are_the_whole() -> None:
    """Also where A's layers return tuples, and with the layers' own forwards put back."""
    for name in ("llama", "gptj"):
        edge, _ = edge_of(name)
        batch = Batch(torch.arange(3, 11).view(2, 4), torch.zeros(2, 4, dtype=torch.int64), None, None, 6)
        model = edge.cut.model
        halves, call = Halves(edge.cut), lambda m=model, b=batch: m(input_ids=b.input_ids, use_cache=False).logits
        with torch.no_grad():
            wanted = call()
            first = halves.first(call)
            hidden = cast(Any, edge.cut.layers[2]).middle.infer(first.smashed, first.layout, 0, ())
            assert torch.equal(halves.second(hidden, call), wanted)
            assert torch.equal(call(), wanted)


def test_rows_are_split_evenly_and_no_token_is_lost() -> None:
    rows = make_batch(0, 9, [*PADDINGS, (2, 2)])
    batch = Batch(rows.ids, rows.labels, rows.mask, None, rows.tokens)
    parts = split(batch, 3)
    assert [part.input_ids.shape[0] for part in parts] == [1, 2, 2]
    assert sum(part.tokens for part in parts) == batch.tokens
    assert torch.equal(torch.cat([cast(torch.Tensor, part.attention_mask) for part in parts]), rows.mask)
    assert len(split(batch, 16)) == 5


class Hub:
    """Answers what it gets, after a while; `fails` ends the request of that kind and micro-batch instead."""

    def __init__(self, fails: tuple[str, int] | None = None, error: Exception | None = None) -> None:
        self.fails, self.error = fails, error
        self.sent: list[tuple[str, int, bytes]] = []

    def send_smashed(self, part: Part, smashed: torch.Tensor, layout: Layout) -> Future[m.AnyMessage]:
        return self._answer("forward", part, smashed, lambda t: m.StepHidden(part.step, t, part.micro))

    def send_gradient(self, part: Part, gradient: torch.Tensor) -> Future[m.AnyMessage]:
        return self._answer("backward", part, gradient, lambda t: m.StepGrad(part.step, 0, 0, 0, t, part.micro))

    def may_be_under_way(self, smashed: torch.Tensor) -> int:
        return 16

    def _answer(self, kind: str, part: Part, tensor: torch.Tensor, word: Any) -> Future[m.AnyMessage]:
        data = tensor.detach().contiguous().numpy().tobytes()
        self.sent.append((kind, part.micro, data))
        future: Future[m.AnyMessage] = Future()
        if self.fails == (kind, part.micro):
            future.set_exception(cast(Exception, self.error))
        else:
            answer = word(m.Tensor("f32", tuple(tensor.shape), (data,)))
            # The later, the sooner: nothing may depend on the order in which answers come.
            Timer(0.02 * (4 - part.micro), future.set_result, [answer]).start()
        return future


def pipeline_with(hub: Hub, noise: float = 0.0) -> tuple[Pipeline, TrainingEdge]:
    edge, _ = edge_of("llama")
    drawn = GaussianNoise(noise, b"secret")
    cast(Any, edge.cut.layers[2]).noise = drawn
    return Pipeline(edge.cut, cast(HubMiddle, hub), drawn, 16), edge


def batches(rows: Rows) -> list[Batch]:
    return split(Batch(rows.ids, rows.labels, rows.mask, None, rows.tokens), 4)


def test_a_step_that_is_repeated_sends_the_same_bytes_with_noise_of_its_own_for_each_micro_batch() -> None:
    sent = []
    for fails in (("forward", 2), ("backward", 1), None):
        hub = Hub(fails, LinkLost("the session ended"))
        pipeline, edge = pipeline_with(hub, noise=0.5)
        same = make_batch(0, 12, [(0, 0)] * 4)
        rows = Rows(same.ids[:1].repeat(4, 1), same.mask, same.labels)
        if fails is None:
            pipeline.step(7, batches(rows), lambda: None)
        else:
            with pytest.raises(LinkLost):
                pipeline.step(7, batches(rows), lambda: None)
        edge.optimizer.drop_gradients()
        sent.append([item for item in hub.sent if item[0] == "forward"])
    assert sent[0] == sent[1] == sent[2]
    assert len({data for _, _, data in sent[0]}) == 4, "equal rows, different noise"


def test_a_loss_that_is_not_finite_ends_the_step_before_its_last_gradient_leaves() -> None:
    hub = Hub()
    pipeline, edge = pipeline_with(hub)
    with torch.no_grad():
        cast(Any, edge.cut.model).lm_head.weight[5] = float("nan")
    told: list[str] = []
    with pytest.raises(NotFinite):
        pipeline.step(0, batches(make_batch(0, 12, PADDINGS)), lambda: told.append("last"))
    assert not told
    assert not [item for item in hub.sent if item[0] == "backward"]


def test_who_asks_is_told_before_the_last_gradient_leaves_and_not_sooner() -> None:
    hub = Hub()
    pipeline, _ = pipeline_with(hub)
    at: list[int] = []
    pipeline.step(0, batches(make_batch(0, 12, PADDINGS)), lambda: at.append(len(hub.sent)))
    kinds = [kind for kind, _, _ in hub.sent]
    assert (at, kinds) == ([7], ["forward"] * 4 + ["backward"] * 4)
