"""Row 20: the hub forgets a generation in the middle of it: evicted for another's sake, or the hub restarted."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from tools.faults.fault import Fault, Setting
from tools.programs import Programs, free_ports
from tools.table import Row, at_least, at_most

_PROMPT = "Patient: the history of the present complaint"
_TOKENS = 40
ROWS = (
    "20 evicted while decoding: tokens that differ from an undisturbed run",
    "20 evicted while decoding: evictions",
    "20 hub restarted while decoding: tokens that differ from an undisturbed run",
    "20 hub restarted while decoding: restarts",
)


class _At:
    """A streamer for `generate`: does something after some of its tokens."""

    def __init__(self, deeds: dict[int, Callable[[], object]]) -> None:
        self._deeds = deeds
        self._count = 0

    def put(self, ids: object) -> None:
        """Called by transformers after every token."""
        self._count += 1
        self._deeds.get(self._count, lambda: None)()

    def end(self) -> None:
        """Called by transformers at the end."""


def narrow() -> None:
    """In the hub's process: KV memory for one and a third of these generations; a stream is idle at once."""
    import hub.serve
    import hub.streams

    hub.streams._IDLE_S = 0.0
    # Five layers, keys and values of 64 numbers each, float32: 64 positions, in steps of 16.
    hub.serve.kv_bytes = lambda devices, share=1: 2 * 64 * 5 * 64 * 4


def forgotten(setting: Setting) -> Sequence[Row]:
    """Both, one after the other, with noise: the same bytes have to be replayed, not noise drawn again."""
    with Programs(setting.folder) as programs, ExitStack() as owned:
        ports = free_ports()
        hub = programs.serve(*ports, prepare=narrow)
        one, other = (_connect(hub.join, setting, name, owned) for name in ("one", "other"))
        expected = _tokens(one)

        def take_the_room() -> None:
            # The other generation needs what this one holds.
            other.generate(**_given(other), max_new_tokens=32)

        evicted = _tokens(one, _At({8: take_the_room, 24: take_the_room}))
        hub.until(lambda live: live["evicted"] >= 2, "two evictions")
        evictions = hub.status()["live"]["evicted"]
        restarts: list[Any] = []

        def restart(how: signal.Signals) -> Callable[[], None]:
            def act() -> None:
                (restarts[-1] if restarts else hub).process.end(how)
                restarts.append(programs.serve(*ports, prepare=narrow))

            return act

        each = setting.count(10, 1)
        ways = (signal.SIGTERM, signal.SIGKILL)
        at = range(4, 4 + 4 * (each + 1), 4)
        deeds: dict[int, Callable[[], object]] = {k: restart(ways[n % 2]) for n, k in enumerate(at)}
        restarted = _tokens(one, _At(deeds))
    return (
        at_most(ROWS[0], _differing(expected, evicted), 0),
        at_least(ROWS[1], evictions, 2),
        at_most(ROWS[2], _differing(expected, restarted), 0),
        at_least(ROWS[3], len(restarts), each),
    )


def _connect(join: str, setting: Setting, name: str, owned: ExitStack) -> Any:
    import edge

    model = edge.connect(join, state=setting.folder / name, name=name, noise=0.02)
    owned.enter_context(model.hub)
    return model


def _given(model: Any) -> dict[str, Any]:
    return {**model.hub.tokenizer(_PROMPT, return_tensors="pt"), "do_sample": False, "pad_token_id": 0}


def _tokens(model: Any, streamer: _At | None = None) -> list[int]:
    """Greedy; the noise is drawn from a fixed start, so that two runs send the same."""
    model.hub.noise.begin("experiment", model.hub.tokenizer(_PROMPT, return_tensors="pt").input_ids)
    out = model.generate(**_given(model), min_new_tokens=_TOKENS, max_new_tokens=_TOKENS, streamer=streamer)
    return [int(token) for token in out[0]]


def _differing(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


FAULTS = (Fault("20", "a generation that the hub forgets in the middle", ROWS, forgotten),)
