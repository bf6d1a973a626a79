"""The process that fuzzes: `python -m tools.fuzz.child TARGET FIGURES SECONDS CORPUS CRASH`. Started by `run.py`."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

from tools.fuzz.meter import Meter
from tools.fuzz.run import MOST_MB, MOST_MS
from tools.fuzz.targets import target

#: What counts as covered.
_OURS = ["messaging", "blocks.layout", "blocks.planes", "hub.worker", "tools.fuzz"]
#: Inputs before figures count: the first ones import modules and fill caches.
_WARM = 300
_LONGEST = 20_000


class Slow(Exception):
    """One input took more time or memory than any may."""


def main() -> None:
    """Fuzz until the time is over; libFuzzer then ends the process."""
    name, figures, seconds, corpus, crash = sys.argv[1:]
    with atheris.instrument_imports(include=_OURS):
        fuzzed = target(name)
    for seed in fuzzed.seeds():
        (Path(corpus) / f"seed-{hashlib.sha256(seed).hexdigest()[:16]}").write_bytes(seed)
    meter = Meter()
    flags = [
        f"-max_total_time={seconds}",
        f"-max_len={_LONGEST}",
        f"-exact_artifact_path={crash}",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *flags, corpus], lambda data: _one(fuzzed.run, data, meter, Path(figures)))
    atheris.Fuzz()


def _one(run: Callable[[bytes], None], data: bytes, meter: Meter, figures: Path) -> None:
    before = meter.worst_ms, meter.worst_mb
    meter.measure(lambda: run(data))
    if meter.calls == _WARM:
        meter.worst_ms = meter.worst_mb = 0.0
    elif meter.calls > _WARM and (meter.worst_ms, meter.worst_mb) != before:
        figures.write_text(json.dumps(asdict(meter)))
        if meter.worst_ms > MOST_MS or meter.worst_mb > MOST_MB:
            raise Slow(f"{meter.worst_ms:.0f} ms, {meter.worst_mb:.0f} MB")


if __name__ == "__main__":
    main()
