"""How long a decoding session waits for its next token while another sends prompts: the real scheduler and engine.

There are no sockets, and the clock is the engine's CPU time: an edge asks again `THINK_S` after its answer. So the
figures do not depend on what else the machine does.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from hub.jobs import InferItem
from hub.scheduler import Scheduler
from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.scheduler.state import CHUNK, State
from tools.bench.alone import HubSide, make_engine, record

#: what an edge needs for a token of its own blocks
THINK_S = 0.009
DECODERS = 3
PROMPT, CONTEXT = 2048, 256
_PROMPTER = 100


@dataclass
class Figures:
    """Seconds: between two tokens of a decoding session, of each; and of each forward with a piece of a prompt."""

    gaps: list[float] = field(default_factory=list)
    pieces: list[float] = field(default_factory=list)


class Loop:
    """Sessions 0 .. DECODERS-1 decode; with `prompts`, session _PROMPTER sends one prompt after the other."""

    def __init__(self, hub: HubSide, chunk: int, prompts: bool) -> None:
        self.hub = hub
        self.scheduler = Scheduler(State(1, 1, 0, chunk=chunk))
        self.now = 0.0
        self.figures = Figures()
        self._numbers = count(1)
        self._asking: list[tuple[float, int]] = [(0.0, session) for session in range(DECODERS)]
        if prompts:
            self._asking.append((0.0, _PROMPTER))
        self._tokens = dict.fromkeys(range(DECODERS), 0)
        self._answered_at: dict[int, float] = {}
        self.prompts_left = 0

    def run(self, tokens: int, prompts: int) -> Figures:
        """Until every decoding session has so many tokens and so many prompts are answered."""
        self.prompts_left = prompts
        todo: list[act.Action] = []
        while min(self._tokens.values()) < tokens or self.prompts_left > 0:
            compute = [action for action in todo if isinstance(action, act.RunInfer)]
            self._hear([action for action in todo if isinstance(action, act.AnswerInfer)])
            todo = self._compute(compute[0]) if compute else self._next_asks()
        return self.figures

    def _hear(self, answers: Sequence[act.AnswerInfer]) -> None:
        for answer in answers:
            if isinstance(answer.answer, Exception):
                raise answer.answer
            session = answer.session - 1
            if session == _PROMPTER:
                self.prompts_left -= 1
            else:
                self._tokens[session] += 1
                if session in self._answered_at:
                    self.figures.gaps.append(self.now - self._answered_at[session])
                self._answered_at[session] = self.now
            heapq.heappush(self._asking, (self.now + THINK_S, session))

    def _next_asks(self) -> list[act.Action]:
        at, session = heapq.heappop(self._asking)
        self.now = max(self.now, at)
        return self.scheduler.handle(self._ask(session))

    def _ask(self, session: int) -> ev.Event:
        first, width = (0, PROMPT) if session == _PROMPTER else (CONTEXT + self._tokens[session], 1)
        item = self.hub.item(session, first, first + width)
        return ev.InferReceived(item.session, next(self._numbers), item, 1, width)

    def _compute(self, action: act.RunInfer) -> list[act.Action]:
        upto = {i: action.upto[at[:2]] for i, at in enumerate(action.requests) if at[:2] in action.upto}
        items = [item for _, _, item in action.requests if isinstance(item, InferItem)]
        started = time.process_time()
        outcomes = self.hub.engine.infer(items, upto)
        took = time.process_time() - started
        if upto:
            self.figures.pieces.append(took)
        self.now += took
        out: list[act.Action] = []
        while self._asking and self._asking[0][0] <= self.now:
            out += self.scheduler.handle(self._ask(heapq.heappop(self._asking)[1]))
        pairs = zip(action.requests, outcomes, strict=True)
        done = tuple((at[0], at[1], answer) for at, answer in pairs if answer is not None)
        return out + self.scheduler.handle(ev.InferDone(done))


def p95(values: Sequence[float]) -> float:
    """The value that 95 of 100 do not exceed."""
    return sorted(values)[max(-(-len(values) * 95 // 100) - 1, 0)]


def waiting(model: str, tokens: int, prompts: int) -> dict[str, float]:
    """Seconds, each a p95: between two tokens alone, beside prompts computed whole, beside prompts in pieces; a piece.

    Pieces take the longer the more of the prompt is behind them.
    """
    folder = Path(model)
    hub = HubSide(make_engine(folder), record(folder, PROMPT, 4))
    contexts = dict.fromkeys(range(DECODERS), CONTEXT)
    hub.begin(contexts)
    alone = Loop(hub, CHUNK, prompts=False).run(tokens, 0)
    whole = Loop(hub, PROMPT, prompts=True).run(4, prompts)
    pieces = Loop(hub, CHUNK, prompts=True).run(min(tokens, 20), prompts)
    return {
        "alone": p95(alone.gaps),
        "whole": p95(whole.gaps),
        "pieces": p95(pieces.gaps),
        "piece": p95(pieces.pieces),
    }
