"""The groups of rows: each starts the processes that it needs and returns its rows."""

from __future__ import annotations

import random
import statistics
import string
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tools.bench import client_batch, drafting, edge_memory, int8, pipeline, replicas
from tools.bench.context import TIMES, context
from tools.bench.hub_alone import ROWS as HUB_ROWS
from tools.bench.hub_alone import hub_alone
from tools.bench.models import HIDDEN, Models
from tools.bench.processes import ROOT, Hub, Worker, once, running_hub, running_workers
from tools.bench.relay import Relay
from tools.bench.sessions import ROWS as SESSION_ROWS
from tools.bench.sessions import sessions
from tools.table import Row, Skipped, at_least, at_most, reported

NOISE = 0.02
MIB = 2**20
DATA = ROOT.parent / "shared" / "data"
STORIES, SHAKESPEARE = DATA / "llama-stories260K-hf", DATA / "corpus-tinyshakespeare" / "input.txt"

DECODE = "decoding 64 tokens, hidden 512 x 16 layers, split / unsplit speed"
PREFILL = {tokens: f"prefill of {tokens:,} tokens, split / unsplit speed" for tokens in (512, 2048)}
TRAINING = "LoRA training step 4 x 128, split / unsplit speed"
MEMORY = {who: f"peak memory of {who}, MiB" for who in ("the edge", "the hub", "the unsplit model")}
SENT, RECEIVED = "bytes sent per decoded token", "bytes received per decoded token"
MASK = "bytes of a mask per row, left-padded to 2,048"
LOADING = "edge memory / bytes of its own tensors, 1.1 billion parameters"
CURVE = "held-out loss while fine-tuning, split - unsplit, relative"
PLANNER = "peak memory, predicted / measured"
_PLANNER_ROWS = tuple(
    f"{PLANNER}, {model} {cut}" for model in ("qwen3", "mistral", "starcoder2") for cut in ("1:1", "3:1", "2:4")
)


@dataclass(frozen=True)
class Bench:
    """What the groups share."""

    models: Models
    folder: Path
    console: Console
    quick: bool

    def repeats(self, usual: int) -> int:
        """Repetitions behind a median."""
        return min(usual, 2) if self.quick else usual

    def say(self, text: str) -> None:
        """A line about what was found."""
        self.console.print(text, highlight=False)


Group = Callable[[Bench], Sequence[Row | Skipped]]


def connect(worker: Worker, hub: Hub, state: Path, model: Path, noise: float = NOISE) -> int:
    """Let a worker join as an edge; the bytes of its own tensors."""
    return int(worker.ask("connect", join=f"@{hub.join_file}", state=str(state), noise=noise, model=str(model)))


def _ratio(seconds: Mapping[str, list[float]]) -> float:
    return statistics.median(seconds["unsplit"]) / statistics.median(seconds["split"])


def speed(bench: Bench) -> list[Row]:
    """Decoding and prefill of one session."""
    folder, model = bench.folder / "speed", bench.models.standard
    with running_hub(folder, model) as hub, running_workers(folder) as (worker,):
        connect(worker, hub, folder / "edge", model)
        worker.ask("load_unsplit", model=str(model))
        decode = worker.ask("compare", measure="decode", repeats=bench.repeats(7), tokens=64)
        prefill = {
            tokens: worker.ask("compare", measure="prefill", repeats=bench.repeats(usual), tokens=tokens)
            for tokens, usual in ((512, 9), (2048, 5))
        }
    for name, seconds in {DECODE: decode, **{PREFILL[tokens]: took for tokens, took in prefill.items()}}.items():
        both = {who: statistics.median(values) for who, values in seconds.items()}
        bench.say(f"{name.rpartition(',')[0]}: split {both['split']:.3f} s, unsplit {both['unsplit']:.3f} s")
    rows = [at_least(PREFILL[tokens], _ratio(seconds), 0.98) for tokens, seconds in prefill.items()]
    return [at_least(DECODE, _ratio(decode), 1.0), *rows]


def training(bench: Bench) -> list[Row]:
    """Whole training steps, optimizers included."""
    folder, model = bench.folder / "training", bench.models.standard
    folder.mkdir(parents=True)
    letters = random.Random(0).choices(string.ascii_lowercase + " ", k=128 * 4 * 60)
    (folder / "data.txt").write_text("".join(letters))
    with running_hub(folder, model, "--cohort", "1", "--round-steps", "1000") as hub:
        seconds = once(
            folder, "train", join=f"@{hub.join_file}", state=str(folder / "edge"), model=str(model),
            data=str(folder / "data.txt"), repeats=bench.repeats(9),
        )  # fmt: skip
    both = {who: statistics.median(values) for who, values in seconds.items()}
    bench.say(f"training step: split {both['split']:.3f} s, unsplit {both['unsplit']:.3f} s")
    return [at_least(TRAINING, _ratio(seconds), 0.98)]


def memory(bench: Bench) -> list[Row]:
    """Peak resident sizes of whole processes, Python and libraries included, over prefill and decoding."""
    from tools.bench.processes import peak_bytes

    folder, model = bench.folder / "memory", bench.models.standard
    with running_hub(folder, model) as hub, running_workers(folder, 2) as (edge, whole):
        connect(edge, hub, folder / "edge", model)
        whole.ask("load_unsplit", model=str(model))
        for worker, who in ((edge, "split"), (whole, "unsplit")):
            worker.ask("prefill", who=who, tokens=512)
            worker.ask("decode", who=who, tokens=64)
        peaks = (edge.ask("peak"), peak_bytes(hub.process.pid), whole.ask("peak"))
    return [reported(name, peak / MIB) for name, peak in zip(MEMORY.values(), peaks, strict=True)]


def wire(bench: Bench) -> list[Row]:
    """Bytes on the socket: what 32 more tokens cost, and what padding costs over no padding."""
    folder, model = bench.folder / "wire", bench.models.standard
    most = HIDDEN * 4 + 192
    with running_hub(folder, model) as hub:
        costs = _counted(hub, folder, model, ("decode", {"who": "split", "tokens": 64}),
                         ("decode", {"who": "split", "tokens": 32}))  # fmt: skip
    rows = 4
    small = bench.models.small
    with running_hub(folder / "mask", small) as hub:
        shape = {"rows": rows, "width": 2048}
        unpadded, with_padding = ("padded", {**shape, "pad": 0}), ("padded", {**shape, "pad": 301})
        masks = _counted(hub, folder / "mask", small, with_padding, unpadded)
    return [
        at_most(SENT, costs[0] / 32, most),
        at_most(RECEIVED, costs[1] / 32, most),
        at_most(MASK, masks[0] / rows, 16),
    ]


def _counted(
    hub: Hub, folder: Path, model: Path, more: tuple[str, Any], less: tuple[str, Any], wire: str | None = None
) -> tuple[float, float]:
    """How many more bytes `more` sends and receives than `less`: medians, so that a ping between counts not."""
    relay = Relay(hub.join_file.read_text())
    sent: list[int] = []
    received: list[int] = []
    with running_workers(folder) as (worker,):
        edge = str(folder / "edge")
        worker.ask("connect", join=relay.join, state=edge, noise=NOISE, model=str(model), wire=wire)
        for turn in range(6):
            counts = []
            for task, arguments in (less, more):
                before = relay.counts
                worker.ask(task, **arguments)
                time.sleep(0.1)
                after = relay.counts
                counts.append((after[0] - before[0], after[1] - before[1]))
            if turn:
                sent.append(counts[1][0] - counts[0][0])
                received.append(counts[1][1] - counts[0][1])
    relay.close()
    return statistics.median(sent), statistics.median(received)


def loading(bench: Bench) -> list[Row]:
    """The edge's memory from its start through 16 tokens, less that of a process with the same imports."""
    folder, model = bench.folder / "loading", bench.models.billion
    with running_hub(folder, model, dtype="bfloat16") as hub, running_workers(folder) as (worker,):
        own = connect(worker, hub, folder / "edge", model)
        worker.ask("decode", who="split", tokens=16)
        peak, modules = worker.ask("peak"), worker.ask("modules")
    imports = once(folder, "import_all", names=modules)
    bench.say(f"edge of 1.1 billion: peak {peak / MIB:.0f} MiB, imports {imports / MIB:.0f}, tensors {own / MIB:.0f}")
    return [at_most(LOADING, (peak - imports) / own, 1.15)]


def curve(bench: Bench) -> list[Row | Skipped]:
    """A pretrained small Llama on Shakespeare, noise off, by `edge join` and by peft."""
    for path in (STORIES, SHAKESPEARE):
        if not path.exists():
            return [Skipped(CURVE, f"{path} is not here")]
    folder, round_steps, rounds = bench.folder / "curve", 20, 2 if bench.quick else 5
    folder.mkdir(parents=True)
    text = SHAKESPEARE.read_text()
    (folder / "train.txt").write_text(text[:300_000])
    (folder / "held-out.txt").write_text(text[-20_000:])
    with running_hub(folder, STORIES, "--cohort", "1", "--round-steps", str(round_steps)) as hub:
        losses = once(
            folder, "curves", join=f"@{hub.join_file}", state=str(folder / "edge"), model=str(STORIES),
            train=str(folder / "train.txt"), held_out=str(folder / "held-out.txt"),
            steps=round_steps * rounds, round_steps=round_steps,
        )  # fmt: skip
    for who, values in losses.items():
        bench.say(f"held-out loss every {round_steps} steps, {who}: " + " ".join(f"{value:.4f}" for value in values))
    pairs = zip(losses["split"], losses["unsplit"], strict=True)
    return [at_most(CURVE, max(abs(a / b - 1) for a, b in pairs), 0.01)]


def planner(bench: Bench) -> list[Row]:
    """The planner's prediction of an edge's memory, held against edges that train."""
    from tools.bench_memory import bench as measure

    return [Row(row["row"], row["figure"], row["target"], row["met"]) for row in measure("held-out", bench.repeats(3))]


#: name -> (what it runs, the rows that it must give)
GROUPS: dict[str, tuple[Group, tuple[str, ...]]] = {
    "speed": (speed, (DECODE, *PREFILL.values())),
    "training": (training, (TRAINING,)),
    "pipeline": (pipeline.pipeline, pipeline.ROWS),
    "sessions": (sessions, SESSION_ROWS),
    "hub": (hub_alone, HUB_ROWS),
    "context": (context, tuple(TIMES.values())),
    "memory": (memory, tuple(MEMORY.values())),
    "wire": (wire, (SENT, RECEIVED, MASK)),
    "loading": (loading, (LOADING,)),
    "curve": (curve, (CURVE,)),
    "planner": (planner, _PLANNER_ROWS),
    "client_batch": (client_batch.client_batch, client_batch.ROWS),
    "replicas": (replicas.replicas, (replicas.SPEED, replicas.SHARE)),
    "int8": (int8.measure, int8.ROWS),
    "drafting": (drafting.drafting, drafting.ROWS),
    "edge-memory": (edge_memory.edge_memory, edge_memory.ROWS),
}
