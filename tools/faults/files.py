"""Row 21, and transfers: files are whole whenever a process dies, and what was fetched once is not fetched again."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tools.faults.fault import Fault, Setting
from tools.faults.slow import SlowRelay
from tools.faults.trial import digest
from tools.programs import Hub, Process, Programs, free_ports
from tools.table import Row, at_least, at_most, reported

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tools.imported"])

MIB = 1 << 20
#: Elements of each tensor that is saved again and again: large enough that most kills find a file half-written.
_ELEMENTS = 400_000
_SAVES = ("hub publishes", "hub checkpoints", "edge snapshots")


# -- row 21: in the process that is to die ---------------------------------------------------------------


def _tensor(number: int) -> Any:
    import torch

    return torch.full((_ELEMENTS,), float(number))


def _publish(folder: Path, number: int) -> Iterator[int]:
    from hub.store.state import HubState
    from messaging.messages import Recipe

    recipe = Recipe(1e-3, 4, 8.0, ("q_proj",), 4, 4, 1, 1.0, 0, 0.0, 0)
    with closing(HubState.open(folder, exclusive=True)) as state:
        while True:
            state.adapters.publish(number, number, {"lora": _tensor(number)}, recipe)
            yield number
            number += 1


def _checkpoint(folder: Path, number: int) -> Iterator[int]:
    from hub.store.checkpoints import Checkpoint
    from hub.store.state import HubState

    with closing(HubState.open(folder, exclusive=True)) as state:
        while True:
            tensors = {"lora": _tensor(number)}
            state.checkpoints.save(Checkpoint(number, 0, number, 0, {"ann": number}, tensors, tensors))
            yield number
            number += 1


def _snapshot(folder: Path, number: int) -> Iterator[int]:
    from edge.snapshots import Snapshot, Standing
    from edge.state import EdgeState

    state = EdgeState(folder)
    with state.training(), closing(state.snapshots()) as snapshots:
        while True:
            standing = Standing(number, 0, 0, number, 7, False, (), -1, "model", "1:1")
            snapshots.put(Snapshot(standing, {"lora": _tensor(number)}, {"lora": _tensor(number)}), 0)
            snapshots.wait()
            yield number
            number += 1


_WRITERS: dict[str, Callable[[Path, int], Iterator[int]]] = dict(
    zip(_SAVES, (_publish, _checkpoint, _snapshot), strict=True)
)


def _save_for_ever(what: str, folder: Path, number: int, said: Path) -> None:
    """Save one after the other from `number` on, and write down each that is said to be safe."""
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for saved in _WRITERS[what](folder, number):
        os.write(descriptor, f"{saved}\n".encode())


# -- row 21: from outside --------------------------------------------------------------------------------


def _read_hub(folder: Path, what: str) -> int:
    """The newest number that can be read; every listed file has to be what was written."""
    from hub.store.series import fault
    from hub.store.state import HubState

    with closing(HubState.open(folder, exclusive=True)) as state:
        store = state.adapters if what == "hub publishes" else state.checkpoints
        for entry in store._series.entries():  # the list itself is what is looked at here
            reason = fault(entry.path, entry.sha256, entry.bytes)
            if reason is not None:
                raise RuntimeError(f"{entry.path} {reason}")
        if what == "hub publishes":
            latest = state.adapters.latest()
            return _uniform(latest.tensors(), latest.version) if latest is not None else 0
        point, warnings = state.checkpoints.load_latest()
        if warnings:
            raise RuntimeError("; ".join(warnings))
        return 0 if point is None else _uniform({**point.adapter, **point.optimizer}, point.hub_step)


def _read_edge(folder: Path) -> int:
    from edge.state import EdgeState

    state = EdgeState(folder)
    with state.training(), closing(state.snapshots()) as snapshots:
        newest = snapshots.newest()
        if newest is None:
            return 0
        snapshot = snapshots.at(newest.steps, newest.round)
        assert snapshot is not None
        return _uniform({**snapshot.adapter, **snapshot.optimizer}, newest.steps)


def _uniform(tensors: dict[str, Any], number: int) -> int:
    if not tensors or not all(bool((value == number).all()) for value in tensors.values()):
        raise RuntimeError(f"what was saved as number {number} holds something else")
    return number


def _strays(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".tmp")]


def _killed_saves(setting: Setting) -> Sequence[Row]:
    rng = random.Random(21)
    torn, lost, half_written, left, saves = 0, 0, 0, 0, 0
    kills = setting.count(200, 10)
    newest = dict.fromkeys(_SAVES, 0)
    for kill in range(kills):
        what = _SAVES[kill % len(_SAVES)]
        folder, said = setting.folder / what.replace(" ", "-"), setting.folder / f"{kill:03}.said"
        _kill_one(what, folder, newest[what] + 1, said, rng.uniform(0.0, 0.05))
        promised = [int(line) for line in said.read_text().split()]
        half_written += bool(_strays(folder))
        try:
            found = _read_edge(folder) if what == "edge snapshots" else _read_hub(folder, what)
        except Exception as error:
            setting.console.print(f"[red]{what}, kill {kill}: {error!r}[/]")
            torn += 1
            found = promised[-1]
        lost += found < promised[-1]
        left += len(_strays(folder))
        saves += len(promised)
        newest[what] = max(found, promised[-1])
    return (
        at_most("21 adapter saves torn by kill -9", torn, 0),
        at_most("21 saves lost that were said to be safe", lost, 0),
        at_most("21 temporary files left after the next start", left, 0),
        reported("21 kills", kills),
        reported("21 kills that left a file half-written", half_written),
        reported("21 saves that ended", saves),
    )


def _kill_one(what: str, folder: Path, number: int, said: Path, after_s: float) -> None:
    """Have a process save, and kill it so long after its first save ended."""
    process = _forks.Process(target=_save_for_ever, args=(what, folder, number, said))
    process.start()
    assert process.pid is not None
    deadline = time.monotonic() + 60.0
    try:
        while not (said.exists() and said.stat().st_size):
            if process.exitcode is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{what}: no save ended")
            time.sleep(0.002)
        time.sleep(after_s)
    finally:
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()


# -- transfers -------------------------------------------------------------------------------------------


def _model(setting: Setting, hidden: int, vocabulary: int) -> Path:
    """A model in bfloat16, of which an edge needs little more than embedding and head."""
    import torch
    from transformers import LlamaConfig

    from tools.make_model import make_model

    config = LlamaConfig(
        num_hidden_layers=3, hidden_size=hidden, intermediate_size=2 * hidden, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=vocabulary, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    make_model(setting.folder / "model", config, torch.bfloat16, shard_bytes=16 * MIB)
    return setting.folder / "model"


@contextmanager
def _serving(setting: Setting) -> Iterator[tuple[Programs, Hub, tuple[object, ...]]]:
    """A hub that serves a model, and how it was started. An edge needs 36 MiB of it, quickly 9."""
    options = ("--model", _model(setting, setting.count(512, 128), 16384), "--lora-rank", 4, *free_ports())
    with Programs(setting.folder) as programs:
        yield programs, programs.serve(*options), options


@contextmanager
def _line(hub: Hub, bytes_per_s: float, round_trip_s: float = 0.0) -> Iterator[tuple[SlowRelay, Path]]:
    """A slow line to the hub, and the file with the join string that leads through it."""
    relay = SlowRelay(Path(hub.join[1:]).read_text().strip(), bytes_per_s, round_trip_s)
    path = hub.state.with_suffix(f".line{time.monotonic_ns()}")
    path.write_text(relay.join)
    try:
        yield relay, path
    finally:
        relay.close()


def _fetching(programs: Programs, join: Path | None, name: str) -> Process:
    """An edge that fetches its blocks and generates a few tokens."""
    ticket = [] if join is None else [f"@{join}"]
    options = ("--state", programs.folder / name, "--name", name, "--prompt", "once", "--max-new-tokens", 4)
    return programs.start("edge", "generate", *ticket, *options, "--noise", 0, "--json")


def _tokens(process: Process) -> Any:
    done = process.wait()
    if done.code != 0:
        raise RuntimeError(f"{process} ended with {done.code}")
    return json.loads(done.out.splitlines()[-1])["tokens"]


def _until_passed(relay: SlowRelay, process: Process, count: float) -> None:
    process.until(lambda: relay.to_edge >= count, f"{count:.0f} bytes to the edge")


def _cuts(setting: Setting) -> Sequence[Row]:
    """The line is cut, and the edge killed, in the middle of fetching its blocks."""
    cuts = setting.count(6, 2)
    with _serving(setting) as (programs, hub, _):
        rate = setting.count(8, 4) * 1e6
        with _line(hub, rate) as (relay, join):
            expected = _tokens(_fetching(programs, join, "whole"))
            needed = relay.to_edge
        with _line(hub, rate) as (relay, join):
            process = _fetching(programs, join, "cut")
            for number in range(1, cuts + 1):
                _until_passed(relay, process, number * needed / (cuts + 2))
                relay.cut()
            _until_passed(relay, process, (cuts + 1) * needed / (cuts + 2))
            process.kill()
            same = _tokens(_fetching(programs, None, "cut")) == expected
            twice = max(0, relay.to_edge - needed) / MIB
    return (
        at_least("transfer after cuts and a kill -9 of the edge: same tokens", float(same), 1),
        at_most("transfer MiB fetched twice for each cut", twice / (cuts + 1), 4),
        reported("transfer MiB of blocks and all else", needed / MIB),
    )


def _hub_killed(setting: Setting) -> Sequence[Row]:
    """The hub is killed in the middle of a fetch, and started again at the same address."""
    with _serving(setting) as (programs, hub, options):
        rate = setting.count(8, 4) * 1e6
        with _line(hub, rate) as (relay, join):
            expected = _tokens(_fetching(programs, join, "whole"))
            needed = relay.to_edge
        with _line(hub, rate) as (relay, join):
            process = _fetching(programs, join, "edge")
            _until_passed(relay, process, needed / 2)
            hub.process.kill()
            hub = programs.serve(*options)
            before, ready = relay.to_edge, time.monotonic()
            # More than a handshake: pieces come again.
            _until_passed(relay, process, before + 100_000)
            waited = time.monotonic() - ready
            same = _tokens(process) == expected
            twice = max(0, relay.to_edge - needed) / MIB
    return (
        at_least("transfer hub killed: same tokens", float(same), 1),
        at_most("transfer hub killed: goes on after its ready line (s)", waited, 12),
        at_most("transfer hub killed: MiB fetched twice", twice, 4),
    )


def _long_line(setting: Setting) -> Sequence[Row]:
    """100 Mbit/s with a round trip of 50 ms: is the line full while blocks are fetched?"""
    rate = 12.5e6
    with _serving(setting) as (programs, hub, _), _line(hub, rate, 0.05) as (relay, join):
        process = _fetching(programs, join, "far")
        size = sum(path.stat().st_size for path in (setting.folder / "model").glob("*.safetensors"))
        _until_passed(relay, process, 0.1 * size)
        at, begun = relay.to_edge, time.monotonic()
        _until_passed(relay, process, 0.45 * size)
        speed = (relay.to_edge - at) / (time.monotonic() - begun)
        _tokens(process)
        fetched = sum(path.stat().st_size for path in (setting.folder / "far" / "cache").rglob("tensors/*"))
        carried = relay.to_edge
    return (
        at_least("transfer at 100 Mbit/s and 50 ms: share of the line used", speed / rate, 0.8),
        at_least("transfer at 100 Mbit/s: bytes of weights for each byte on the line", fetched / carried, 1.2),
    )


def _upload_once(setting: Setting, folder: Path, needed: float | None) -> tuple[str, float]:
    """Train one round, its adapter uploaded over a slow line: the published adapter, and the bytes to the hub.

    `needed`: how many these are when nothing happens; with it, the line is cut and the edge killed on the way.
    """
    from hub.store.state import HubState

    folder.mkdir()
    notes = folder / "notes.txt"
    notes.write_text("\n\n".join(f"Note {number} says little." for number in range(60)))
    with Programs(folder) as programs:
        hub = programs.serve(
            "--model", setting.folder / "model", "--lora-rank", 64, "--cohort", 1, "--rounds", 1,
            "--round-steps", 1, "--grace", "inf",
        )  # fmt: skip
        with _line(hub, setting.count(1, 2) * 1e6) as (relay, join):
            through = Hub(hub.process, hub.state, f"@{join}", 0.0)
            options = ("--partition", "1:1", "--batch", 1, "--seq", 16, "--model", setting.folder / "model")
            edge = programs.edge(through, "edge", notes, *options)
            if needed is not None:
                edge.until(lambda: relay.to_hub > 0.35 * needed, "a third of the upload")
                relay.cut()
                edge.until(lambda: relay.to_hub > 0.75 * needed, "three quarters of the upload")
                edge.kill()
                edge = programs.edge(None, "edge", notes, *options)
            done = edge.wait()
            if done.code != 0:
                raise RuntimeError(f"{edge} ended with {done.code}")
            carried = relay.to_hub
        hub.process.end(signal.SIGTERM)
        with closing(HubState.open(hub.state, exclusive=False)) as state:
            latest = state.adapters.latest()
            assert latest is not None
            return digest(latest.tensors()), carried


def _uploads(setting: Setting) -> Sequence[Row]:
    """The line is cut, and then the edge killed, in the middle of uploading its adapter."""
    _model(setting, 512, 2048)
    whole, needed = _upload_once(setting, setting.folder / "whole", None)
    again, carried = _upload_once(setting, setting.folder / "again", needed)
    return (
        at_least("transfer upload cut, edge killed: same adapter published", float(whole == again), 1),
        at_most("transfer upload: MiB sent twice", max(0.0, carried - needed) / MIB, 4),
        reported("transfer upload: MiB in all", needed / MIB),
    )


FAULTS = (
    Fault(
        "21",
        "kill -9 while adapters, checkpoints and snapshots are saved",
        ("21 adapter saves torn by kill -9", "21 saves lost that were said to be safe"),
        _killed_saves,
    ),
    Fault(
        "transfer-cut",
        "the line cut, and the edge killed, while it fetches its blocks",
        ("transfer after cuts and a kill -9 of the edge: same tokens", "transfer MiB fetched twice for each cut"),
        _cuts,
    ),
    Fault(
        "transfer-hub",
        "the hub killed in the middle of a fetch",
        ("transfer hub killed: same tokens", "transfer hub killed: goes on after its ready line (s)"),
        _hub_killed,
    ),
    Fault(
        "transfer-upload",
        "the line cut, and the edge killed, while it uploads its adapter",
        ("transfer upload cut, edge killed: same adapter published", "transfer upload: MiB sent twice"),
        _uploads,
    ),
    Fault(
        "transfer-far",
        "blocks fetched over 100 Mbit/s with a round trip of 50 ms",
        ("transfer at 100 Mbit/s and 50 ms: share of the line used",),
        _long_line,
    ),
)
