"""Each edge is answered in the wire dtype that it asked in, and what float16 cannot hold harms nobody else."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from blocks import adapters
from blocks.codec import from_wire, to_wire
from blocks.layout import Layout
from blocks.partition import Partition
from hub.answers import gradient_like, hidden_like
from hub.jobs import InferItem, Place, StepItem
from messaging.errors import InputError, NotFinite, ProtocolError
from messaging.messages import Tensor
from tests.support.models import CONFIGS, difference, make_engine, middle_of, whole_model
from tests.support.training import TrainingEdge, make_batch, starting_adapter

WIRES = ("f32", "bf16", "f16", "q8")
PLACE = Place(1, 5)
SHAPE = (2, 5, 64)


@cache
def whole() -> PreTrainedModel:
    return whole_model(CONFIGS["llama"]())


def states(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def layout() -> Layout:
    return Layout.from_ints((), SHAPE[0], 0, SHAPE[1], 64)


def read(answer: object) -> torch.Tensor:
    assert isinstance(answer, Tensor), answer
    return from_wire(answer, dtype=torch.float32, shape=SHAPE)


@pytest.mark.parametrize("stream", [0, 1], ids=["once", "cached"])
def test_requests_in_several_dtypes_make_one_batch(stream: int) -> None:
    engine = make_engine(whole())
    items = [
        InferItem(number, 1, stream, PLACE, 0, layout(), (), to_wire(states(), wire))
        for number, wire in enumerate(WIRES, 1)
    ]
    answers = engine.infer(items)
    assert engine.forwards == 1
    assert [answer.dtype for answer in answers if isinstance(answer, Tensor)] == list(WIRES)
    exact = read(answers[0])
    for answer, most in zip(answers[1:], (0.01, 0.002, 0.02), strict=True):
        assert 0 < difference(read(answer), exact) < most


def test_a_joined_step_answers_each_edge_in_its_own_dtype() -> None:
    engine = make_engine(whole())
    items = [StepItem(n, PLACE, layout(), 3, to_wire(states(n), wire)) for n, wire in enumerate(WIRES, 1)]
    hidden = engine.step_forward(items)
    assert [hidden[n].dtype for n in range(1, 5)] == list(WIRES)  # type: ignore[union-attr]
    # The answer to a gradient follows the gradient, whatever the states came in.
    grads = engine.step_backward({n: to_wire(states(9), wire) for n, wire in enumerate(reversed(WIRES), 1)})
    assert [grads[n].dtype for n in range(1, 5)] == list(reversed(WIRES))  # type: ignore[union-attr]


@pytest.mark.parametrize("wire", ["bf16", "f16", "q8"])
def test_training_goes_nearly_as_in_float32(wire: str) -> None:
    """The loss of the steps, and the adapters after them: near, and not equal, so the bytes were others."""
    spec = adapters.make_spec(whole().config, 4, 8)
    start, losses, ends = starting_adapter(whole(), spec), [], []
    for dtype in ("f32", wire):
        engine = make_engine(whole(), spec)
        engine.set_trained(start)
        edge = TrainingEdge(whole(), Partition(1, 1), engine, spec, start)
        middle_of(edge.cut).wire = dtype
        losses.append([edge.step(make_batch(seed, 14, [(0, 0), (3, 0), (0, 4)])) for seed in range(3)])
        ends.append(engine.trained())
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert losses[0] != losses[1]
    moved = [torch.cat([(end[name] - start[name]).flatten() for name in end]) for end in ends]
    assert float(torch.nn.functional.cosine_similarity(*moved, dim=0)) > 0.97


def test_hidden_states_beyond_float16_are_refused_for_that_edge_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(whole())
    plain = engine._run
    monkeypatch.setattr(engine, "_run", lambda *given: plain(*given) * 1e6)
    items = [StepItem(n, PLACE, layout(), 3, to_wire(states(n), wire)) for n, wire in ((1, "f16"), (2, "q8"))]
    answers = engine.step_forward(items)
    assert isinstance(answers[1], InputError)
    assert "use --wire bf16 or int8" in str(answers[1])
    assert isinstance(answers[2], Tensor)
    # The step goes on with the other.
    assert isinstance(engine.step_backward({2: to_wire(states(9), "q8")})[2], Tensor)


def test_a_gradient_beyond_float16_comes_as_bfloat16() -> None:
    """Its step is taken by then: it cannot be refused any more."""
    asked = to_wire(states(), "f16")
    assert gradient_like(states(), asked).dtype == "f16"
    answer = gradient_like(states() * 1e6, asked)
    assert (answer.dtype, answer.nbytes) == ("bf16", asked.nbytes)
    assert isinstance(hidden_like(states() * 1e6, asked), InputError)


@pytest.mark.parametrize(
    ("tensor", "error"),
    [
        (Tensor("u8", SHAPE, (bytes(640),)), ProtocolError),
        (Tensor("i32", SHAPE, (bytes(2560),)), ProtocolError),
        (Tensor("q8", SHAPE, (bytes(660),)), ProtocolError),
        (Tensor("q8", SHAPE, (b"\xff" * 660,)), NotFinite),
    ],
)
def test_what_is_no_state_is_refused_for_that_edge_alone(tensor: Tensor, error: type) -> None:
    engine = make_engine(whole())
    good = to_wire(states(), "q8")
    answers = engine.infer([InferItem(n, 1, 0, PLACE, 0, layout(), (), t) for n, t in ((1, tensor), (2, good))])
    assert isinstance(answers[0], error)
    assert isinstance(answers[1], Tensor)


def test_the_same_bytes_in_another_dtype_are_another_step() -> None:
    item = StepItem(1, PLACE, layout(), 3, to_wire(states(), "bf16"))
    other = replace(item, smashed=replace(item.smashed, dtype="f16"))
    assert item.smashed.nbytes == other.smashed.nbytes
    assert item.digest() != other.digest()
    assert item.digest() == replace(item, smashed=to_wire(states(), "bf16")).digest()
