"""The fuzzing command and its meter."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from messaging.framing import SCHEMAS, decode
from tools.fuzz import samples
from tools.fuzz.__main__ import main
from tools.fuzz.meter import Meter
from tools.fuzz.run import why_not
from tools.fuzz.targets import NAMES, target

reason = why_not()


@pytest.mark.parametrize("name", NAMES)
def test_seeds_are_valid_inputs(name: str) -> None:
    seeds = target(name).seeds()
    assert seeds
    for seed in seeds:
        target(name).run(seed)


@pytest.mark.parametrize("kind", sorted(samples.KINDS))
def test_samples_are_valid(kind: int) -> None:
    for seed in range(20):
        packet = decode(samples.frames(samples.KINDS[kind], random.Random(seed)), frozenset(SCHEMAS))
        assert packet.message.kind == kind


@pytest.mark.slow
@pytest.mark.skipif(reason is not None, reason=str(reason))
def test_the_command_ends_with_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["join_string", "--seconds", "1", "--corpus", str(tmp_path / "c"), "--crashes", str(tmp_path)]) == 0
    assert "executions in 1 s, worst" in capsys.readouterr().out
    assert list((tmp_path / "c").iterdir())
    assert not list(tmp_path.glob("crash-*"))


@pytest.mark.skipif(reason is not None and "/proc" in reason, reason=str(reason))
def test_the_meter_sees_memory_that_is_free_again_and_calls_that_raise() -> None:
    meter = Meter()

    def greedy() -> None:
        bytearray(b"x") * 30_000_000
        raise KeyError

    with pytest.raises(KeyError):
        meter.measure(greedy)
    assert 25 < meter.worst_mb < 60
    assert meter.worst_ms > 0
    assert meter.calls == 1
