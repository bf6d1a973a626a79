"""What the files thread answers a fetch with: the bytes as they are, or packed where the edge can unpack them."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import messaging.messages as m
from blocks.planes import unpack
from hub.filing import Filing
from messaging.console import Journal
from messaging.errors import ErrorCode
from tests.support.here import Blob

WEIGHTS = bytes(torch.full((3000,), 0.5).view(torch.uint8).numpy())


def ask(resources: dict[str, Any], message: m.Fetch) -> m.AnyMessage:
    library = SimpleNamespace(open=resources.__getitem__)
    filing = Filing(cast("Any", library), cast("Any", None), Journal(), lambda job: job())
    answers: list[m.AnyMessage] = []
    here = threading.Event()
    filing.fetch(message, lambda answer: (answers.append(answer), here.set())[0])  # type: ignore[func-returns-value]
    assert here.wait(10)
    filing.close()
    return answers[0]


@pytest.mark.parametrize(("element", "offset", "length"), [(4, 0, 4096), (4, 3, 4096), (2, 11_000, 4096), (4, 0, 4)])
def test_numbers_are_packed_when_that_was_asked_for(element: int, offset: int, length: int) -> None:
    answer = ask({"w": Blob(WEIGHTS)}, m.Fetch("w", offset, length, element))
    assert isinstance(answer, m.Chunk)
    expected = WEIGHTS[offset : offset + length]
    if length < 100:
        assert (answer.element, b"".join(answer.data.chunks)) == (0, expected)
        return
    assert answer.element == element
    assert answer.data.nbytes < len(expected)
    assert unpack(answer.data.chunks, element, len(expected)) == expected
    assert (answer.total, answer.offset) == (len(WEIGHTS), offset)


@pytest.mark.parametrize(("data", "element"), [(WEIGHTS, 0), (os.urandom(8000), 4), (b"", 4)])
def test_else_they_come_as_they_are(data: bytes, element: int) -> None:
    answer = ask({"w": Blob(data)}, m.Fetch("w", 0, 4096, element))
    assert isinstance(answer, m.Chunk)
    assert (answer.element, b"".join(answer.data.chunks)) == (0, data[:4096])


def test_whatever_goes_wrong_is_an_answer(tmp_path: Path) -> None:
    answer = ask({}, m.Fetch("w", 0, 4096, 4))
    assert isinstance(answer, m.Error)
    assert answer.code == ErrorCode.COMPUTE
