"""Transfers of weights and adapters over lines that are slow, long and cut: what came once is not sent again."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tools.faults.fault import Fault, Setting
from tools.faults.slow import SlowRelay
from tools.faults.trial import digest
from tools.programs import Hub, Process, Programs, free_ports
from tools.table import Row, at_least, at_most, reported

MIB = 1 << 20


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
        at_most("transfer hub killed: goes on after its ready line (s)", waited, setting.limit(12, 40)),
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
    share = "transfer at 100 Mbit/s and 50 ms: share of the line used"
    return (
        # What is small is over before a busy machine has begun; only the full run holds the target.
        reported(share, speed / rate) if setting.quick else at_least(share, speed / rate, 0.8),
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
