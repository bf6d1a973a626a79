"""Runs the fuzzer in a process of its own, because libFuzzer ends the process that it runs in."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

#: What one input may take at most.
MOST_MS, MOST_MB = 100.0, 50.0
_START_S = 120


@dataclass(frozen=True)
class Outcome:
    """Executions; the worst CPU time and memory of one; the file with the input that failed, and what was said."""

    executions: int
    worst_ms: float
    worst_mb: float
    crash: Path | None
    said: str


def why_not() -> str | None:
    """Why there is no fuzzing on this machine; None if there is."""
    if sys.platform != "linux":
        return "the figures come from /proc, which only Linux has"
    if importlib.util.find_spec("atheris") is None:
        return "atheris is not installed (it exists for Linux and Python up to 3.13)"
    return None


def fuzz(target: str, seconds: int, corpus: Path, crashes: Path) -> Outcome:
    """Fuzz `target` for so long; `corpus` is added to, an input that fails is written to `crashes`."""
    corpus.mkdir(parents=True, exist_ok=True)
    crashes.mkdir(parents=True, exist_ok=True)
    figures = corpus.parent / f"{corpus.name}-{target}.json"
    figures.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tools.fuzz.child", target, str(figures), str(seconds), str(corpus)]
    artifact = crashes / f"crash-{target}"
    artifact.unlink(missing_ok=True)
    done = subprocess.run(
        [*command, str(artifact)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds + _START_S
    )
    said = done.stdout.decode(errors="replace")
    worst = json.loads(figures.read_text()) if figures.exists() else {"worst_ms": 0.0, "worst_mb": 0.0}
    figures.unlink(missing_ok=True)
    executed = re.search(r"stat::number_of_executed_units:\s+(\d+)", said)
    if done.returncode and not artifact.exists():
        raise RuntimeError(f"the fuzzer itself failed:\n{said[-3000:]}")
    crash = artifact if done.returncode else None
    _, _, why = said.partition("=== Uncaught Python exception: ===")
    return Outcome(int(executed[1]) if executed else 0, worst["worst_ms"], worst["worst_mb"], crash, why[:3000].strip())
