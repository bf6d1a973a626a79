"""What a measuring process can do. Nothing heavy is imported before it is asked for: memory is measured too."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from tools.bench.processes import peak_bytes

_held: dict[str, Any] = {}


def connect(join: str, state: str, noise: float, model: str | None = None, wire: str | None = None) -> int:
    """Join as an edge at 1:1, leaving a hub joined before; returns the bytes of the edge's own tensors."""
    import edge

    close_all()

    torch = _torch()
    split = edge.connect(join, state=state, noise=noise, partition="1:1", model=model, wire=wire)
    split.generation_config.eos_token_id = None
    _held["split"] = split
    tensors = [*split.parameters(), *split.buffers()]
    storages = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    assert torch.get_num_threads() == 1
    return sum(storages.values())


def load_unsplit(model: str) -> None:
    """The stock model, for comparison."""
    from transformers import AutoModelForCausalLM

    torch = _torch()
    unsplit = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    unsplit.generation_config.eos_token_id = None
    _held["unsplit"] = unsplit


def decode(who: str, tokens: int, prompt: int = 32) -> float:
    """Seconds for `tokens` greedy tokens after a prompt."""
    torch = _torch()
    model = _held[who]
    ids = _ids(1, prompt)
    started = time.perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    seconds = time.perf_counter() - started
    assert out.shape[1] == prompt + tokens
    return seconds


def decode_cpu(tokens: int, prompt: int) -> float:
    """CPU seconds of this process, all its threads, for one token of the split model."""
    started = time.process_time()
    decode("split", tokens, prompt)
    return (time.process_time() - started) / tokens


def first_come_first_served() -> bool:
    """Have this process's main thread keep the core until it waits, if the system allows it.

    The threads that carry its messages come first: what an edge has computed leaves it before another one computes.
    """
    try:
        for thread in map(int, os.listdir("/proc/self/task")):
            priority = 1 if thread == os.getpid() else 2
            os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(priority))
    except OSError:
        return False
    return True


def at_context(length: int, tokens: int, naive: bool) -> float:
    """Seconds for one token behind a context of `length`; naive: nobody keeps keys and values."""
    torch = _torch()
    model, ids = _held["split"], _ids(1, length + tokens)
    with torch.no_grad():
        cache = None if naive else model(ids[:, : length - 1], use_cache=True, logits_to_keep=1).past_key_values
        started = time.perf_counter()
        for last in range(length, length + tokens):
            if naive:
                model(ids[:, :last], use_cache=False, logits_to_keep=1)
            else:
                model(ids[:, last - 1 : last], past_key_values=cache, use_cache=True)
    return (time.perf_counter() - started) / tokens


def decoding(**arguments: Any) -> dict[str, Any]:
    """Seconds of the hub's engine alone, and of the unsplit blocks; see alone.py."""
    from tools.bench import alone

    return alone.decoding(**arguments)


def load_hub_side(**arguments: Any) -> None:
    """Make an engine with sessions that have begun; see alone.py."""
    _as_a_hub()
    from tools.bench import alone

    _held["hub_side"] = alone.begun(**arguments)


def hub_decode(count: int, steps: int) -> float:
    """CPU seconds of that engine for one token of each of so many sessions."""
    hub, prompts = _held["hub_side"]
    return float(hub.decode(dict(list(prompts.items())[:count]), steps) / steps)


def kv_memory(**arguments: Any) -> float:
    """What a session costs the hub; see alone.py."""
    _as_a_hub()
    from tools.bench import alone

    return alone.memory(**arguments)


def waiting(**arguments: Any) -> dict[str, float]:
    """How long a token takes beside prompts; see waiting.py."""
    _as_a_hub()
    from tools.bench import waiting

    return waiting.waiting(**arguments)


def prefill(who: str, tokens: int) -> float:
    """Seconds for one forward with a cache, the last position's logits kept."""
    torch = _torch()
    ids = _ids(1, tokens)
    started = time.perf_counter()
    with torch.no_grad():
        _held[who](ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - started


def compare(measure: str, repeats: int, **arguments: Any) -> dict[str, list[float]]:
    """Seconds of `measure` on the split and on the unsplit model, turn by turn, after one turn that does not count."""
    run = TASKS[measure]
    seconds: dict[str, list[float]] = {"split": [], "unsplit": []}
    for turn in range(repeats + 1):
        order = ("split", "unsplit") if turn % 2 else ("unsplit", "split")
        for who in order:
            took = run(who=who, **arguments)
            if turn:
                seconds[who].append(took)
    return seconds


def padded(rows: int, width: int, pad: int) -> None:
    """Generate one token from rows with `pad` columns (a different number in each row) of padding on the left."""
    torch = _torch()
    ids = _ids(rows, width)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : pad * (row + 1)] = 0
    _held["split"].generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False)


def peak() -> int:
    """This process's VmHWM."""
    return peak_bytes()


def modules() -> list[str]:
    """What is imported by now."""
    import sys

    return list(sys.modules)


def import_all(names: list[str]) -> int:
    """Import these, as far as they can be; returns VmHWM."""
    import contextlib
    import importlib

    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    return peak_bytes()


def train(**arguments: Any) -> dict[str, list[float]]:
    """Seconds of training steps; see training.py."""
    from tools.bench import training

    return training.compare_steps(**arguments)


def curves(**arguments: Any) -> dict[str, list[float]]:
    """Held-out losses; see training.py."""
    from tools.bench import training

    return training.curves(**arguments)


def record(**arguments: Any) -> None:
    """Record a training edge; see replay.py."""
    from tools.bench import replay

    replay.record(**arguments)


def gather(**arguments: Any) -> None:
    """Make replayed edges; see replay.py."""
    from tools.bench import replay

    _held["crowd"] = replay.gather(**arguments)


def in_turn(**arguments: Any) -> list[float]:
    """Seconds of each of some replayed edges, one after the other."""
    return _held["crowd"].in_turn(**arguments)


def joined(**arguments: Any) -> float:
    """Seconds of so many replayed edges at once."""
    return float(_held["crowd"].joined(**arguments))


def disperse() -> None:
    """End the replayed edges."""
    _held.pop("crowd").close()


def load_hub_part(**arguments: Any) -> None:
    """Make an engine; see hub_part.py."""
    _as_a_hub()
    from tools.bench import hub_part

    _held["hub_part"] = hub_part.load(**arguments)


def hub_part_step(count: int) -> float:
    """Seconds of a joined step of the engine alone, the second of this size."""
    _held["hub_part"].step(count)
    return float(_held["hub_part"].step(count))


def wire_dtypes(**arguments: Any) -> Any:
    """What another dtype on the wire does to logits, losses or speed; see int8.py."""
    from tools.bench import int8

    return int8.TASKS[arguments.pop("what")](**arguments)


def teach_summaries(**arguments: Any) -> float:
    """Write a model that summarises; see drafting.py."""
    from tools.bench import drafting

    _torch()
    return drafting.teach_summaries(**arguments)


def summarise(**arguments: Any) -> list[dict[str, Any]]:
    """Summaries of dialogues by the split model; see drafting.py."""
    from tools.bench import drafting

    return drafting.summarise(_held["split"], **arguments)


def draft_random(**arguments: Any) -> float:
    """Seconds of tokens after random ones; see drafting.py."""
    from tools.bench import drafting

    return drafting.draft_random(_held["split"], **arguments)


def train_peak(**arguments: Any) -> dict[str, Any]:
    """What an edge that trains needs; see edge_memory.py."""
    from tools.bench import edge_memory

    return edge_memory.train_peak(**arguments)


def train_unsplit_peak(**arguments: Any) -> dict[str, Any]:
    """What unsplit training needs; see edge_memory.py."""
    from tools.bench import edge_memory

    return edge_memory.train_unsplit_peak(**arguments)


def quantized_quality(**arguments: Any) -> dict[str, Any]:
    """What fewer bits cost; see edge_memory.py."""
    from tools.bench import edge_memory

    return edge_memory.quantized_quality(**arguments)


def pipelined_steps(**arguments: Any) -> dict[str, list[float]]:
    """Seconds of training steps in micro-batches; see pipeline.py."""
    from tools.bench import pipeline

    return pipeline.steps(**arguments)


def gradients_by_edge(**arguments: Any) -> dict[str, list[float]]:
    """Seconds of the hub's work; see pipeline.py."""
    _as_a_hub()
    from tools.bench import pipeline

    return pipeline.by_edge(**arguments)


def layers_again(**arguments: Any) -> dict[str, Any]:
    """Bytes and seconds of the hub's work; see pipeline.py."""
    _as_a_hub()
    from tools.bench import pipeline

    return pipeline.layers_again(**arguments)


def close_all() -> None:
    """Leave the hub."""
    split = _held.pop("split", None)
    if split is not None:
        split.hub.close()


def _as_a_hub() -> None:
    """Have this process's memory as `hub serve` has it; before torch is imported."""
    from hub.pages import ask_for_huge_pages

    ask_for_huge_pages()


def _torch() -> Any:
    import torch

    torch.set_num_threads(1)
    return torch


def _ids(rows: int, width: int) -> Any:
    torch = _torch()
    return torch.randint(3, 250, (rows, width), generator=torch.Generator().manual_seed(7))


TASKS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        connect, load_unsplit, decode, prefill, compare, padded, peak, modules, import_all, train, curves, wire_dtypes,
        record, gather, in_turn, joined, disperse, load_hub_part, hub_part_step,
        teach_summaries, summarise, draft_random, train_peak, train_unsplit_peak, quantized_quality,
        decode_cpu, first_come_first_served, at_context, decoding, load_hub_side, hub_decode, kv_memory, waiting,
        pipelined_steps, gradients_by_edge, layers_again,
    )
}  # fmt: skip
