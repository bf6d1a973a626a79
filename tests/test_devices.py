"""Which layer stands on which device, and that states and all that goes with them follow the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from blocks import middle as blocks_middle
from blocks.adapters import make_spec
from blocks.codec import to_wire
from blocks.device import pick_devices, spread
from blocks.layout import REAL, Layout
from blocks.middle import Flow, MiddleBlocks
from blocks.optimizer import Schedule
from blocks.source import open_model
from blocks.surgery import build_whole, load
from hub import ragged, streams
from hub.engine import EngineSettings
from hub.jobs import InferItem, Place, StepItem
from hub.kv import KvBudget, StreamCache
from hub.loading import kv_bytes, load_engine
from hub.streams import Piece
from messaging.console import Journal
from messaging.errors import InputError
from messaging.messages import Tensor
from tests.support.models import CONFIGS, CPU, MORE_CONFIGS, make_engine, source_of, whole_model
from tests.support.sites import POCKET
from tests.support.training import starting_adapter

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
#: What torch's fake tensors take for two devices; its fake GPUs need a build with CUDA.
HERE, THERE = torch.device("cpu:1"), torch.device("cpu:2")
#: of layers 1 to 5
HOMES = [HERE, HERE, THERE, THERE, THERE]
NAMES = ["llama", "gemma3", "gpt2", "bloom", "gptj", "gpt_neox"]


def test_devices_are_named_one_by_one() -> None:
    assert pick_devices("cpu") == (CPU,)
    assert pick_devices("cpu, cpu") == (CPU, CPU)
    with pytest.raises(InputError, match="--device cuda:7 cannot be used here"):
        pick_devices("cpu,cuda:7")


def test_a_gpu_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blocks.device.pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert pick_devices("cuda") == (torch.device("cuda"),)
    assert pick_devices("cuda:0,cuda") == (FIRST, SECOND)
    with pytest.raises(InputError, match="names cuda:1 twice"):
        pick_devices("cuda,cuda:1")


def test_layers_are_spread_by_what_devices_have_free() -> None:
    devices = (FIRST, SECOND)
    assert spread([10] * 8, devices, {FIRST: 100, SECOND: 100}) == [0] * 4 + [1] * 4
    assert spread([10] * 8, devices, {FIRST: 30, SECOND: 90}) == [0] * 2 + [1] * 6
    assert spread([10, 10, 10, 30], devices, {FIRST: 100, SECOND: 100}) == [0, 0, 0, 1]
    assert spread([10] * 3, (FIRST,), {FIRST: 34}) == [0] * 3


def test_what_a_cpu_has_free_is_not_known_so_the_parts_are_equal() -> None:
    assert spread([10] * 6, (FIRST, CPU), {FIRST: 34}) == [0] * 3 + [1] * 3
    assert spread([10] * 6, (CPU,), {}) == [0] * 6


@pytest.mark.parametrize(
    ("devices", "free", "full"),
    [
        ((FIRST, SECOND), {FIRST: 30, SECOND: 30}, "40 MiB .* on cuda:0, which has 30 MiB"),
        ((FIRST,), {FIRST: 85}, "80 MiB .* on cuda:0, which has 85 MiB"),
        ((CPU, SECOND), {SECOND: 30}, "40 MiB .* on cuda:1, which has 30 MiB"),
        ((FIRST, SECOND), {FIRST: 80, SECOND: 0}, "40 MiB .* on cuda:1, which has 0 MiB"),
    ],
)
def test_layers_that_do_not_fit_are_refused_before_they_are_loaded(
    devices: tuple[torch.device, ...], free: dict[torch.device, int], full: str
) -> None:
    with pytest.raises(InputError, match=full):
        spread([10 << 20] * 8, devices, {device: known << 20 for device, known in free.items()})


def test_each_layer_is_loaded_onto_its_device() -> None:
    """Layers 1 and 10 .. 13 among them: a loader that goes by the beginning of names would take one for the other."""
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 14
    whole = whole_model(config)
    middle = MiddleBlocks(config, 1, 14, torch.float32)
    nowhere = torch.device("meta")
    homes = [nowhere if number in (1, 12) else CPU for number in range(13)]
    load(middle.cut, source_of(whole), torch.float32, CPU, homes=homes)
    for number, layer in enumerate(middle.cut.layers):
        assert {parameter.device for parameter in layer.parameters()} == {homes[number]}, number


def test_the_hub_says_where_layers_are_and_shares_out_memory_when_they_are_there() -> None:
    files, read = open_model(str(POCKET)), []
    source = files.source

    class Watching:
        names, info = source.names, source.info

        def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
            read.append(name)
            return source.read(name, dtype)

    budgets = []

    def budget() -> int:
        budgets.append(len(read))
        return 1 << 20

    schedule, spec = Schedule(1e-3, 0, 1.0, 0.0), make_spec(files.config, 4, 8)
    settings = EngineSettings(spec, schedule, torch.float32, (CPU, CPU), budget)
    journal = Journal()
    _, names = build_whole(files.config, torch.float32)
    engine = load_engine(replace(files, source=Watching()), names, settings, journal)
    # For copies of weights, and for the caches.
    assert budgets == [len(read)] * 2
    assert read
    assert engine.budget.most == 1 << 20
    assert journal.recent()[-1].endswith("layers 1 to 5 are on cpu")


def test_caches_get_half_of_what_the_fullest_of_several_gpus_has_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hub.loading.free_on", lambda devices: dict(zip(devices, (80, 40, 60), strict=False)))
    assert kv_bytes((FIRST,)) == 20
    assert kv_bytes((FIRST, SECOND)) == 20
    monkeypatch.undo()
    assert 0 < kv_bytes((CPU,), share=3) * 2 < kv_bytes((CPU,))


# -- two devices that compute nothing: most operations on tensors of both at once are errors ---------------
# Not errors: copies, and indices on the wrong device. The second is looked for apart.


def stand_on_two(middle: MiddleBlocks, homes: Sequence[torch.device]) -> None:
    """What `surgery.load` does, without weights."""
    prefix = middle.cut.names.prefix
    for path, module in middle.cut.model.named_modules():
        home = next((homes[i] for i in range(len(homes)) if f"{path}.".startswith(f"{prefix}.{i}.")), HERE)
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=home), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.empty_like(buffer, device=home)
    middle.stand_on(homes)


def blocks(name: str) -> MiddleBlocks:
    middle = MiddleBlocks({**CONFIGS, **MORE_CONFIGS}[name](), 1, 6, torch.float32)
    if ragged.supports(middle.cut.model):
        ragged.install(middle.cut.model)
    return middle


@pytest.mark.parametrize("name", NAMES)
def test_states_go_from_device_to_device_with_the_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And back again with the gradients. Rows enter and leave on either device, padding among them."""
    select = blocks_middle._select

    def select_on_one_device(value: Any, rows: torch.Tensor, batch: int) -> Any:
        flow = blocks_middle.CURRENT.get()
        assert flow is not None
        assert flow.hidden is not None
        assert not isinstance(value, torch.Tensor) or value.device == flow.hidden.device
        return select(value, rows, batch)

    monkeypatch.setattr(blocks_middle, "_select", select_on_one_device)
    middle = blocks(name)
    with FakeTensorMode(allow_non_fake_inputs=True):
        stand_on_two(middle, HOMES)
        states = torch.empty(4, 5, 64, device=HERE, requires_grad=True)
        mask = torch.ones(4, 5, dtype=torch.bool, device=HERE)
        positions = torch.arange(5, device=HERE).expand(4, -1)
        for enters, leaves in (
            ([1, 1, 4, 5], [6, 3, 6, 6]),
            ([1] * 4, [6] * 4),
            ([1] * 4, [3] * 4),
            ([4] * 4, [6] * 4),
        ):
            hidden = middle.run(states, enters, leaves, mask, positions)
            assert (hidden.device, hidden.shape) == (HERE, states.shape)
            (grad,) = torch.autograd.grad(hidden.sum(), [states])
            assert (grad.device, grad.shape) == (HERE, states.shape)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@torch.inference_mode()
def test_each_layers_cache_is_on_its_device(name: str) -> None:
    middle = blocks(name)
    with FakeTensorMode(allow_non_fake_inputs=True):
        stand_on_two(middle, HOMES)
        caches = [StreamCache(5, KvBudget(1 << 30)) for _ in range(3)]
        places = [Place(1, 6), Place(2, 5), Place(4, 6)]
        for width in (6, 1, 3, 1):
            pieces = []
            for cache, place in zip(caches, places, strict=True):
                positions = torch.arange(cache.past, cache.past + width, device=HERE)[None]
                states, mask = torch.empty(1, width, 64, device=HERE), None
                if place.enter == 2:
                    mask = torch.ones(1, cache.past + width, dtype=torch.bool, device=HERE)
                cache.rows = 1
                pieces.append(Piece(states, cache.past, mask, positions, place, cache))
            for hidden in streams.run(middle, pieces):
                assert (hidden.device, hidden.shape) == (HERE, (1, width, 64))
        for cache, place in zip(caches, places, strict=True):
            for number, layer in enumerate(cache.layers, 1):
                if place.enter <= number < place.leave:
                    assert layer.keys.device == (HERE if number < 3 else THERE)
                else:
                    assert not layer.is_initialized


def test_what_all_layers_get_goes_to_a_device_once() -> None:
    copies = []

    class Mask:
        def to(self, device: torch.device) -> Mask:
            copies.append(device)
            return Mask()

    flow, mask = Flow(torch.zeros(1, 1, 4), [1], [6], {1: HERE, 2: THERE, 3: THERE}), Mask()
    first, second, third = (flow.carry((mask, None), layer)[0] for layer in (1, 2, 3))
    assert copies == [HERE, THERE]
    assert second is third is not first


# -- two devices that compute: both the CPU, so that all but the moving is shown ---------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_an_engine_on_two_devices_computes_what_one_does(name: str) -> None:
    whole = whole_model({**CONFIGS, **MORE_CONFIGS}[name]())
    one, two = (make_engine(whole, devices=devices) for devices in ((CPU,), (CPU, CPU)))
    start = starting_adapter(whole, one.settings.spec)
    layout = Layout(2, 0, 6, REAL, ((), (2,)))
    states, grad = torch.randn(2, 2, 6, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for engine in (one, two):
        engine.publish(1, start, ())
        engine.set_trained(start)
        told = engine.infer([InferItem(1, 1, 1, Place(1, 5), 1, layout, (), to_wire(states))])
        step = StepItem(1, Place(2, 6), layout, 10, to_wire(states))
        told += [engine.step_forward([step])[1], engine.step_backward({1: to_wire(grad)})[1]]
        engine.apply_step([1])
        found.append((told, engine.trained()))
    (told, trained), (told_two, trained_two) = found
    for answer, answer_two in zip(told, told_two, strict=True):
        assert isinstance(answer, Tensor), answer
        assert isinstance(answer_two, Tensor), answer_two
        assert b"".join(answer.chunks) == b"".join(answer_two.chunks)
    assert all(torch.equal(trained[key], trained_two[key]) for key in trained)
    assert any(not torch.equal(trained[key], start[key]) for key in trained)
