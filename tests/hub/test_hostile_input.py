"""What an enrolled edge may send that no honest one does: adapter files, names of resources, layouts of states."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from blocks.codec import to_wire
from blocks.layout import Layout
from blocks.source import open_model
from hub.engine import Engine
from hub.jobs import InferItem, Place, StepItem
from hub.library import Library
from hub.worker import parse_upload
from messaging.errors import ErrorCode, FedseaError, HubError, ProtocolError
from tests.support.folders import single_model
from tests.support.models import CONFIGS, MORE_CONFIGS, make_engine, whole_model

# --- adapter files -------------------------------------------------------------------------------

EXPECTED = {"a": torch.zeros(2, 3), "b": torch.zeros(3)}
GOOD = save({name: torch.randn_like(value) for name, value in EXPECTED.items()})


def refused_or_ours(data: bytes) -> None:
    try:
        tensors = parse_upload(data, EXPECTED)
    except ProtocolError:
        return
    for name, value in tensors.items():
        assert value.shape == EXPECTED[name].shape
        assert value.dtype == torch.float32
        assert bool(torch.isfinite(value).all())


def test_a_good_file_is_taken() -> None:
    assert parse_upload(GOOD, EXPECTED).keys() == EXPECTED.keys()


@given(st.binary(max_size=64) | st.integers(0, len(GOOD)).map(lambda end: GOOD[:end]))
@settings(max_examples=300, deadline=None)
def test_any_bytes(data: bytes) -> None:
    refused_or_ours(data)


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6))
@settings(max_examples=250, deadline=None)
def test_changed_bytes(changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for at, value in changes:
        data[at] = value
    refused_or_ours(bytes(data))


DIMS = st.lists(st.sampled_from([0, 1, 2, 3, 6, -1, 1 << 31, 1 << 62, 1 << 63, 1 << 64, 1.5, None, "2"]), max_size=5)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "BOOL", "F8_E4M3", "F4", "I64", "X", None, 3]),
        "shape": DIMS | st.none(),
        "data_offsets": st.lists(st.sampled_from([0, 12, 24, 36, 4, -1, 1 << 40, 1 << 63, None]), max_size=3),
    }
)
NAMES = st.sampled_from(["a", "b", "c", "__metadata__", "../a", "a\x1b[2J", ""])


@given(st.dictionaries(NAMES, ENTRY | st.none() | st.lists(st.integers()), max_size=4), st.integers(-9, 40))
@settings(max_examples=400, deadline=None)
def test_any_table_of_contents(table: dict[str, Any], lie: int) -> None:
    header = json.dumps(table).encode()
    refused_or_ours(struct.pack("<q", len(header) + lie * (lie < 0)) + header + bytes(max(lie, 0)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(bad: float) -> None:
    with pytest.raises(ProtocolError, match="not finite"):
        parse_upload(save({"a": torch.full((2, 3), bad)}), EXPECTED)


def test_an_empty_tensor_of_impossible_size() -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [0, 1 << 63], "data_offsets": [0, 0]}}).encode()
    with pytest.raises(ProtocolError):
        parse_upload(struct.pack("<Q", len(header)) + header, EXPECTED)


# --- names of resources ----------------------------------------------------------------------------

PARTS = st.sampled_from(
    [
        "file",
        "tensor",
        "adapter",
        "manifest",
        "/",
        "//",
        "..",
        ".",
        "~",
        "\\",
        "\x00",
        "%2e%2e",
        "etc",
        "passwd",
        "hub.db",
        "hub.key",
        "config.json",
        "model.safetensors",
        "0",
        "1",
        "-1",
        "01",
        "1:1",
        "999999999999999999",
    ]
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    files = open_model(str(single_model(tmp_path_factory.mktemp("model"))))
    return Library(files, lambda version: None, save({"lora": torch.zeros(2)}))


@given(name=st.text(max_size=30) | st.lists(PARTS, max_size=7).map("".join) | st.lists(PARTS, max_size=5).map("/".join))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_name_becomes_a_path(library: Library, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def opened(self: Path, *args: object, **kwargs: object) -> object:
        raise AssertionError(f"{name!r} opened {self}")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        if name in library._table or name.startswith("adapter/0"):
            return
        with pytest.raises(HubError) as caught:
            library.open(name)
    assert caught.value.code == ErrorCode.NO_RESOURCE
    assert str(caught.value).isprintable()


# --- states and their layouts ------------------------------------------------------------------------

PLACES = [Place(1, 3), Place(2, 6), Place(5, 6)]
NUMBERS = st.integers(0, 6) | st.sampled_from([255, 256, (1 << 31) - 1])


@cache
def engine(name: str) -> Engine:
    return make_engine(whole_model({**CONFIGS, **MORE_CONFIGS}[name]()))


def states(rows: int, width: int, wire: str = "f32") -> Any:
    return to_wire(torch.randn(rows, width, engine("llama").hidden_size), wire)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """A layout that the hub takes off the wire."""
    rows, past, width = draw(st.integers(1, 3)), draw(st.integers(0, 3)), draw(st.integers(1, 4))
    rule = draw(st.integers(0, 3))
    ints = [rule]
    for _ in range(rows * (1 + (rule > 1))):
        row = draw(st.lists(NUMBERS, max_size=3))
        ints += [len(row), *row]
    try:
        return Layout.from_ints(tuple(ints), rows, past, width, 256)
    except ProtocolError:
        return Layout(rows, past, width)


def outcomes_only(outcomes: Iterator[object]) -> None:
    assert all(isinstance(outcome, FedseaError) or hasattr(outcome, "chunks") for outcome in outcomes)


# gptj looks positions up in a table; llama computes them.
@pytest.mark.parametrize("name", ["llama", "gptj"])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_no_layout_ends_the_compute_thread(name: str, data: st.DataObject) -> None:
    running = engine(name)
    places = {session: data.draw(st.sampled_from(PLACES)) for session in (1, 2)}
    for _ in range(3):
        items: list[InferItem] = []
        for session in (1, 2):
            layout = data.draw(layouts())
            order = tuple(data.draw(st.lists(st.integers(0, 4), min_size=layout.rows, max_size=layout.rows)))
            stream = data.draw(st.integers(0, 1))
            given = order if data.draw(st.booleans()) else ()
            tensor = states(layout.rows, layout.width, data.draw(st.sampled_from(["f32", "f16", "q8"])))
            items.append(InferItem(session, 1, stream, places[session], 0, layout, given, tensor))
        outcomes_only(iter(running.infer(items)))
    running.close_session(1)
    running.close_session(2)
    assert running.budget.used == 0


@pytest.mark.parametrize("name", ["llama", "gptj"])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_no_layout_ends_a_training_step(name: str, data: st.DataObject) -> None:
    running = engine(name)
    items = []
    for session in (1, 2):
        layout = data.draw(layouts())
        place = data.draw(st.sampled_from(PLACES))
        items.append(StepItem(session, place, layout, 1, states(layout.rows, layout.width)))
    outcomes_only(iter(running.step_forward(items).values()))
    grads = {item.session: states(item.layout.rows, item.layout.width) for item in items}
    outcomes_only(iter(running.step_backward(grads).values()))
    assert all(bool(torch.isfinite(value).all()) for value in running.trained().values())
