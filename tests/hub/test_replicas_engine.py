"""An engine asked through a replica: what it answers itself, for steps in micro-batches and requests in pieces."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blocks.codec import to_wire
from blocks.layout import Layout
from hub.engine import Engine
from hub.jobs import InferItem, Outcome, Place, StepItem
from hub.replicas.actor import Plan, Replica
from hub.replicas.parted import Rest
from hub.replicas.remote import RemoteEngine
from messaging.errors import ErrorCode, HubError
from messaging.messages import Tensor
from tests.support.models import CONFIGS, make_engine, make_schedule, whole_model


class Wire:
    """As a cluster with one replica: what crosses is pickled."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.crossed: list[tuple[object, ...]] = []

    def start(self, plan: Plan, name: str) -> tuple[Any, str]:
        self.replica = replica = Replica.__new__(Replica)
        replica._engine, replica._parted = self._engine, {}

        def method(name: str) -> Any:
            return SimpleNamespace(remote=lambda *given: self._call(getattr(replica, name), given))

        return SimpleNamespace(**{name: method(name) for name in vars(Replica) if not name.startswith("_")}), "here"

    def _call(self, method: Any, given: tuple[object, ...]) -> object:
        arrived = pickle.loads(pickle.dumps(given))
        self.crossed.append(arrived)
        return pickle.loads(pickle.dumps(method(*arrived)))

    def ask(self, answer: object, name: str) -> object:
        return answer

    def end(self, actor: object) -> None:
        pass


def engine() -> Engine:
    return make_engine(whole_model(CONFIGS["llama"]()), schedule=make_schedule(1e-2))


@pytest.fixture
def wire() -> Wire:
    return Wire(engine())


@pytest.fixture
def remote(wire: Wire) -> RemoteEngine:
    unused: Any = None
    found = RemoteEngine(wire, unused, 0)  # type: ignore[arg-type]
    found.start()
    return found


def states(rows: int, width: int, seed: int) -> Tensor:
    return to_wire(torch.randn(rows, width, 64, generator=torch.Generator().manual_seed(seed)))


def prompt(width: int, past: int = 0, stream: int = 1) -> InferItem:
    layout = Layout.from_ints((), 1, past, width)
    return InferItem(1, 1, stream, Place(1, 5), 0, layout, (), states(1, width, width), "edge")


def values(outcome: Outcome | None) -> bytes:
    assert isinstance(outcome, Tensor), outcome
    return b"".join(bytes(chunk) for chunk in outcome.chunks)


def step(computes: Engine | RemoteEngine) -> list[bytes]:
    """Two edges, one with two micro-batches, in one step; then where training stands."""
    layout, told = Layout.from_ints((), 2, 0, 6), []
    for micro, sessions in enumerate([(1, 2), (2,)]):
        items = [StepItem(s, Place(1, 5), layout, 9, states(2, 6, 10 * s + micro), micro, s) for s in sessions]
        told += [values(answer) for answer in computes.step_forward(items, micro).values()]
        grads = {s: states(2, 6, 100 * s + micro) for s in sessions}
        told += [values(answer) for answer in computes.step_backward(grads, micro).values()]
    computes.apply_step([1, 2])
    standing = computes.standing()
    assert standing.layer_tokens[2] == 27
    return [*told, *(value.numpy().tobytes() for value in standing.adapter.values())]


def test_a_step_in_micro_batches_gives_the_same_bits(remote: RemoteEngine) -> None:
    assert step(remote) == step(engine())


def test_a_prompt_in_pieces_crosses_once_and_gives_what_the_whole_gives(remote: RemoteEngine, wire: Wire) -> None:
    item, here = prompt(20), engine()
    assert remote.infer([item], {0: 8}) == here.infer([item], {0: 8}) == [None]
    assert remote.infer([item], {0: 14}) == here.infer([item], {0: 14}) == [None]
    forwards = wire._engine.forwards
    assert values(remote.infer([item])[0]) == values(here.infer([item])[0])
    assert wire._engine.forwards == forwards + 1
    (first,), (second,), (last,) = [given[0] for given in wire.crossed]  # type: ignore[misc]
    assert isinstance(first, InferItem)
    assert second == last == Rest(1, 1)
    # The next of this stream is sent whole again, and builds on it.
    follows = prompt(1, past=20)
    assert values(remote.infer([follows])[0]) == values(here.infer([follows])[0])


def test_another_request_of_the_stream_is_not_taken_for_the_one_in_pieces(remote: RemoteEngine) -> None:
    assert remote.infer([prompt(20)], {0: 8}) == [None]
    asked_anew = prompt(12)
    assert values(remote.infer([asked_anew])[0]) == values(engine().infer([asked_anew])[0])


@pytest.mark.parametrize("stream", [None, 1])
def test_what_is_kept_of_a_request_in_pieces_goes_with_its_stream(
    remote: RemoteEngine, wire: Wire, stream: int | None
) -> None:
    item = prompt(20)
    assert remote.infer([item], {0: 8}) == [None]
    if stream is None:
        remote.close_session(1)
    else:
        remote.close_stream(1, stream)
    assert not remote._parted
    assert not wire.replica._parted
    assert values(remote.infer([item])[0]) == values(engine().infer([item])[0])


def test_an_error_ends_a_request_in_pieces_on_both_sides(remote: RemoteEngine) -> None:
    item = prompt(4, past=9)
    (answer,) = remote.infer([item], {0: 2})
    assert isinstance(answer, HubError)
    assert answer.code is ErrorCode.CACHE_MISS
    assert not remote._parted


def test_a_replica_that_is_started_again_has_nothing_of_a_request_in_pieces(remote: RemoteEngine, wire: Wire) -> None:
    item = prompt(20)
    assert remote.infer([item], {0: 8}) == [None]
    wire._engine = engine()
    remote.start()
    assert values(remote.infer([item])[0]) == values(engine().infer([item])[0])
