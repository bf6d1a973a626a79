"""The hub's engine in one process, without sockets, beside the same blocks of the unsplit model; both on one thread.

Sessions of different lengths decode from recorded states: those that layer 0 of the model gave for random tokens. The
unsplit blocks are transformers' own layers 1 .. N-2 with an ordinary batch, padded on the left to its longest session.
Seconds are CPU seconds of this process, so that others on the machine count little.
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
from hub.kv import StreamCache

CPU = torch.device("cpu")
KV_BYTES = 8 << 30
#: positions of the shortest and the longest session before they decode
SHORTEST, LONGEST = 32, 384
#: states are recorded for so many texts; further sessions have them again
_TEXTS = 8


def lengths(sessions: int, most: int) -> dict[int, int]:
    """`sessions` of `most` sessions, by number, with their lengths, evenly apart; the middle one for one session."""
    chosen = [most // 2] if sessions == 1 else [round((most - 1) * i / (sessions - 1)) for i in range(sessions)]
    return {number: SHORTEST + (LONGEST - SHORTEST) * number // max(most - 1, 1) for number in chosen}


def make_engine(folder: Path) -> Engine:
    """An engine of the model in this folder, float32."""
    torch.set_num_threads(1)
    files = open_model(str(folder))
    settings = EngineSettings(
        make_spec(files.config, 4, 8), Schedule(1e-4, 0, 1.0, 0.0), torch.float32, (CPU,), lambda: KV_BYTES
    )
    return Engine(files.config, files.source, settings)


def record(folder: Path, positions: int, texts: int = _TEXTS) -> torch.Tensor:
    """What layer 0 of the model gives for random tokens, [texts, positions, hidden]."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().base_model
    base.layers, base.norm = base.layers[:1], nn.Identity()
    ids = torch.randint(3, 250, (texts, positions), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        return torch.cat([base(row[None], use_cache=False).last_hidden_state for row in ids])


def stock_blocks(folder: Path) -> PreTrainedModel:
    """transformers' own layers 1 .. N-2, fed with `inputs_embeds`."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().base_model
    base.layers, base.norm, base.embed_tokens = base.layers[1:-1], nn.Identity(), nn.Embedding(1, 1)
    base.config.num_hidden_layers = len(base.layers)
    for number, layer in enumerate(base.layers):
        layer.self_attn.layer_idx = number
    return base


class HubSide:
    """Sessions 0, 1, ... of one engine; session i has the recorded text i (modulo their number)."""

    def __init__(self, engine: Engine, states: torch.Tensor) -> None:
        self.engine, self.states = engine, states
        self.place = Place(1, engine.num_layers - 1)

    def item(self, session: int, first: int, last: int) -> InferItem:
        """A request for positions first .. last of a session's text."""
        smashed = to_wire(self.states[session % len(self.states), first:last][None].clone())
        return InferItem(session + 1, 1, 1, self.place, 0, Layout(1, first, last - first), (), smashed)

    def begin(self, prompts: dict[int, int], piece: int = 128) -> None:
        """Prefill the sessions, one after the other, `piece` positions at a time."""
        for session, length in prompts.items():
            item = self.item(session, 0, length)
            for upto in range(piece, length + piece, piece):
                (answer,) = self.engine.infer([item], {0: min(upto, length)})
            hidden(answer)

    def decode(self, prompts: dict[int, int], steps: int) -> float:
        """CPU seconds for `steps` tokens of every session, all in one batch; rolls back to the prompts first."""
        batches = [[self.item(s, n + i, n + i + 1) for s, n in prompts.items()] for i in range(steps)]
        started = time.process_time()
        for items in batches:
            for outcome in self.engine.infer(items):
                assert not isinstance(outcome, Exception), outcome
        return time.process_time() - started

    def next(self, prompts: dict[int, int]) -> list[torch.Tensor]:
        """The hidden states of each session's next position, [1, 1, hidden], as one batch gives them."""
        return [hidden(outcome) for outcome in self.engine.infer([self.item(s, n, n + 1) for s, n in prompts.items()])]

    def cache(self, session: int) -> StreamCache:
        """What the engine holds of a session."""
        return self.engine._streams._caches[session + 1, 1]


class StockSide:
    """The unsplit blocks with one padded batch; `static`: transformers' preallocated cache instead of its growing one.

    Its keys and values are copied from the hub's streams; `next` shows that they are those of the same texts.
    """

    def __init__(self, blocks: PreTrainedModel, hub: HubSide, prompts: dict[int, int], room: int, static: bool) -> None:
        self.blocks, self.states, self.prompts = blocks, hub.states, prompts
        self.longest = max(prompts.values())
        self.mask = torch.ones(len(prompts), self.longest + room, dtype=torch.long)
        for row, length in enumerate(prompts.values()):
            self.mask[row, : self.longest - length] = 0
        config = blocks.config
        self.cache = StaticCache(config, self.longest + room) if static else DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            self.cache.update(*self._padded(hub, layer), layer)

    def _padded(self, hub: HubSide, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's keys and values of all sessions, [sessions, heads, longest, dim]."""
        rows = []
        for session, length in self.prompts.items():
            held = hub.cache(session).layers[layer]
            left = (0, 0, self.longest - length, 0)
            both = (held.keys[:, :, :length], held.values[:, :, :length])
            rows.append(tuple(nn.functional.pad(states, left) for states in both))
        return torch.cat([keys for keys, _ in rows]), torch.cat([values for _, values in rows])

    def _run(self, states: torch.Tensor, past: int) -> torch.Tensor:
        mask = self.mask[:, : past + 1] if len(self.prompts) > 1 else None
        positions = self.mask[:, : past + 1].sum(1, keepdim=True) - 1
        return self.blocks(inputs_embeds=states, attention_mask=mask, position_ids=positions,
                           past_key_values=self.cache, use_cache=True).last_hidden_state  # fmt: skip

    def _inputs(self, step: int) -> torch.Tensor:
        """[sessions, 1, hidden]"""
        texts = len(self.states)
        return torch.stack([self.states[session % texts, n + step] for session, n in self.prompts.items()])[:, None]

    @torch.inference_mode()
    def decode(self, steps: int) -> float:
        """CPU seconds for `steps` tokens of every session; rolls back to the prompts first."""
        self._roll_back()
        inputs = [self._inputs(step) for step in range(steps)]
        started = time.process_time()
        for step, states in enumerate(inputs):
            self._run(states, self.longest + step)
        return time.process_time() - started

    @torch.inference_mode()
    def next(self) -> list[torch.Tensor]:
        """The hidden states of each session's next position, [1, 1, hidden]."""
        self._roll_back()
        return list(self._run(self._inputs(0), self.longest).split(1))

    def _roll_back(self) -> None:
        if isinstance(self.cache, StaticCache):
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.longest)
        elif extra := self.cache.get_seq_length() - self.longest:
            self.cache.crop(-extra)


def hidden(outcome: Outcome | None) -> torch.Tensor:
    """The states that an answer holds."""
    assert outcome is not None, "a part is missing"
    if isinstance(outcome, Exception):
        raise outcome
    return from_wire(outcome, dtype=torch.float32, shape=(None, None, None))


# -- what a measuring process is asked ---------------------------------------------------------------------


def decoding(model: str, counts: Sequence[int], hub_only: Sequence[int], repeats: int, steps: int) -> dict[str, object]:
    """Seconds for one token of each of N sessions: {"hub" | "static" | "dynamic": {N: [seconds, ...]}}.

    `hub_only`: numbers of sessions that the unsplit blocks are not asked. Also {"apart": the largest relative
    difference between the hub's states and the unsplit ones}.
    """
    folder, most = Path(model), max(*counts, *hub_only)
    hub, blocks = HubSide(make_engine(folder), record(folder, LONGEST + steps)), stock_blocks(folder)
    hub.begin(lengths(most, most))
    seconds: dict[str, dict[int, list[float]]] = {"hub": {}, "static": {}, "dynamic": {}}
    apart = 0.0
    for count in sorted({*counts, *hub_only}):
        prompts = lengths(count, most)
        kinds = {"static": True, "dynamic": False} if count in counts else {}
        stock = {kind: StockSide(blocks, hub, prompts, steps, static) for kind, static in kinds.items()}
        for side in stock.values():
            pairs = zip(hub.next(prompts), side.next(), strict=True)
            apart = max(apart, *(float((a - b).abs().max() / b.abs().max()) for a, b in pairs))
        for turn in range(repeats + 1):
            took = {"hub": hub.decode(prompts, steps)} | {kind: side.decode(steps) for kind, side in stock.items()}
            for who, value in took.items():
                if turn:
                    seconds[who].setdefault(count, []).append(value / steps)
    return {**seconds, "apart": apart}


def begun(model: str, sessions: int, length: int) -> tuple[HubSide, dict[int, int]]:
    """An engine with so many sessions of one length, and these by number; the first steps of each batch are done."""
    folder = Path(model)
    hub, prompts = HubSide(make_engine(folder), record(folder, length + 8)), dict.fromkeys(range(sessions), length)
    hub.begin(prompts)
    hub.decode(prompts, 2)
    return hub, prompts


def memory(model: str, sessions: int, positions: int) -> float:
    """What the process grows by, by the bytes of the sessions' keys and values."""
    folder = Path(model)
    hub = HubSide(make_engine(folder), record(folder, positions, 1))
    hub.begin({sessions: positions})
    before = _resident()
    hub.begin(dict.fromkeys(range(sessions), positions))
    layers = [layer for layer in hub.cache(0).layers if layer.is_initialized]
    exact = sum(layer.keys[:, :, :positions].nbytes + layer.values[:, :, :positions].nbytes for layer in layers)
    return (_resident() - before) / (exact * sessions)


def _resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
