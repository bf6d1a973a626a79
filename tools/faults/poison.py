"""Tensors that must not reach the weights: NaN, infinity, wrong shapes and dtypes, nested headers. Row 16."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgpack  # type: ignore[import-untyped]
import torch
from safetensors.torch import save
from transformers import AutoConfig

import messaging.messages as m
from blocks import adapters
from hub.store.state import HubState
from messaging.errors import ErrorCode
from messaging.framing import encode
from tools.faults.fault import Fault, Setting
from tools.faults.raw import RawEdge
from tools.programs import Programs
from tools.table import Row, Skipped, at_least, at_most, reported

#: Of the pocket model, which the hubs serve.
CONFIG = AutoConfig.from_pretrained(Path(__file__).parents[2] / "hub" / "pocket")
HIDDEN = CONFIG.hidden_size
MOST_POSITION = (1 << 31) - 1

_REFUSED = "16 bad messages refused with the named error (share)"
_UNCHANGED = "16 values of adapter and optimizer that differ from a hub that saw none of them"
_GOES_ON = "16 good requests answered after each (share)"
_SENT = "16 bad messages sent"
_SHAPE = (1, 6)
_NAMED = {ErrorCode.PROTOCOL, ErrorCode.NOT_FINITE}


def poison(setting: Setting) -> Sequence[Row | Skipped]:
    """Row 16: the same good step at two hubs, one of which gets all the bad messages before."""
    with Programs(setting.folder) as programs:
        hubs = [
            programs.serve("--round-steps", 1000, "--grace", "inf", state=programs.folder / name)
            for name in ("clean", "poisoned")
        ]
        with RawEdge(hubs[0], "clean") as clean, RawEdge(hubs[1], "poisoned") as poisoned:
            for edge in (clean, poisoned):
                edge.hello(train=True)
            outcomes = list(_poisoning(poisoned))
            for edge in (clean, poisoned):
                grad = _train(edge)
                assert isinstance(grad, m.StepGrad), grad
        for hub in hubs:
            done = hub.process.end(signal.SIGTERM)
            assert done.code == 0, str(hub.process)
    for what, answer, good in outcomes:
        if not _is_named(answer) or not good:
            setting.console.print(f"{what}: answered by {answer}; a good request after it: {good}", markup=False)
    return [
        at_least(_REFUSED, sum(_is_named(answer) for _, answer, _ in outcomes) / len(outcomes), 1),
        at_most(_UNCHANGED, _differing(*(hub.state for hub in hubs)), 0),
        at_least(_GOES_ON, sum(good for _, _, good in outcomes) / len(outcomes), 1),
        reported(_SENT, len(outcomes)),
    ]


def _is_named(answer: object) -> bool:
    return isinstance(answer, m.Error) and answer.code in _NAMED


def _poisoning(edge: RawEdge) -> Iterator[tuple[str, object, bool]]:
    """Send everything bad; for each what it was, the answer, and whether a good request was answered after it."""
    good = _states()
    for what, tensor, layout in _bad_states(good):
        yield f"StepForward, {what}", edge.ask(m.StepForward(0, 1, layout, tensor)), _infers(edge)
        yield f"Infer, {what}", edge.ask(m.Infer(0, 0, 0, layout, (), tensor)), _infers(edge)
    for what, tensor, layout in _bad_states(good):
        if not layout:
            hidden = edge.ask(m.StepForward(0, 4, (), good))
            assert isinstance(hidden, m.StepHidden), hidden
            yield f"StepBackward, {what}", edge.ask(m.StepBackward(0, tensor)), _infers(edge)
    for what, file in _bad_adapters(_adapter()):
        data = m.Tensor("u8", (len(file),), (file,))
        upload = m.Upload(0, 1, 0, len(file), hashlib.sha256(file).hexdigest(), data)
        yield f"Upload, {what}", edge.ask(upload), _infers(edge)
    for message in (m.StepForward(0, 1, (), good), m.Infer(0, 0, 0, (), (), good), m.StepBackward(0, good)):
        for what, frames in _nested(message, edge.session):
            yield f"{type(message).__name__}, {what}", edge.said(frames), _infers(edge)


def _states(shape: Sequence[int] = (*_SHAPE, HIDDEN), fill: float | None = None) -> m.Tensor:
    """States as the wire has them; `fill` is the last value."""
    tensor = m.Tensor("f32", tuple(shape), ())
    rng = random.Random(1)
    values = [rng.gauss(0, 1) for _ in range(tensor.nbytes // 4)]
    if fill is not None:
        values[-1] = fill
    return m.Tensor("f32", tuple(shape), (struct.pack(f"<{len(values)}f", *values),) if values else ())


def _filled(dtype: str, byte: bytes) -> m.Tensor:
    """States of one byte alone: 00 is a scale of zero in q8, ff is NaN in every floating dtype."""
    tensor = m.Tensor(dtype, (*_SHAPE, HIDDEN), ())
    return replace(tensor, chunks=(byte * tensor.nbytes,))


def _bad_states(good: m.Tensor) -> Iterator[tuple[str, m.Tensor, tuple[int, ...]]]:
    for value in (float("nan"), float("inf"), -float("inf")):
        yield f"{value}", _states(fill=value), ()
    for dtype in ("u8", "i32", "q8"):
        yield f"zeros of {dtype}", _filled(dtype, b"\0"), ()
    for dtype in ("f16", "bf16", "q8"):
        yield f"NaN of {dtype}", _filled(dtype, b"\xff"), ()
    rows, width = _SHAPE
    for shape in (
        *((rows, width, HIDDEN - 1), (rows, width, HIDDEN + 1), (width, HIDDEN), (rows, 1, width, HIDDEN), (HIDDEN,)),
        *((0, width, HIDDEN), (rows, 0, HIDDEN), ()),
    ):
        yield f"shape {shape}", _states(shape=shape), ()
    for layout in ((4, 0), (1, 1, 1000), (1, 0, 0), (2, 0, 1, MOST_POSITION), (3, 0, 2, MOST_POSITION, width), (3, 0)):
        yield f"layout {layout}", good, layout


def _bad_adapters(good: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, bytes]]:
    name, value = next(iter(good.items()))
    for bad in (float("nan"), float("inf")):
        yield f"{bad}", save({**good, name: torch.full_like(value, bad)})
    yield "half precision", save({**good, name: value.half()})
    yield "another shape", save({**good, name: value[:-1].clone()})
    yield "flat", save({**good, name: value.flatten()})
    yield "another name", save({**good, "../../hub.db": value.clone()})
    for header in (b"[" * 5000, b'{"a":' * 5000, b"{}" * 9, json.dumps({name: {"dtype": "F32"}}).encode()):
        yield f"header {header[:12]!r}", struct.pack("<Q", len(header)) + header
    for shape, end in (((1 << 62, 4), 8), ((0, 1 << 63), 0), ((2,), 1 << 40)):
        tensors = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}
        header = json.dumps(tensors).encode()
        yield f"announced shape {shape}", struct.pack("<Q", len(header)) + header + bytes(8)
    yield "a header of 2^63 bytes", struct.pack("<Q", 1 << 63) + b"{}"


def _nested(message: m.AnyMessage, session: m.Envelope) -> Iterator[tuple[str, list[bytes]]]:
    """The message with arrays and maps where numbers belong; no request number is used up by them."""
    header, *chunks = [bytes(frame) for frame in encode(m.Packet(message, replace(session, request=1)))]
    fields = msgpack.unpackb(header)
    for what, place, value in (
        ("an array in the tensor", 8, [[1, [1], 6, HIDDEN]]),
        ("a map in the tensor", 8, [{"dtype": "f32"}]),
        ("an array as the last field", -1, [[[[]]]]),
        ("a map as the session", 2, {"session": 1}),
    ):
        changed = list(fields)
        changed[place] = value
        yield what, [msgpack.packb(changed), *chunks]
    yield "arrays without end", [header[:8] + b"\xdc\x10\x00" * 4000, *chunks]


def _infers(edge: RawEdge) -> bool:
    return isinstance(edge.ask(m.Infer(0, 0, 0, (), (), _states())), m.InferHidden)


def _train(edge: RawEdge) -> m.AnyMessage:
    """One good step."""
    hidden = edge.ask(m.StepForward(0, 4, (), _states()))
    assert isinstance(hidden, m.StepHidden), hidden
    return edge.ask(m.StepBackward(0, _states()))


def _adapter() -> dict[str, torch.Tensor]:
    """An adapter with the names and shapes that the hub takes."""
    spec = adapters.make_spec(CONFIG, 8, 16)
    return {name: value.clone() for name, value in adapters.initial(CONFIG, spec, 0).items()}


def _differing(first: Path, second: Path) -> int:
    """Values that differ between the newest checkpoints of two states, of adapter and optimizer."""
    loaded = []
    for state in (first, second):
        with HubState.open(state, exclusive=False) as opened:
            checkpoint, _ = opened.checkpoints.load_latest()
            assert checkpoint is not None
            loaded.append({**checkpoint.adapter, **checkpoint.optimizer})
    one, other = loaded
    assert one.keys() == other.keys()
    assert any(bool(value.any()) for name, value in one.items() if name.endswith("exp_avg")), "nothing was trained"
    return sum(int((value != other[name]).sum()) for name, value in one.items())


FAULTS: tuple[Fault, ...] = (
    Fault("16", "tensors that must not reach the weights", (_REFUSED, _UNCHANGED, _GOES_ON, _SENT), poison),
)
