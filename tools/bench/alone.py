"""The hub's engine in one process, without sockets, beside the same blocks of the unsplit model; both on one thread.

Sessions of different lengths decode from recorded states: those that layer 0 of the model gave for random tokens. The
unsplit blocks are transformers' own layers 1 .. N-2 with an ordinary batch, padded on the left to the longest session.
Seconds are CPU seconds of this process.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from blocks.adapters import make_spec
from blocks.codec import from_wire, to_wire
from blocks.layout import Layout
from blocks.optimizer import Schedule
from blocks.source import open_model
from hub.engine import Engine, EngineSettings
from hub.jobs import InferItem, Outcome, Place

CPU = torch.device("cpu")
KV_BYTES = 8 << 30


def lengths(sessions: int, shortest: int = 64, longest: int = 512) -> list[int]:
    """So many different lengths, evenly apart; the mean of both for one session."""
    if sessions == 1:
        return [(shortest + longest) // 2]
    return [shortest + (longest - shortest) * i // (sessions - 1) for i in range(sessions)]


def make_engine(folder: Path) -> Engine:
    """An engine of the model in this folder, float32."""
    files = open_model(str(folder))
    settings = EngineSettings(make_spec(files.config, 4, 8), Schedule(1e-4, 0, 1.0, 0.0), torch.float32, CPU, KV_BYTES)
    return Engine(files.config, files.source, settings)


def record(folder: Path, positions: int, rows: int) -> torch.Tensor:
    """What layer 0 of the model gives for random tokens, [rows, positions, hidden]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    base = model.base_model
    base.layers, base.norm = base.layers[:1], nn.Identity()
    ids = torch.randint(3, 250, (rows, positions), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        states = [base(row[None], use_cache=False).last_hidden_state for row in ids]
    return torch.cat(states)


def stock_blocks(folder: Path) -> PreTrainedModel:
    """transformers' own layers 1 .. N-2, fed with `inputs_embeds`."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().base_model
    base.layers, base.norm, base.embed_tokens = base.layers[1:-1], nn.Identity(), nn.Embedding(1, 1)
    base.config.num_hidden_layers = len(base.layers)
    for number, layer in enumerate(base.layers):
        layer.self_attn.layer_idx = number
    return base


class HubSide:
    """Streams of one engine, each with a prompt of its own length from the recorded states."""

    def __init__(self, engine: Engine, states: torch.Tensor) -> None:
        self.engine, self.states = engine, states
        self.place = Place(1, engine.num_layers - 1)

    def item(self, session: int, first: int, last: int) -> InferItem:
        """Positions first .. last of a session's recorded states."""
        smashed = to_wire(self.states[session % len(self.states), first:last][None].clone())
        return InferItem(session + 1, 1, 1, self.place, 0, Layout(1, first, last - first), (), smashed)

    def begin(self, prompts: Sequence[int]) -> None:
        """Prefill every session, one after the other."""
        for session, length in enumerate(prompts):
            _hidden(self.engine.infer([self.item(session, 0, length)])[0])

    def decode(self, prompts: Sequence[int], steps: int) -> float:
        """CPU seconds for `steps` tokens of every session, all in one batch; rolls back to the prompts first."""
        batches = [[self.item(s, n + i, n + i + 1) for s, n in enumerate(prompts)] for i in range(steps)]
        started = time.process_time()
        for items in batches:
            for outcome in self.engine.infer(items):
                assert not isinstance(outcome, Exception), outcome
        return time.process_time() - started

    def last(self, prompts: Sequence[int]) -> list[torch.Tensor]:
        """The hidden states of each session's next position, as one batch gives them."""
        return [_hidden(o) for o in self.engine.infer([self.item(s, n, n + 1) for s, n in enumerate(prompts)])]

    def end(self, sessions: int) -> None:
        """Free their memory."""
        for session in range(sessions):
            self.engine.close_session(session + 1)


class StockSide:
    """The unsplit blocks with one padded batch; `static`: transformers' preallocated cache instead of its growing."""

    def __init__(self, blocks: PreTrainedModel, states: torch.Tensor, static: bool) -> None:
        self.blocks, self.states, self.static = blocks, states, static

    @torch.inference_mode()
    def begin(self, prompts: Sequence[int], room: int) -> None:
        """Prefill all in one batch, padded on the left."""
        longest = max(prompts)
        batch = self.states.new_zeros(len(prompts), longest, self.states.shape[-1])
        self.mask = torch.zeros(len(prompts), longest + room, dtype=torch.long)
        self.mask[:, longest:] = 1
        for row, length in enumerate(prompts):
            batch[row, longest - length :] = self.states[row % len(self.states), :length]
            self.mask[row, longest - length : longest] = 1
        self.alike = len(set(prompts)) == 1
        config = self.blocks.config
        self.cache = StaticCache(config, longest + room) if self.static else DynamicCache(config=config)
        self._run(batch, 0)
        self.longest = longest

    def _run(self, states: torch.Tensor, past: int) -> torch.Tensor:
        upto = past + states.shape[1]
        mask = None if self.alike else self.mask[:, :upto]
        positions = (self.mask[:, :upto].cumsum(1) - 1).clamp(min=0)[:, past:]
        return self.blocks(inputs_embeds=states, attention_mask=mask, position_ids=positions,
                           past_key_values=self.cache, use_cache=True).last_hidden_state  # fmt: skip

    @torch.inference_mode()
    def decode(self, prompts: Sequence[int], steps: int) -> float:
        """CPU seconds for `steps` tokens of every row; rolls back to the prompts first."""
        self._roll_back()
        rows = range(len(prompts))
        inputs = [
            torch.stack([self.states[r % len(self.states), prompts[r] + i] for r in rows])[:, None] for i in range(steps)
        ]
        started = time.process_time()
        for i, states in enumerate(inputs):
            self._run(states, self.longest + i)
        return time.process_time() - started

    @torch.inference_mode()
    def last(self, prompts: Sequence[int]) -> list[torch.Tensor]:
        """The hidden states of each row's next position."""
        self._roll_back()
        states = torch.stack([self.states[r % len(self.states), n] for r, n in enumerate(prompts)])[:, None]
        return list(self._run(states, self.longest).split(1))

    def _roll_back(self) -> None:
        if isinstance(self.cache, StaticCache):
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.longest)
        elif extra := self.cache.get_seq_length() - self.longest:
            self.cache.crop(-extra)


def _hidden(outcome: Outcome) -> torch.Tensor:
    assert not isinstance(outcome, Exception), outcome
    return from_wire(outcome, dtype=torch.float32, shape=(None, None, None))
