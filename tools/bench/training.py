"""Training through `edge join` beside training with stock transformers and peft: seconds a step, and loss curves."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import edge.join
from edge.data import PACKS_EXACTLY, Batch, BatchSource, eval_batches, load_data
from edge.join import JoinOptions
from tools.bench.processes import Terminal

#: The hub's defaults, which the stock run follows.
RANK, ALPHA, LR, WARMUP, DECAY, CLIP, EPS = 8, 16.0, 1e-3, 10, 0.01, 1.0, 1e-5
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Unsplit:
    """Stock transformers, peft and torch: one model, one optimizer."""

    def __init__(self, model: str, start: dict[str, torch.Tensor] | None = None) -> None:
        whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, lora_dropout=0.0, task_type="CAUSAL_LM")
        self.model = get_peft_model(whole, config)
        named = {n.replace(".default.", "."): p for n, p in self.model.named_parameters() if p.requires_grad}
        if start is not None:
            assert named.keys() == start.keys()
            with torch.no_grad():
                for name, parameter in named.items():
                    parameter.copy_(start[name])
        self.parameters = list(named.values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, eps=EPS, weight_decay=DECAY)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / WARMUP))

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean loss over the target tokens."""
        loss: torch.Tensor = self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids,
            labels=batch.labels, use_cache=False,
        ).loss  # fmt: skip
        return loss

    def step(self, batch: Batch) -> float:
        """One step of AdamW; the loss before it."""
        self.model.train()
        loss = self.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def held_out(self, batches: Iterator[Batch]) -> float:
        """Mean loss per target token."""
        self.model.eval()
        total, tokens = 0.0, 0
        with torch.no_grad():
            for batch in batches:
                total += float(self.loss(batch)) * batch.tokens
                tokens += batch.tokens
        return total / tokens


def compare_steps(join: str, state: str, model: str, data: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of whole steps of 4 x 128 by `edge join`, live view on, and by the stock run between them."""
    unsplit = Unsplit(model)
    clock = _StepClock(unsplit, warm=2)
    with _patched_source(clock):
        train(join, state, model, data, repeats + 3)
    return {"split": clock.split, "unsplit": clock.unsplit}


class _StepClock:
    """Called before each of the edge's steps: notes how long the last one took, and takes one of the stock run."""

    def __init__(self, unsplit: Unsplit, warm: int) -> None:
        self._unsplit = unsplit
        self._warm = warm
        self._began: float | None = None
        self._step = 0
        self.split: list[float] = []
        self.unsplit: list[float] = []

    def between(self, batch: Batch) -> None:
        now = time.perf_counter()
        if self._began is not None and self._step > self._warm:
            self.split.append(now - self._began)
        self._step += 1
        started = time.perf_counter()
        self._unsplit.step(batch)
        if self._step > self._warm:
            self.unsplit.append(time.perf_counter() - started)
        self._began = time.perf_counter()


@contextlib.contextmanager
def _patched_source(clock: _StepClock) -> Iterator[None]:
    class Source(BatchSource):
        def batch(self, k: int) -> Batch:
            batch = super().batch(k)
            clock.between(batch)
            return batch

    edge.join.BatchSource = Source  # type: ignore[misc]
    try:
        yield
    finally:
        edge.join.BatchSource = BatchSource  # type: ignore[misc]


def train(join: str, state: str, model: str, data: str, steps: int, micros: int = 1) -> None:
    """So many steps of 4 x 128 by `edge join`, each in `micros` micro-batches, live view on."""
    shape: dict[str, Any] = {"batch": 4, "seq": 128, "noise": 0.02, "micro_batches": str(micros)}
    run_edge(_options(join, state, model, data, None, steps=steps, **shape))


def run_edge(options: JoinOptions) -> None:
    """`edge join` on a terminal of its own, so that its live view is on."""
    with tempfile.TemporaryDirectory() as folder:
        terminal = Terminal(Path(folder) / "screen")
        before = sys.stdout
        sys.stdout = open(terminal.near, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        try:
            edge.join.join(options)
        finally:
            sys.stdout = before
            terminal.close()


def curves(
    join: str, state: str, model: str, train: str, held_out: str, steps: int, round_steps: int
) -> dict[str, list[float]]:
    """Held-out losses by `edge join` without noise and by the stock run, before and after each round."""
    import json

    batch, seq = 8, 128
    run_edge(_options(join, state, model, train, held_out, batch=batch, seq=seq, noise=0.0, steps=steps))
    report = json.loads((Path(state) / "report.json").read_text())
    split: list[float] = report["held_out"]
    return {"split": split, "unsplit": _stock_curve(model, train, held_out, batch, seq, steps, round_steps)}


def _stock_curve(
    model: str, train: str, held_out: str, batch: int, seq: int, steps: int, round_steps: int
) -> list[float]:
    from blocks import adapters
    from blocks.source import open_model

    files = open_model(model)
    start = adapters.initial(files.config, adapters.make_spec(files.config, RANK, ALPHA), seed=0)
    unsplit = Unsplit(model, start)
    tokenizer = AutoTokenizer.from_pretrained(model)
    examples, apart = load_data([Path(train)], [Path(held_out)], tokenizer, seq)
    packs, pad = files.config.model_type in PACKS_EXACTLY, tokenizer.pad_token_id or 0
    source = BatchSource(examples, batch, seq, 0, packs, pad)
    measure: Callable[[], float] = lambda: unsplit.held_out(eval_batches(apart, batch, seq, packs, pad))  # noqa: E731
    losses = [measure()]
    for step in range(steps):
        unsplit.step(source.batch(step))
        if (step + 1) % round_steps == 0:
            losses.append(measure())
    return losses


def _options(
    join: str, state: str, model: str, data: str, held_out: str | None, *,
    batch: int, seq: int, noise: float, steps: int, micro_batches: str = "1",
) -> JoinOptions:  # fmt: skip
    settings: dict[str, Any] = {
        "join": join, "data": [Path(data)], "held_out": [Path(held_out)] if held_out else [], "model": model,
        "partition": "1:1", "profile": None, "noise": noise, "batch": batch, "seq": seq, "lr": None,
        "steps": steps, "state": Path(state), "name": "bench", "device": "cpu", "share_loss": False,
        "headless": False, "seed": 0,
        "micro_batches": micro_batches,
    }  # fmt: skip
    return JoinOptions(**settings)
