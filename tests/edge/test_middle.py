"""Inference as an edge asks for it: what it does about a hub that lost a stream, stops, or is away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import pytest
import torch

import messaging.messages as m
from blocks.codec import from_wire
from blocks.layout import Layout
from edge.client import HubClient
from edge.middle import HubMiddle, Part
from messaging.errors import ErrorCode, HubError, HubUnreachable, InputError, LinkLost

SMASHED = torch.ones(1, 1, 4)
LOST = LinkLost("the session with the hub ended before the answer came")


def missing(held: int) -> HubError:
    return HubError(ErrorCode.CACHE_MISS, "the hub no longer holds this stream", held)


class Script:
    """A client whose hub answers as told: None is the hidden state of what was asked, all else is raised."""

    def __init__(self, *answers: Exception | None) -> None:
        self._answers = list(answers)
        #: (past, width) of what was asked
        self.asked: list[tuple[int, int]] = []
        #: the states of what was asked
        self.smashed: list[m.Tensor] = []
        self.waited: list[float] = []

    def ask(self, message: m.Infer, answer: type[m.InferHidden]) -> m.InferHidden:
        self.asked.append((message.past, message.smashed.shape[1]))
        self.smashed.append(message.smashed)
        error = self._answers.pop(0)
        if error is not None:
            raise error
        return answer(message.smashed)

    def submit(self, message: m.AnyMessage) -> None:
        raise AssertionError("nothing that training asks is expected")

    def wait_for_session(self, timeout_s: float) -> None:
        self.waited.append(timeout_s)
        if timeout_s <= 0:
            raise HubUnreachable("the hub did not come back")


def generation(answers: Sequence[Exception | None], comeback_s: float = 30.0) -> tuple[HubMiddle, Script, int]:
    """A stream of two positions that the hub has answered; what it answers from then on is told."""
    script = Script(None, *answers)
    middle = HubMiddle(cast(HubClient, script), 0)
    middle.comeback_s = comeback_s
    stream = middle.open_stream()
    middle.infer(SMASHED.expand(1, 2, 4), Layout.from_ints((), 1, 0, 2, 64), stream, ())
    script.asked.clear()
    return middle, script, stream


def next_token(middle: HubMiddle, stream: int) -> torch.Tensor:
    return middle.infer(SMASHED, Layout.from_ints((), 1, 2, 1, 64), stream, ())


@pytest.mark.parametrize(
    ("answers", "asked"),
    [
        ([missing(0), None, None], [(2, 1), (0, 2), (2, 1)]),
        ([missing(1), None, None], [(2, 1), (1, 1), (2, 1)]),
        # Lost again before the replay is through: a second restart, or another eviction.
        ([missing(0), LOST, None, None], [(2, 1), (0, 2), (0, 2), (2, 1)]),
        ([missing(1), LOST, missing(0), None, None], [(2, 1), (1, 1), (1, 1), (0, 2), (2, 1)]),
        ([LOST, missing(0), None, missing(0), None, None], [(2, 1), (2, 1), (0, 2), (2, 1), (0, 2), (2, 1)]),
    ],
)
def test_what_the_hub_lacks_is_sent_again_however_often_it_is_lost(
    answers: list[Exception | None], asked: list[tuple[int, int]]
) -> None:
    middle, script, stream = generation(answers)
    assert torch.equal(next_token(middle, stream), SMASHED)
    assert script.asked == asked


def test_a_hub_that_is_away_is_waited_for_as_long_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("edge.middle.time.monotonic", lambda: now)
    middle, script, stream = generation([LOST, None])

    def lost_late(timeout_s: float) -> None:
        nonlocal now
        script.waited.append(timeout_s)
        now += 1000.0

    # However long the first answer took, the waiting begins when the hub is lost.
    assert torch.equal(next_token(middle, stream), SMASHED)
    assert script.waited == [30.0]
    monkeypatch.setattr(script, "wait_for_session", lost_late)
    script._answers = [LOST, LOST]
    with pytest.raises(LinkLost):
        next_token(middle, stream)
    middle.comeback_s = math.inf
    script._answers = [LOST, LOST, None]
    assert torch.equal(next_token(middle, stream), SMASHED)
    assert script.waited[-1] == math.inf


def test_the_waiting_begins_when_the_hub_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [0.0]
    monkeypatch.setattr("edge.middle.time.monotonic", lambda: times[0])
    middle, script, stream = generation([])
    original = script.ask

    def slow(message: m.Infer, answer: type[m.InferHidden]) -> m.InferHidden:
        times[0] += 100.0
        return original(message, answer)

    monkeypatch.setattr(script, "ask", slow)
    script._answers = [LOST, None]
    assert torch.equal(next_token(middle, stream), SMASHED)


def test_what_else_the_hub_refuses_is_told() -> None:
    middle, _, stream = generation([HubError(ErrorCode.BEHIND, "adapter version 0 is no longer served")])
    with pytest.raises(HubError, match="no longer served"):
        next_token(middle, stream)


# -- the dtype on the wire ---------------------------------------------------------------------------------


def states(seed: int, width: int) -> torch.Tensor:
    return torch.randn(2, width, 300, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("wire", [None, "f32", "bf16", "f16", "q8"])
def test_a_replay_has_the_bytes_that_were_sent_before(wire: str | None) -> None:
    """Positions 1 and 2 were sent in two requests, with the rows changing places between them."""
    script = Script(None, None, missing(1), None, None)
    middle = HubMiddle(cast(HubClient, script), 0, wire)
    stream = middle.open_stream()
    for past, width, order in ((0, 2, ()), (2, 1, (1, 0)), (3, 1, ())):
        middle.infer(states(past, width), Layout.from_ints((), 2, past, width, 64), stream, order)
    first, second, _, again, _ = [
        from_wire(tensor, dtype=torch.float32, shape=(2, None, 300)) for tensor in script.smashed
    ]
    assert script.asked[3] == (1, 2)
    assert {tensor.dtype for tensor in script.smashed} == {wire or "f32"}
    assert torch.equal(again, torch.cat([first[[1, 0], 1:], second], dim=1))
    assert script.smashed[3].nbytes == sum(len(chunk) for chunk in script.smashed[3].chunks)


def test_what_fp16_cannot_hold_is_not_sent() -> None:
    script = Script()
    middle = HubMiddle(cast(HubClient, script), 0, "f16")
    large = SMASHED * 1e6
    with pytest.raises(InputError, match="use --wire bf16 or int8"):
        middle.infer(large, Layout.from_ints((), 1, 0, 1, 64), middle.open_stream(), ())
    with pytest.raises(InputError, match="use --wire bf16 or int8"):
        middle.send_smashed(Part(0, 0, 1, 1), large, Layout.from_ints((), 1, 0, 1, 64))
    with pytest.raises(InputError, match="use --wire bf16 or int8"):
        middle.send_gradient(Part(0, 0, 1, 1), large)
    assert not script.asked
