"""The joined step on B: gradients by edge, micro-batches, steps that are left out, layers that are run again."""

from __future__ import annotations

import pytest
import torch

from blocks import adapters
from blocks.adapters import Adapter
from blocks.codec import to_wire
from blocks.layout import Layout
from blocks.optimizer import Schedule
from hub.engine import Engine, EngineSettings
from hub.jobs import InferItem, Place, StepItem
from tests.support.models import CONFIGS, CPU, KV_BYTES, MORE_CONFIGS, source_of, whole_model
from tests.support.training import starting_adapter

PLACES = {1: Place(1, 5), 2: Place(2, 4)}


def engine(name: str = "llama", recompute: bool = False) -> Engine:
    model = whole_model((CONFIGS | MORE_CONFIGS)[name]())
    spec = adapters.make_spec(model.config, 4, 8)
    settings = EngineSettings(spec, Schedule(1e-2, 0, 1.0, 0.0), torch.float32, (CPU,), lambda: KV_BYTES, recompute)
    made = Engine(model.config, source_of(model), settings)
    made.set_trained(starting_adapter(model, spec))
    return made


def item(session: int, micro: int = 0, micros: int = 1) -> StepItem:
    """Two rows of an edge, wider for the second edge; the same for the same numbers."""
    width = 4 + 3 * session
    states = torch.randn(2, width, 64, generator=torch.Generator().manual_seed(10 * session + micro))
    layout = Layout.from_ints((), 2, 0, width)
    return StepItem(session, PLACES[session], layout, 2 * width, to_wire(states), micro, micros)


def gradient(item: StepItem) -> object:
    generator = torch.Generator().manual_seed(1000 + 10 * item.session + item.micro)
    return to_wire(torch.randn(item.smashed.shape, generator=generator))


def backward(engine: Engine, *items: StepItem) -> None:
    """Forward and backward of one micro-batch."""
    engine.step_forward(items, items[0].micro)
    engine.step_backward({item.session: gradient(item) for item in items}, items[0].micro)


def copied(gradients: Adapter) -> Adapter:
    return {name: value.clone() for name, value in gradients.items()}


def close(one: Adapter, other: Adapter) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[k], other[k], rtol=1e-4, atol=1e-5) for k in one)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gptj", "mixtral"])
def test_gradients_are_kept_apart_by_edge(name: str) -> None:
    """Two edges with rows of other widths and other layers, joined: each has what it would have alone."""
    running = engine(name)
    alone = {}
    for session in (1, 2):
        backward(running, item(session))
        alone[session] = copied(running.edge_gradients()[session])
        running.apply_step([])
    backward(running, item(1), item(2))
    found = running.edge_gradients()
    assert found.keys() == {1, 2}
    assert all(close(found[session], alone[session]) for session in (1, 2))
    assert len(found[2]) < len(found[1]), "no gradient in layers that an edge's rows did not pass"


def test_they_add_up_over_micro_batches() -> None:
    running, parts = engine(), []
    for micro in (0, 1):
        backward(running, item(1, micro, 2))
        parts.append(copied(running.edge_gradients()[1]))
        running.apply_step([])
    for micro in (0, 1):
        backward(running, item(1, micro, 2))
    total = running.edge_gradients()[1]
    assert close(total, {name: parts[0][name] + parts[1][name] for name in total})


def test_an_edge_that_is_left_out_leaves_no_trace() -> None:
    """Its micro-batches went forward and backward with the others'; then its step did not count."""
    both, alone = engine(), engine()
    for micro in (0, 1):
        backward(both, item(1, micro, 2), item(2, micro, 2))
        backward(alone, item(1, micro, 2))
    both.apply_step([1])
    alone.apply_step([1])
    assert close(both.trained(), alone.trained())
    assert both.layer_tokens == alone.layer_tokens == [0, 28, 28, 28, 28, 0]
    assert not both.edge_gradients()


def test_the_optimizer_steps_once_for_all_micro_batches() -> None:
    running = engine()
    before = running.trained()
    for micro in (0, 1, 2):
        backward(running, item(1, micro, 3))
    assert all(torch.equal(before[name], value) for name, value in running.trained().items())
    running.apply_step([1])
    assert running.optimizer.steps == 1
    assert any(not torch.equal(before[name], value) for name, value in running.trained().items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "mixtral"])
def test_layers_that_are_run_again_give_the_same(name: str) -> None:
    """Also where somebody generates with another adapter between the forward and the backward."""
    found = []
    for recompute in (False, True):
        running = engine(name, recompute)
        running.publish(1, {key: value + 0.1 for key, value in running.trained().items()}, set())
        running.step_forward([item(1), item(2)])
        states = to_wire(torch.ones(1, 2, 64))
        running.infer([InferItem(3, 1, 0, PLACES[1], 1, Layout.from_ints((), 1, 0, 2), (), states)])
        running.step_backward({1: gradient(item(1)), 2: gradient(item(2))})
        found.append({key: copied(value) for key, value in running.edge_gradients().items()})
    assert all(torch.equal(found[0][s][key], value) for s in found[1] for key, value in found[1][s].items())


def test_layers_that_are_run_again_keep_less() -> None:
    kept = []
    for recompute in (False, True):
        running, sizes = engine("llama", recompute), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t):  # type: ignore[func-returns-value]
            running.step_forward([item(1), item(2)])
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 4
