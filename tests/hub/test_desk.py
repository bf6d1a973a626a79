"""What the desk refuses before anything is computed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hub.credits import LEAST_BYTES, Credits
from hub.desk import Desk, Served
from hub.jobs import Place
from hub.scheduler.events import InferReceived
from messaging.errors import ErrorCode, HubError
from messaging.messages import Infer, Tensor, nbytes_of

SESSION: Any = SimpleNamespace(seat=1, place=Place(1, 5), key="edge")


def asked(dtype: str, rows: int) -> object:
    """What the desk of a hub with the least memory makes of rows of 128 positions, hidden size 64, float32 there."""
    served = Served("a model", "hash", "float32", 6, 64, 256)
    desk = Desk(served, SimpleNamespace(), 1, Credits(LEAST_BYTES), {}, {}, {}, "test")  # type: ignore[arg-type]
    shape = (rows, 128, 64)
    smashed = Tensor(dtype, shape, (bytes(nbytes_of(dtype, shape)),))
    return desk.event_of(SESSION, 1, Infer(0, 0, 0, (), (), smashed))


@pytest.mark.parametrize("dtype", ["f32", "bf16", "q8"])
def test_states_are_refused_by_what_they_take_at_the_hub_and_not_by_their_bytes(dtype: str) -> None:
    most = LEAST_BYTES // (128 * 64 * 4)
    assert isinstance(asked(dtype, most), InferReceived)
    with pytest.raises(HubError, match="take a smaller batch") as refused:
        asked(dtype, most + 1)
    assert refused.value.code is ErrorCode.CREDITS
