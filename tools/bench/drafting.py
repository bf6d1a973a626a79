"""Tokens per round trip where the edge guesses tokens and the hub verifies several at once.

The text: summaries of dialogues (DialogSum), as a pretrained model writes them that was taught to, here and now, on
the training dialogues. What it writes quotes its dialogue as summaries do ("#Person1#", names, words). Noise is off,
so that the tokens with and without drafting can be held against each other; they have to be the same.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.bench.processes import ROOT, Worker, once, running_hub, running_workers
from tools.bench.relay import Relay
from tools.table import Row, Skipped, at_least, at_most, reported

if TYPE_CHECKING:
    from tools.bench.groups import Bench

ROUND_TRIP_S = 0.05
DATA = ROOT.parent / "shared" / "data"
STORIES, DIALOGUES = DATA / "llama-stories260K-hf", DATA / "dialogsum"
#: A summary quotes its dialogue if at least this share of its tokens stands in runs of QUOTE tokens of the dialogue.
QUOTE, QUOTING = 4, 0.5
CONTEXT, NEW = 512, 64
COUNT, STORY_COUNT = 24, 8
TEACHING_STEPS, TEACHING_ROWS, LR = 300, 16, 2e-3

_LINK = "round trip of 50 ms, greedy summaries of dialogues"
QUOTED = f"{_LINK} that quote them: tokens per round trip"
QUOTED_ALONE = f"{_LINK} that quote them, nothing known of earlier ones: tokens per round trip"
ALL = f"{_LINK}, all: tokens per round trip"
WORST = f"{_LINK}, the worst: tokens per round trip"
SHARE = f"{_LINK}: share that quotes its dialogue"
SPEED = f"{_LINK}: tokens/s"
SPEED_OFF = f"{_LINK}, no drafting: tokens/s"
TOLD = "round trip of 50 ms, the same dialogues to a model that only tells stories: tokens per round trip"
NEAR = "no delay, greedy summaries of dialogues: time per token, drafting / not"
NEAR_LARGE = "no delay, hidden 512 x 16 layers, sampling random text: time per token, drafting / not"
ROWS = (QUOTED, QUOTED_ALONE, ALL, WORST, SHARE, SPEED, SPEED_OFF, TOLD, NEAR, NEAR_LARGE)


def drafting(bench: Bench) -> list[Row | Skipped]:
    """Dialogues over a link with latency and without; and a model whose computing costs, without latency."""
    folder = bench.folder / "drafting"
    near_large = at_most(NEAR_LARGE, _large(bench, folder / "large"), 1.05)
    for path in (STORIES, DIALOGUES):
        if not path.is_dir():
            return [*(Skipped(row, f"{path} is not here") for row in ROWS if row != NEAR_LARGE), near_large]
    summariser = folder / "summariser"
    steps = 20 if bench.quick else TEACHING_STEPS
    loss = once(folder, "teach_summaries", out=str(summariser), steps=steps)
    bench.say(f"a model taught to summarise in {steps} steps: loss {loss:.2f} a token")
    few = 4 if bench.quick else COUNT
    results, near = _summaries(folder / "summaries", summariser, few, bench.repeats(5))
    told = _stories(folder / "stories", min(few, STORY_COUNT))
    return [*_rows(results, near, told), near_large]


def _rows(results: dict[str, list[dict[str, Any]]], near: float, told: float) -> list[Row | Skipped]:
    off, auto, alone = results["off"], results["auto"], results["alone"]
    quoting = [index for index, each in enumerate(off) if each["quoted"] >= QUOTING]
    rows: list[Row | Skipped] = []
    for name, which in ((QUOTED, auto), (QUOTED_ALONE, alone)):
        if quoting:
            rows.append(at_least(name, _per_trip([which[index] for index in quoting]), 2.0))
        else:
            rows.append(Skipped(name, "no summary quotes its dialogue"))
    speeds = {who: _sum(each, "new") / _sum(each, "seconds") for who, each in results.items()}
    return [
        *rows,
        reported(ALL, _per_trip(auto)),
        at_least(WORST, min(_per_trip([each]) for each in (*auto, *alone)), 1.0),
        reported(SHARE, len(quoting) / len(off)),
        reported(SPEED, speeds["auto"]),
        reported(SPEED_OFF, speeds["off"]),
        reported(TOLD, told),
        at_most(NEAR, near, 1.05),
    ]


def _sum(each: Sequence[dict[str, Any]], key: str) -> float:
    return float(sum(one[key] for one in each))


def _per_trip(each: Sequence[dict[str, Any]]) -> float:
    """All tokens by all round trips, that of the prompt among them."""
    return _sum(each, "new") / _sum(each, "round_trips")


def _summaries(folder: Path, model: Path, count: int, repeats: int) -> tuple[dict[str, list[dict[str, Any]]], float]:
    """Over the slow link: without drafting, with it, and each summary in a connection of its own, as a command has it.

    And the time per token without delay, turn by turn over other dialogues each time.
    """
    with running_hub(folder, model) as hub, running_workers(folder, 2) as (far, close):
        relay = Relay(hub.join_file.read_text(), ROUND_TRIP_S)
        _connect(far, relay.join, folder / "far", model)
        results = {how: far.ask("summarise", how=how, first=0, count=count) for how in ("off", "auto")}
        results["alone"] = []
        for index in range(count):
            _connect(far, relay.join, folder / "far", model)
            results["alone"] += far.ask("summarise", how="auto", first=index, count=1)
        for how in ("auto", "alone"):
            if any(a["tokens"] != b["tokens"] for a, b in zip(results["off"], results[how], strict=True)):
                raise RuntimeError("drafting has changed the tokens")
        _connect(close, f"@{hub.join_file}", folder / "close", model)
        times: dict[str, list[float]] = {"off": [], "auto": []}
        few = min(count, STORY_COUNT)
        for turn, how in itertools.product(range(repeats + 1), times):
            done = close.ask("summarise", how=how, first=turn * few, count=few)
            if turn:
                times[how].append(_sum(done, "seconds"))
        relay.close()
    return results, statistics.median(times["auto"]) / statistics.median(times["off"])


def _stories(folder: Path, count: int) -> float:
    """The pretrained model as it is: it does not summarise."""
    with running_hub(folder, STORIES) as hub, running_workers(folder) as (worker,):
        relay = Relay(hub.join_file.read_text(), ROUND_TRIP_S)
        _connect(worker, relay.join, folder / "edge", STORIES)
        told = worker.ask("summarise", how="auto", first=0, count=count)
        relay.close()
    return _per_trip(told)


def _large(bench: Bench, folder: Path) -> float:
    """Where computing costs and nothing can be guessed: drafting against none, turn by turn."""
    model = bench.models.standard
    with running_hub(folder, model) as hub, running_workers(folder) as (worker,):
        _connect(worker, f"@{hub.join_file}", folder / "edge", model)
        times: dict[str, list[float]] = {"off": [], "auto": []}
        for turn in range(bench.repeats(7) + 1):
            for how in ("off", "auto") if turn % 2 else ("auto", "off"):
                seconds = worker.ask("draft_random", how=how, seed=turn)
                if turn:
                    times[how].append(seconds)
    return statistics.median(times["auto"]) / statistics.median(times["off"])


def _connect(worker: Worker, join: str, state: Path, model: Path) -> None:
    worker.ask("connect", join=join, state=str(state), noise=0.0, model=str(model))


# -- in the measuring process ----------------------------------------------------------------------------


def teach_summaries(out: str, steps: int) -> float:
    """The pretrained model, all of it, on the training dialogues with their summaries; the loss of the last steps."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    examples = _examples(tokenizer, 384)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / steps))
    rng = random.Random(0)
    losses = []
    for _ in range(steps):
        first = rng.randrange(len(examples) - TEACHING_ROWS)
        ids, labels = _padded(examples[first : first + TEACHING_ROWS])
        loss = model(ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return statistics.mean(losses[-10:])


def _examples(tokenizer: Any, longest: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, summary) of a third of the training dialogues, those up to `longest` tokens, in order of length."""
    examples = []
    for row in itertools.islice(_records("train"), 0, None, 3):
        prompt = tokenizer(_prompt(row["dialogue"])).input_ids
        summary = tokenizer(" " + row["summary"].strip(), add_special_tokens=False).input_ids
        if len(prompt) + len(summary) < longest:
            examples.append((prompt, [*summary, tokenizer.eos_token_id]))
    return sorted(examples, key=lambda example: len(example[0]) + len(example[1]))


def _padded(examples: Sequence[tuple[list[int], list[int]]]) -> tuple[Any, Any]:
    """ids and labels [rows, width], padded on the right; only the summaries are targets."""
    import torch

    width = max(len(prompt) + len(summary) for prompt, summary in examples)
    ids, labels = torch.zeros(len(examples), width, dtype=torch.long), torch.full((len(examples), width), -100)
    for row, (prompt, summary) in enumerate(examples):
        end = len(prompt) + len(summary)
        ids[row, :end] = torch.tensor(prompt + summary)
        labels[row, len(prompt) : end] = torch.tensor(summary)
    return ids, labels


def _records(part: str) -> Iterator[dict[str, str]]:
    with (DIALOGUES / f"dialogsum.{part}.jsonl").open() as lines:
        for line in lines:
            yield json.loads(line)


def _prompt(dialogue: str) -> str:
    return f"{dialogue.strip()}\n\nSummary:"


def _prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """The first dialogues of the test part that leave room for a summary, each once."""
    texts = dict.fromkeys(row["dialogue"] for row in _records("test"))
    prompts = (tokenizer(_prompt(text)).input_ids for text in texts)
    return list(itertools.islice((ids for ids in prompts if len(ids) + NEW <= CONTEXT), count))


def summarise(model: Any, how: str, first: int, count: int) -> list[dict[str, Any]]:
    """Summaries of some dialogues; 'off': a token a round trip, 'auto': as `edge generate` has it."""
    results = []
    for prompt in _prompts(model.hub.tokenizer, first + count)[first:]:
        before = model.hub.round_trips
        tokens, seconds = _generated(model, prompt, how, eos_token_id=model.hub.tokenizer.eos_token_id)
        results.append(
            {
                "tokens": tokens, "new": len(tokens), "round_trips": model.hub.round_trips - before,
                "seconds": seconds, "quoted": _quoted(prompt, tokens),
            }
        )  # fmt: skip
    return results


def draft_random(model: Any, how: str, seed: int, tokens: int = 64) -> float:
    """Seconds for tokens sampled after random ones, of weights that are random too: no guess is right."""
    import torch

    torch.manual_seed(seed)
    ids = torch.randint(3, 30_000, (64,)).tolist()
    return _generated(model, ids, how, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=True)[1]


def _generated(model: Any, prompt: list[int], how: str, **more: Any) -> tuple[list[int], float]:
    import torch

    from edge.draft import lookup_arguments

    ids = torch.tensor([prompt])
    guess = {} if how == "off" else lookup_arguments()
    started = time.perf_counter()
    given = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **more}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **given, **guess)
    return out[0, len(prompt) :].tolist(), time.perf_counter() - started


def _quoted(prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """The share of `tokens` that stand in runs of QUOTE tokens which `prompt` has too."""
    runs = {tuple(prompt[at : at + QUOTE]) for at in range(len(prompt))}
    inside = {
        at + ahead
        for at in range(len(tokens) - QUOTE + 1)
        if tuple(tokens[at : at + QUOTE]) in runs
        for ahead in range(QUOTE)
    }
    return len(inside) / max(len(tokens), 1)
