"""What no honest edge sends: noise, and valid messages with something wrong in them. Row 8."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Sequence
from dataclasses import replace

import messaging.messages as m
from messaging.errors import ProtocolError
from messaging.framing import SCHEMAS, decode, encode
from tools.faults.fault import Fault, Setting
from tools.faults.raw import RawEdge
from tools.fuzz import mutate, samples
from tools.fuzz.meter import Meter, resident_mb
from tools.fuzz.run import MOST_MB, MOST_MS, Outcome, fuzz, why_not
from tools.fuzz.targets import NAMES
from tools.programs import Programs
from tools.table import Row, Skipped, at_least, at_most, reported

_SECONDS = {"decode": 400, "layout": 50, "join_string": 50, "upload": 50, "planes": 50}
_FUZZED = ("8 fuzzing: inputs with another error than the named one", "8 fuzzing: worst input (ms)")
_FUZZED_MB = "8 fuzzing: worst input (MB)"
_MUTATED = "8 mutations: with another error than the named one"
_MUTATED_MS, _MUTATED_MB = "8 mutations: worst message (ms)", "8 mutations: worst message (MB)"
_FED = "8 mutations to a live hub: good requests answered between them (share)"
_GROWN = "8 mutations to a live hub: its memory grows by (MB)"
_SLOWEST = "8 mutations to a live hub: slowest good answer (s)"
_SEEN = "8 inputs seen in all"
#: Mutated messages between two good requests, which fit the queue of a socket.
_BURST = 40


def noise(setting: Setting) -> Sequence[Row | Skipped]:
    """Row 8."""
    rows: list[Row | Skipped] = []
    seen = 0
    if reason := why_not():
        rows += [Skipped(name, reason) for name in (*_FUZZED, _FUZZED_MB)]
    else:
        outcomes = [_fuzz(setting, name) for name in (NAMES[:1] if setting.quick else NAMES)]
        seen += sum(outcome.executions for outcome in outcomes)
        rows += [
            at_most(_FUZZED[0], sum(outcome.crash is not None for outcome in outcomes), 0),
            at_most(_FUZZED[1], max(outcome.worst_ms for outcome in outcomes), MOST_MS),
            at_most(_FUZZED_MB, max(outcome.worst_mb for outcome in outcomes), MOST_MB),
        ]
    wrong, meter = _mutations(setting.count(300_000, 2_000), setting)
    rows += [
        at_most(_MUTATED, wrong, 0),
        at_most(_MUTATED_MS, meter.worst_ms, setting.limit(MOST_MS, 5 * MOST_MS)),
        at_most(_MUTATED_MB, meter.worst_mb, MOST_MB),
    ]
    rows += _feed(setting, setting.count(1_000, 9))
    return [*rows, reported(_SEEN, seen + meter.calls)]


def _fuzz(setting: Setting, name: str) -> Outcome:
    outcome = fuzz(name, setting.count(_SECONDS[name], 3), setting.folder / name, setting.folder)
    if outcome.crash is not None:
        setting.console.print(f"{name} fails on {outcome.crash.read_bytes()!r}:\n{outcome.said}", markup=False)
    return outcome


def _mutations(count: int, setting: Setting) -> tuple[int, Meter]:
    """Mutated messages into the decoder: how many raise what they must not, and what they cost."""
    rng, meter, wrong = random.Random(8), Meter(), 0
    kinds = list(samples.KINDS.values())
    for number in range(count):
        frames = mutate.mutated(samples.frames(rng.choice(kinds), rng), rng)
        try:
            meter.measure(lambda frames=frames: decode(frames, frozenset(SCHEMAS)))  # type: ignore[misc]
        except ProtocolError:
            pass
        except Exception as error:
            wrong += 1
            setting.console.print(f"mutation {number} raised {error!r}: {frames!r}"[:2000], markup=False)
    return wrong, meter


def _feed(setting: Setting, bursts: int) -> list[Row | Skipped]:
    """Mutated messages to a real hub from an enrolled key, with a good request after each burst."""
    rng, answered, slowest = random.Random(16), 0, 0.0
    kinds = [samples.KINDS[kind] for kind in sorted(m.TO_HUB)]
    with Programs(setting.folder) as programs:
        hub = programs.serve()
        with RawEdge(hub, "noise") as edge:
            for burst in range(bursts):
                # One that trains takes the place of the one before: they do not pile up.
                edge.hello(train=True)
                # What the first ones load and cache is no growth.
                if burst == bursts // 3:
                    before = resident_mb(hub.process.pid)
                for _ in range(_BURST):
                    cls = rng.choice(kinds)
                    envelope = replace(edge.session, request=rng.choice([1, 2, 3 * m.UNORDERED_BASE]))
                    frames = [bytes(frame) for frame in encode(samples.packet(cls, rng, envelope))]
                    edge.send((mutate.mutated(frames, rng) or [b""]) if rng.random() < 0.8 else frames)
                begun = time.monotonic()
                answered += _answers(edge)
                slowest = max(slowest, time.monotonic() - begun)
            grown = resident_mb(hub.process.pid) - before
        hub.process.end(signal.SIGTERM)
        assert "Traceback" not in hub.process.err, str(hub.process)
    return [at_least(_FED, answered / bursts, 1), at_most(_GROWN, grown, MOST_MB), reported(_SLOWEST, slowest)]


def _answers(edge: RawEdge) -> bool:
    """Whether the hub still describes itself."""
    describe = m.Describe(m.PROTOCOL_VERSION, m.PROTOCOL_VERSION, "fault bench")
    try:
        return isinstance(edge.ask(describe), m.Description)
    except TimeoutError:
        return False


FAULTS: tuple[Fault, ...] = (
    Fault(
        "8",
        "fuzzing and mutated messages",
        (*_FUZZED, _FUZZED_MB, _MUTATED, _MUTATED_MS, _MUTATED_MB, _FED, _GROWN, _SLOWEST, _SEEN),
        noise,
    ),
)
