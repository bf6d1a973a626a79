"""The hub's part of a training step alone: an engine in this process, fed with what replayed edges would send."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from blocks import adapters
from blocks.layout import Layout
from blocks.optimizer import Schedule
from blocks.source import open_model
from hub.engine import Engine, EngineSettings
from hub.jobs import Outcome, Place, StepItem
from messaging.messages import StepForward
from tools.bench.replay import PARTITION, Recording
from tools.bench.training import ALPHA, CLIP, DECAY, LR, RANK, WARMUP


class HubPart:
    """As `hub serve` has it, without sockets, scheduler and threads: bytes in, bytes out."""

    def __init__(self, model: Path, recording: Recording) -> None:
        files = open_model(str(model))
        spec = adapters.make_spec(files.config, RANK, ALPHA)
        settings = EngineSettings(
            spec, Schedule(LR, WARMUP, CLIP, DECAY), torch.float32, (torch.device("cpu"),), kv_budget=lambda: 0
        )  # fmt: skip
        self._engine = Engine(files.config, files.source, settings)
        self._engine.set_trained(adapters.initial(files.config, spec, seed=0))
        self._steps = recording.steps
        self._place = Place(PARTITION.p, self._engine.num_layers - PARTITION.q)

    def step(self, count: int) -> float:
        """Seconds for the joined step of `count` edges: forwards, backwards as they come in between, optimizer."""
        steps = [self._steps[number % len(self._steps)] for number in range(count)]
        micros = range(len(steps[0]))
        items = [[self._item(number, parts[at][0]) for number, parts in enumerate(steps)] for at in micros]
        grads = [{number: parts[at][1].grad_hidden for number, parts in enumerate(steps)} for at in micros]
        answers: list[dict[int, Outcome]] = []
        started = time.perf_counter()
        for at, joined in enumerate(items):
            answers.append(self._engine.step_forward(joined, at))
            if at:
                answers.append(self._engine.step_backward(grads[at - 1], at - 1))
        answers.append(self._engine.step_backward(grads[-1], len(grads) - 1))
        self._engine.apply_step(range(count))
        seconds = time.perf_counter() - started
        for answer in answers:
            bad = [error for error in answer.values() if isinstance(error, Exception)]
            if bad:
                raise bad[0]
        return seconds

    def _item(self, number: int, forward: StepForward) -> StepItem:
        rows, width, _ = forward.smashed.shape
        layout = Layout.from_ints(forward.layout, rows, 0, width)
        return StepItem(number, self._place, layout, forward.tokens, forward.smashed)


def load(model: str, recording: str) -> HubPart:
    """An engine on one thread."""
    torch.set_num_threads(1)
    return HubPart(Path(model), Recording.read(Path(recording)))
