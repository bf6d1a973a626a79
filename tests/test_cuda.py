"""The hub on a GPU gives what it gives on the CPU. Skipped where there is none."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from blocks import adapters
from blocks.adapters import Adapter
from blocks.codec import from_wire, to_wire
from blocks.device import host_empty, to_device, to_host
from blocks.layout import REAL, Layout
from blocks.partition import Partition
from hub.engine import Engine
from hub.jobs import InferItem, Place
from messaging.messages import Tensor
from tests.support.models import (
    CONFIGS,
    CPU,
    MORE_CONFIGS,
    Together,
    difference,
    make_edge,
    make_engine,
    make_schedule,
    whole_model,
)
from tests.support.training import Batch, TrainingEdge, make_batch, starting_adapter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

Devices = tuple[torch.device, ...]
GPU = torch.device("cuda")
#: What the hub computes on: a GPU, or a GPU and another device with half of the layers each.
DEVICES: dict[str, Devices] = {"gpu": (GPU,), "gpu and cpu": (GPU, CPU), "cpu and gpu": (CPU, GPU)}
if torch.cuda.device_count() > 1:
    DEVICES["two gpus"] = (torch.device("cuda:0"), torch.device("cuda:1"))
#: float32 on both, but sums in another order.
CLOSE = 1e-4
NAMES = ["llama", "gemma3", "gpt2", "bloom", "mixtral"]
GREEDY = {"do_sample": False, "eos_token_id": None}


@cache
def whole(name: str) -> PreTrainedModel:
    return whole_model({**CONFIGS, **MORE_CONFIGS}[name]())


def engine_on(devices: Devices, name: str) -> Engine:
    spec = adapters.make_spec(whole(name).config, 4, 8)
    return make_engine(whole(name), spec, make_schedule(lr=1e-2, clip=1.0, warmup=2), devices=devices)


def close(given: Adapter, wanted: Adapter) -> bool:
    assert given.keys() == wanted.keys()
    return all(float((given[name] - wanted[name]).abs().max()) < CLOSE for name in wanted)


# -- there and back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", ["f32", "bf16", "q8"])
def test_states_cross_as_they_do_on_the_cpu(wire: str) -> None:
    states = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))
    sent = to_wire(states, wire)
    here = from_wire(sent, dtype=torch.float32, shape=(2, 6, 64))
    there = from_wire(sent, dtype=torch.float32, shape=(2, 6, 64), device=GPU)
    assert there.device.type == "cuda"
    assert torch.equal(there.cpu(), here)
    back = from_wire(to_wire(there, wire), dtype=torch.float32, shape=(2, 6, 64))
    assert torch.equal(back, from_wire(to_wire(here, wire), dtype=torch.float32, shape=(2, 6, 64)))


def test_values_cross_through_page_locked_memory() -> None:
    assert host_empty(4, torch.float32, GPU).is_pinned()
    assert to_host(torch.ones(4, device=GPU)).is_pinned()
    assert torch.equal(to_device(torch.arange(5).expand(3, -1), GPU).cpu(), torch.arange(5).expand(3, -1))


def test_memory_is_not_lent_again_before_its_copy_is_done() -> None:
    busy = torch.randn(4096, 4096, device=GPU)
    sent = []
    for number in range(64):
        busy = busy @ busy / 64
        sent.append(to_device(torch.full((1 << 18,), float(number)), GPU))
    for number, values in enumerate(sent):
        assert bool((values == number).all()), number


# -- training ----------------------------------------------------------------------------------------------

#: two edges with different cuts and padding, whose steps are joined
EDGES: dict[int, tuple[Partition, Batch]] = {
    1: (Partition(1, 1), make_batch(1, 12, [(0, 0), (3, 0)])),
    2: (Partition(2, 1), make_batch(2, 9, [(0, 4), (0, 0)])),
}


def train(engine: Engine, name: str, start: Adapter, steps: int) -> list[dict[int, float]]:
    """Joined steps of both edges; the losses of each."""
    engine.set_trained(start)
    together = Together(engine)
    spec = engine.settings.spec
    edges = {
        session: TrainingEdge(whole(name), partition, together, spec, start, session)
        for session, (partition, _) in EDGES.items()
    }
    return [
        together.run({session: (lambda s=session: edges[s].step(EDGES[s][1])) for session in EDGES})
        for _ in range(steps)
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("devices", DEVICES)
def test_joined_steps_train_to_the_same_adapter(devices: str, name: str) -> None:
    there, here = engine_on(DEVICES[devices], name), engine_on((CPU,), name)
    start = starting_adapter(whole(name), here.settings.spec)
    losses, wanted = train(there, name, start, 4), train(here, name, start, 4)
    for given, want in zip(losses, wanted, strict=True):
        assert given == pytest.approx(want, rel=CLOSE)
    assert close(there.trained(), here.trained())
    assert {value.device.type for value in there.optimizer.state().values()} == {"cpu"}


def test_a_checkpoint_goes_from_one_device_to_the_other() -> None:
    there, here = engine_on((GPU,), "llama"), engine_on((CPU,), "llama")
    start = starting_adapter(whole("llama"), here.settings.spec)
    train(there, "llama", start, 3)
    here.optimizer.load(there.optimizer.state())
    point = {**start, **there.trained()}
    for engine in (there, here):
        train(engine, "llama", point, 2)
    assert close(there.trained(), here.trained())


# -- generation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("devices", DEVICES)
def test_sessions_decode_to_the_unsplit_models_tokens(devices: str, name: str) -> None:
    """Of different lengths, cuts and padding, one of them with beams, which reorder the cache."""
    engine = engine_on(DEVICES[devices], name)
    together = Together(engine)
    sessions = {
        1: (Partition(1, 1), make_batch(3, 5, [(0, 0)]), {}),
        2: (Partition(2, 1), make_batch(4, 11, [(0, 0), (4, 0)]), {}),
        3: (Partition(1, 3), make_batch(5, 7, [(0, 0)]), {"num_beams": 3}),
    }
    settings = {
        session: {"input_ids": batch.ids, "attention_mask": batch.mask, "max_new_tokens": 14, **GREEDY, **more}
        for session, (_, batch, more) in sessions.items()
    }
    edges = {s: make_edge(whole(name), partition, together, s) for s, (partition, _, _) in sessions.items()}
    tokens = together.run({s: (lambda s=s: edges[s].model.generate(**settings[s])) for s in sessions})
    for session, given in settings.items():
        assert torch.equal(tokens[session], whole(name).generate(**given)), session
    assert engine.budget.used == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_published_version_gives_the_same_states(name: str) -> None:
    layout = Layout(2, 0, 6, REAL, ((), (2,)))
    states = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))
    given = []
    for device in (GPU, CPU):
        engine = engine_on((device,), name)
        engine.publish(1, starting_adapter(whole(name), engine.settings.spec), ())
        (answer,) = engine.infer([InferItem(1, 1, 1, Place(1, 5), 1, layout, (), to_wire(states))])
        assert isinstance(answer, Tensor), answer
        given.append(from_wire(answer, dtype=torch.float32, shape=(2, 6, 64)))
    real = layout.real()
    assert difference(given[0][real], given[1][real]) < CLOSE
