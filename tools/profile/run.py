"""Run a hub and an edge as real processes with their functions timed, and charge what was measured."""

from __future__ import annotations

import random
import signal
import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tools.bench.models import Models
from tools.bench.processes import cores
from tools.profile import probes
from tools.profile.spans import Span, labelled, read
from tools.profile.sweep import Lane, charge, innermost, undisturbed
from tools.programs import Programs

#: Windows at the beginning that are left out: prefill, first touches of memory.
_WARM_TOKENS, _WARM_STEPS = 8, 2


@dataclass(frozen=True)
class Profile:
    """Milliseconds by label, of one decoded token and of one training step."""

    token: dict[str, float]
    step: dict[str, float]


def standard(folder: Path) -> Path:
    """The model that the benchmarks have too: hidden 512, 16 layers."""
    return Models(folder / "models").standard


def measure(folder: Path, model: Path, tokens: int, steps: int) -> Profile:
    """Decode `tokens` tokens and take `steps` training steps of 4 x 128, partition 1:1, one thread a side.

    The steps are taken whole: in micro-batches edge and hub work at the same time, and no moment is one's alone."""
    with Programs(folder) as programs:
        generated = _spans(programs, model, "decode", (), _generate(model, tokens))
        cohort = ("--cohort", 1, "--round-steps", 100_000)
        trained = _spans(programs, model, "train", cohort, _train(folder, model, steps))
    begins = [span.begin for span in labelled(generated.main, probes.TOKEN_BEGINS)]
    starts = [span.begin for span in labelled(trained.main, probes.STEP)]
    return Profile(_parts(generated, begins[_WARM_TOKENS:]), _parts(trained, starts[_WARM_STEPS:]))


@dataclass(frozen=True)
class _Run:
    """The spans of both processes."""

    edge: list[Span]
    hub: list[Span]

    @property
    def main(self) -> list[Span]:
        """The edge's main thread."""
        return [span for span in self.edge if span.thread == "MainThread"]

    def lanes(self) -> list[Lane]:
        """The threads, the foremost first."""
        threads = (
            (self.edge, "MainThread", "link: waking the edge's main thread"),
            (self.hub, "compute 0", "hub: waking the compute thread"),
            (self.hub, "MainThread", "link: CURVE, socket, waking the hub"),
            (self.edge, "network", "link: CURVE, socket, waking the edge's network thread"),
        )
        return [
            Lane(innermost([span for span in spans if span.thread == thread]), arrival)
            for spans, thread, arrival in threads
        ]


def _parts(run: _Run, begins: Sequence[int]) -> dict[str, float]:
    lanes = run.lanes()
    return undisturbed([charge(lanes, begin, end) for begin, end in pairwise(begins)])


def _generate(model: Path, tokens: int) -> tuple[object, ...]:
    prompt = "The noise of the edge is drawn from a key that never leaves it"
    return ("generate", "--model", model, "--noise", 0.02, "--prompt", prompt, "--max-new-tokens", tokens, "--json")


def _train(folder: Path, model: Path, steps: int) -> tuple[object, ...]:
    data = folder / "data.txt"
    data.write_text("".join(random.Random(0).choices(string.ascii_lowercase + " ", k=128 * 4 * (steps + 20))))
    return ("join", "--model", model, "--noise", 0.02, "--data", data, "--partition", "1:1", "--batch", 4,
            "--seq", 128, "--steps", steps, "--micro-batches", 1, "--device", "cpu", "--headless")  # fmt: skip


def _spans(
    programs: Programs, model: Path, name: str, hub_options: Sequence[object], command: Sequence[object]
) -> _Run:
    """Run one command of the edge against a hub of its own, both to their ends."""
    folder = programs.folder / name
    folder.mkdir()
    files = {side: folder / f"{side}.json" for side in ("hub", "edge")}
    env = {
        side: {"PROFILE_SPANS": str(files[side]), "PROFILE_CORE": str(core)}
        for side, core in zip(files, cores(), strict=True)
    }
    hub = programs.serve(
        "--model", model, "--dtype", "float32", *hub_options, state=folder / "hub", env=env["hub"],
        prepare=probes.on_hub,
    )  # fmt: skip
    edge = programs.start(
        "edge", command[0], hub.join, *command[1:], "--state", folder / "edge", "--name", name, env=env["edge"],
        prepare=probes.on_edge,
    )  # fmt: skip
    done = edge.wait(600)
    if done.code:
        raise RuntimeError(f"the edge ended with {done.code}: {done.err[-2000:]}")
    hub.process.end(signal.SIGTERM)
    return _Run(read(files["edge"]), read(files["hub"]))
