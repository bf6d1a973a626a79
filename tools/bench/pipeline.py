"""Training in micro-batches beside its bound; what gradients by edge cost, and what recomputing saves.

The measuring processes call `steps`, `by_edge` and `layers_again`; the other functions make rows of what they return.
"""

from __future__ import annotations

import random
import statistics
import string
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tools.bench.processes import once, running_hub
from tools.table import Row, at_least, reported

if TYPE_CHECKING:
    from tools.bench.groups import Bench

_WORK = "LoRA training step 4 x 128, hub and edge on a core each"
PIPELINED = f"{_WORK}, 2 micro-batches: share of the bound max(edge, unsplit - edge) from the parts in the same run"
SPEEDUP = f"{_WORK}, 2 micro-batches: speed / unsplit on one thread"
AT_ONCE = f"{_WORK}, whole batch at once: speed / unsplit on one thread"
BY_EDGE = "hub's forward and backward of 8 edges x 1 x 128, time, gradients by edge / one joint gradient"
BY_EDGE_BYTES = "bytes of B's gradients per edge / bytes of B's adapter"
AGAIN_MEMORY = "memory that the hub's step of 8 x 256 adds, --recompute / kept graph"
AGAIN_TIME = "hub's forward and backward of 8 x 256, time, --recompute / kept graph"
ROWS = (PIPELINED, SPEEDUP, AT_ONCE, BY_EDGE, BY_EDGE_BYTES, AGAIN_MEMORY, AGAIN_TIME)


def pipeline(bench: Bench) -> list[Row]:
    """All rows of this module."""
    return [*_pipelined(bench), *_by_edge(bench), *_recomputed(bench)]


def _pipelined(bench: Bench) -> list[Row]:
    folder, model = bench.folder / "pipeline", bench.models.standard
    folder.mkdir(parents=True)
    letters = random.Random(0).choices(string.ascii_lowercase + " ", k=128 * 4 * 80)
    (folder / "data.txt").write_text("".join(letters))
    with running_hub(folder, model, "--cohort", "1", "--round-steps", "1000") as hub:
        seconds = once(
            folder, "pipelined_steps", join=f"@{hub.join_file}", state=str(folder / "edge"), model=str(model),
            data=str(folder / "data.txt"), repeats=bench.repeats(9),
        )  # fmt: skip
    found = {name: statistics.median(values) for name, values in seconds.items()}
    bound = max(found["edge"], found["unsplit"] - found["edge"])
    bench.say(
        f"training step: unsplit {found['unsplit']:.3f} s, of which the edge's part {found['edge']:.3f} s and the "
        f"hub's {found['unsplit'] - found['edge']:.3f} s, so the bound is {bound:.3f} s; "
        f"at once {found['at once']:.3f} s, in 2 micro-batches {found['pipelined']:.3f} s"
    )
    return [
        at_least(PIPELINED, bound / found["pipelined"], 0.9),
        reported(SPEEDUP, found["unsplit"] / found["pipelined"]),
        reported(AT_ONCE, found["unsplit"] / found["at once"]),
    ]


def _by_edge(bench: Bench) -> list[Row]:
    found = once(bench.folder, "gradients_by_edge", model=str(bench.models.standard), repeats=bench.repeats(9))
    by_edge, joint = statistics.median(found["by edge"]), statistics.median(found["joint"])
    bench.say(f"forward and backward of 8 edges: by edge {by_edge:.3f} s, joint {joint:.3f} s")
    return [reported(BY_EDGE, by_edge / joint), reported(BY_EDGE_BYTES, found["bytes"][0])]


def _recomputed(bench: Bench) -> list[Row]:
    model, repeats = str(bench.models.standard), bench.repeats(5)
    kept, again = (
        once(bench.folder, "layers_again", model=model, recompute=recompute, repeats=repeats)
        for recompute in (False, True)
    )
    for name, found in (("graph kept", kept), ("layers run again", again)):
        bench.say(f"{name}: {found['bytes'] / 2**20:.0f} MiB, {statistics.median(found['seconds']):.3f} s")
    return [
        reported(AGAIN_MEMORY, again["bytes"] / kept["bytes"]),
        reported(AGAIN_TIME, statistics.median(again["seconds"]) / statistics.median(kept["seconds"])),
    ]


# -- in the measuring processes ----------------------------------------------------------------------------


class _Clock:
    """Called before each of the edge's steps: what the last one took, by its kind; then one step of the stock run."""

    def __init__(self, unsplit_step: Callable[[Any], object], warm: int) -> None:
        self._unsplit_step = unsplit_step
        self._warm = warm
        self._step = 0
        self._began = 0.0
        self.seconds: dict[str, list[float]] = {"pipelined": [], "at once": [], "edge": [], "unsplit": []}
        self.waited = 0.0

    @property
    def micros(self) -> int:
        """Steps are taken at once and in micro-batches, in turn."""
        return 2 if self._step % 2 else 1

    def between(self, batch: Any) -> None:
        now = time.perf_counter()
        if self._step > self._warm:
            took = now - self._began
            self.seconds["pipelined" if self.micros > 1 else "at once"].append(took)
            if self.micros == 1:
                self.seconds["edge"].append(took - self.waited)
        self._step += 1
        started = time.perf_counter()
        self._unsplit_step(batch)
        if self._step > self._warm:
            self.seconds["unsplit"].append(time.perf_counter() - started)
        self._began = time.perf_counter()


def steps(join: str, state: str, model: str, data: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of whole steps by `edge join`, of the edge's own work in them, and of the stock run between them."""
    from tools.bench.training import Unsplit, _options, run_edge

    clock = _Clock(Unsplit(model).step, warm=4)
    with _patched(clock):
        count = 2 * repeats + 5
        run_edge(_options(join, state, model, data, None, batch=4, seq=128, noise=0.02, steps=count, micro_batches="2"))
    return clock.seconds


@contextmanager
def _patched(clock: _Clock) -> Iterator[None]:
    """Have the edge take its steps at once and in micro-batches in turn, and tell how long it waited in each."""
    import edge.join
    import edge.trainer
    from edge.data import Batch, BatchSource
    from edge.trainer import Trainer

    split, account = edge.trainer.split, Trainer._account

    class Source(BatchSource):
        def batch(self, k: int) -> Batch:
            batch = super().batch(k)
            clock.between(batch)
            return batch

    def noted(self: Trainer, started: float, tokens: int, taken: Any) -> None:
        clock.waited = taken.times.waiting
        account(self, started, tokens, taken)

    edge.join.BatchSource = Source  # type: ignore[misc]
    edge.trainer.split = lambda batch, micros: split(batch, clock.micros)
    Trainer._account = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        edge.join.BatchSource, edge.trainer.split = BatchSource, split  # type: ignore[misc]
        Trainer._account = account  # type: ignore[method-assign]


def _engine(model: str, recompute: bool = False) -> Any:
    import torch

    from blocks import adapters
    from blocks.optimizer import Schedule
    from blocks.source import open_model
    from hub.engine import Engine, EngineSettings

    torch.set_num_threads(1)
    files = open_model(model)
    spec = adapters.make_spec(files.config, 8, 16.0)
    settings = EngineSettings(
        spec, Schedule(1e-3, 0, 1.0, 0.0), torch.float32, (torch.device("cpu"),), lambda: 1 << 20, recompute
    )
    engine = Engine(files.config, files.source, settings)
    engine.set_trained(adapters.initial(files.config, spec, 0))
    return engine


def _items(engine: Any, edges: int, rows: int, width: int) -> list[Any]:
    import torch

    from blocks.codec import to_wire
    from blocks.layout import Layout
    from hub.jobs import Place, StepItem

    generator = torch.Generator().manual_seed(0)
    layout, place = Layout.from_ints((), rows, 0, width), Place(1, engine.num_layers - 1)
    states = [torch.randn(rows, width, engine.hidden_size, generator=generator) for _ in range(edges)]
    return [StepItem(edge, place, layout, rows * width, to_wire(state)) for edge, state in enumerate(states)]


def _forward_and_backward(engine: Any, items: list[Any]) -> float:
    started = time.perf_counter()
    engine.step_forward(items)
    engine.step_backward({item.session: item.smashed for item in items})
    return time.perf_counter() - started


def by_edge(model: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of the hub's work for 8 edges, in turn with gradients by edge and with autograd's joint ones."""
    engine = _engine(model)
    items = _items(engine, 8, 1, 128)
    factors = [factors["training_copy"] for layer in engine._lora for factors in (layer.lora_A, layer.lora_B)]
    apart = [factor.forward for factor in factors]
    seconds: dict[str, list[float]] = {"by edge": [], "joint": [], "bytes": []}
    for turn in range(repeats + 1):
        took = _forward_and_backward(engine, items)
        size = sum(value.nbytes for value in engine.edge_gradients()[0].values())
        engine.apply_step([])
        for factor in factors:
            del factor.forward
        joint = _forward_and_backward(engine, items)
        engine.apply_step([])
        for factor, forward in zip(factors, apart, strict=True):
            factor.forward, factor.weight.grad = forward, None
        if turn:
            seconds["by edge"].append(took)
            seconds["joint"].append(joint)
    inside = [p.nbytes for name, p in engine._trained.items() if engine._layer_of[name] < engine.num_layers - 1]
    seconds["bytes"].append(size / sum(inside))
    return seconds


def layers_again(model: str, recompute: bool, repeats: int) -> dict[str, Any]:
    """Bytes that the peak of the process grows by in the hub's steps of 8 x 256, and their seconds."""
    from pathlib import Path

    from tools.bench.processes import peak_bytes

    engine = _engine(model, recompute)
    _forward_and_backward(engine, _items(engine, 1, 1, 16))
    items = _items(engine, 1, 8, 256)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    seconds = [_forward_and_backward(engine, items) for _ in range(repeats + 1)][1:]
    return {"bytes": peak_bytes() - before, "seconds": seconds}
