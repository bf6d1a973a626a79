"""int8 with scales (and bfloat16) on the wire: bytes, and what it does to logits, tokens, losses and speed."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.bench.models import HIDDEN
from tools.bench.processes import Worker, once, running_hub, running_workers
from tools.table import Row, Skipped, at_most, reported

if TYPE_CHECKING:
    from tools.bench.groups import Bench

SENT, RECEIVED = (
    f"bytes sent per decoded token, hidden {HIDDEN}, int8",
    f"bytes received per decoded token, hidden {HIDDEN}, int8",
)
SPEED = "processor time of the edge for a decoded token, int8 / fp32 on the wire"
LARGEST, MEAN, LIKELIEST, TOKENS, LOSS = (
    "largest difference of logits / their spread",
    "mean difference of logits / their spread",
    "share of positions whose likeliest token stays the same",
    "share of greedy tokens that stay the same, 32 prompts x 32 tokens",
    "held-out loss while fine-tuning, difference in %",
)
QUALITY = {
    wire: {name: f"{name}, {wire} for fp32 on the wire" for name in (LARGEST, MEAN, LIKELIEST, TOKENS, LOSS)}
    for wire in ("int8", "bf16")
}
ROWS = (SENT, RECEIVED, SPEED, *(row for rows in QUALITY.values() for row in rows.values()))

_PROMPTS, _PROMPT_CHARACTERS, _NEW = 32, 160, 32
#: bytes of a MiB of float32 at hidden 512 in each wire dtype
_SHARE = {"fp32": 1.0, "bf16": 0.5, "int8": (HIDDEN + 8) / (4 * HIDDEN)}


# -- the group -------------------------------------------------------------------------------------------


def measure(bench: Bench) -> Sequence[Row | Skipped]:
    """All rows."""
    return [*_bytes_and_speed(bench), *_quality(bench)]


def _bytes_and_speed(bench: Bench) -> list[Row]:
    from tools.bench.groups import _counted

    folder, model = bench.folder / "int8", bench.models.standard
    more, less = (("decode", {"who": "split", "tokens": tokens}) for tokens in (64, 32))
    with running_hub(folder, model) as hub:
        sent, received = _counted(hub, folder, model, more, less, wire="int8")
        seconds = once(
            folder, "wire_dtypes", what="speed", join=f"@{hub.join_file}", state=str(folder / "other"),
            model=str(model), repeats=bench.repeats(7),
        )  # fmt: skip
    _say_costs(bench, once(folder, "wire_dtypes", what="costs", repeats=bench.repeats(15)))
    ratio = statistics.median(seconds["int8"]) / statistics.median(seconds["fp32"])
    return [
        at_most(SENT, sent / 32, HIDDEN + 160),
        at_most(RECEIVED, received / 32, HIDDEN + 160),
        reported(SPEED, ratio),
    ]


def _say_costs(bench: Bench, costs: dict[str, float]) -> None:
    """What a MiB of float32 states takes on links of several speeds, both ends' conversions included."""
    for wire, ms in costs.items():
        size = _SHARE[wire]
        links = ", ".join(f"{8.389 * size / gbit + ms:.2f} ms at {gbit:g} Gbit/s" for gbit in (0.1, 1.0, 10.0))
        bench.say(f"1 MiB of float32 states as {wire}: {size:.3f} MiB, converted in {ms:.2f} ms; with the link {links}")
    saved, more = 1.0 - _SHARE["int8"], costs["int8"] - costs["fp32"]
    if more > 0:
        bench.say(f"int8 costs what it saves at {8.389 * saved / more:.0f} Gbit/s")


def _quality(bench: Bench) -> list[Row | Skipped]:
    from tools.bench.groups import SHAKESPEARE, STORIES

    for path in (STORIES, SHAKESPEARE):
        if not path.exists():
            return [Skipped(row, f"{path} is not here") for rows in QUALITY.values() for row in rows.values()]
    folder, text = bench.folder / "int8-quality", SHAKESPEARE.read_text()
    folder.mkdir(parents=True)
    (folder / "train.txt").write_text(text[:300_000])
    (folder / "held-out.txt").write_text(text[-20_000:])
    with running_hub(folder / "logits", STORIES) as hub, running_workers(folder) as (worker,):
        found = _ask_logits(worker, str(hub.join_file), folder, STORIES)
    losses = {wire: _losses(bench, folder, wire) for wire in ("fp32", *QUALITY)}
    rows: list[Row | Skipped] = []
    for wire, names in QUALITY.items():
        rows += [
            reported(names[name], figure)
            for name, figure in zip((LARGEST, MEAN, LIKELIEST, TOKENS), found[wire], strict=True)
        ]
        worst = max(abs(a / b - 1) for a, b in zip(losses[wire], losses["fp32"], strict=True))
        rows.append(at_most(names[LOSS], 100 * worst, 1))
    return rows


def _ask_logits(worker: Worker, join_file: str, folder: Path, model: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = worker.ask(
        "wire_dtypes", what="logits", join=f"@{join_file}", state=str(folder / "edge"), model=str(model),
        text=str(folder / "held-out.txt"),
    )  # fmt: skip
    return found


def _losses(bench: Bench, folder: Path, wire: str) -> list[float]:
    """Held-out losses of a run of its own, before and after each round."""
    from tools.bench.groups import STORIES

    round_steps, rounds, home = 20, 2 if bench.quick else 5, folder / wire
    with running_hub(home, STORIES, "--cohort", "1", "--round-steps", str(round_steps)) as hub:
        losses: list[float] = once(
            home, "wire_dtypes", what="curve", join=f"@{hub.join_file}", state=str(home / "edge"), model=str(STORIES),
            train=str(folder / "train.txt"), held_out=str(folder / "held-out.txt"), steps=round_steps * rounds,
            wire=wire,
        )  # fmt: skip
    bench.say(f"held-out loss every {round_steps} steps, {wire}: " + " ".join(f"{value:.4f}" for value in losses))
    return losses


# -- in a measuring process ------------------------------------------------------------------------------


def speed(join: str, state: str, model: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of this process's processor for 64 greedy tokens, turn by turn, after one turn that does not count."""
    import edge
    from tools.bench.tasks import _ids, _torch

    torch = _torch()
    models: dict[str, Any] = {}
    for wire in ("fp32", "int8"):
        given = None if models else join
        models[wire] = edge.connect(given, state=state, noise=0.0, partition="1:1", model=model, wire=wire)
        models[wire].generation_config.eos_token_id = None
    seconds: dict[str, list[float]] = {wire: [] for wire in models}
    ids = _ids(1, 32)
    for turn in range(repeats + 1):
        for wire in sorted(models, reverse=bool(turn % 2)):
            started = time.process_time()
            models[wire].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
            if turn:
                seconds[wire].append(time.process_time() - started)
    return seconds


def costs(repeats: int) -> dict[str, float]:
    """Milliseconds of the processor for 1 MiB of float32 states, to bytes on one side and back on the other."""
    from blocks.codec import WIRES, from_wire, to_wire
    from tools.bench.tasks import _torch

    torch = _torch()
    states = torch.randn(4, 128, HIDDEN)
    taken: dict[str, list[float]] = {wire: [] for wire in _SHARE}
    for _ in range(repeats):
        for wire, times in taken.items():
            started = time.process_time()
            for _ in range(50):
                from_wire(to_wire(states, WIRES[wire]), dtype=torch.float32, shape=states.shape)
            times.append((time.process_time() - started) / 50)
    return {wire: 1000 * statistics.median(times) for wire, times in taken.items()}


def logits(join: str, state: str, model: str, text: str) -> dict[str, list[float]]:
    """By wire dtype: largest and mean difference of logits to fp32's, over the spread of those; the shares of equal
    likeliest tokens, and of equal tokens where each run goes on from its own. The spread is the standard deviation of
    the logits at a position, averaged."""
    import edge
    from tools.bench.tasks import _torch

    torch = _torch()
    found: dict[str, tuple[Any, Any]] = {}
    for wire in ("fp32", *QUALITY):
        given = None if found else join
        split = edge.connect(given, state=state, noise=0.0, partition="1:1", model=model, wire=wire)
        with split.hub as hub:
            split.generation_config.eos_token_id = None
            ids = _prompts(hub.tokenizer, Path(text).read_text())
            with torch.no_grad():
                all_logits = split(ids).logits
            tokens = split.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=_NEW, do_sample=False)
            found[wire] = (all_logits, tokens[:, ids.shape[1] :])
    exact, wanted = found["fp32"]
    spread = float(exact.std(-1).mean())
    out = {}
    for wire in QUALITY:
        off = (found[wire][0] - exact).abs()
        likeliest = float((found[wire][0].argmax(-1) == exact.argmax(-1)).float().mean())
        same = float((found[wire][1] == wanted).float().mean())
        out[wire] = [float(off.max()) / spread, float(off.mean()) / spread, likeliest, same]
    return out


def _prompts(tokenizer: Any, text: str) -> Any:
    """Token ids of equally long pieces of the text, from all over it."""
    import torch

    pieces = [text[at : at + _PROMPT_CHARACTERS] for at in range(0, len(text), len(text) // _PROMPTS)][:_PROMPTS]
    ids = [tokenizer(piece).input_ids for piece in pieces]
    return torch.tensor([row[: min(map(len, ids))] for row in ids])


def curve(join: str, state: str, model: str, train: str, held_out: str, steps: int, wire: str) -> list[float]:
    """Held-out losses by `edge join`, noise off, before and after each round."""
    from tools.bench.training import _options, run_edge

    options = _options(join, state, model, train, held_out, batch=8, seq=128, noise=0.0, steps=steps)
    run_edge(replace(options, wire=wire))
    losses: list[float] = json.loads((Path(state) / "report.json").read_text())["held_out"]
    return losses


TASKS: dict[str, Callable[..., Any]] = {"speed": speed, "costs": costs, "logits": logits, "curve": curve}
