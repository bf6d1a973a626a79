"""Which functions of the two commands are timed, and under which names they are shown.

`on_hub` and `on_edge` run in the process of a command before it begins (`programs.py: prepare`). PROFILE_SPANS
names the file for its spans, PROFILE_CORE the core that it keeps to.
"""

from __future__ import annotations

import os
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from tools.profile.spans import WAITING, Recorder

#: The windows: one decoded token, one training step.
TOKEN, STEP = "edge: generate(), choosing the token", "edge: trainer, optimizer, loss"
TOKEN_BEGINS = "edge: embedding, masks, rotary, modules"


def on_hub() -> None:
    """Time a hub."""
    import blocks.middle
    import hub.engine
    import hub.server
    import hub.streams
    from blocks.optimizer import AdapterOptimizer
    from hub.computing import Computing
    from hub.engine import Engine
    from hub.post import Post
    from hub.server import Server
    from hub.worker import Worker
    from messaging.hub_transport import HubTransport

    record = _begin()
    record.wrap(Server, "_main_loop", "hub: I/O loop")
    record.wrap(HubTransport, "poll", WAITING)
    record.wrap(HubTransport, "_receive", "link: receive at the hub")
    record.wrap(HubTransport, "send", "link: send from the hub")
    record.wrap(Server, "_arrived", "hub: admission, scheduler")
    record.wrap(Computing, "done", "hub: admission, scheduler")
    record.wrap(hub.server, "decode", "hub: encode and decode messages")
    record.wrap(Post, "answer", "hub: encode and decode messages")
    record.wrap(Worker, "_carry_out", "hub: engine, layout, caches")
    for name in ("from_wire", "hidden_like", "gradient_like"):
        record.wrap(hub.engine, name, "hub: bytes to tensors and back")
    record.wrap(blocks.middle.MiddleBlocks, "run", "hub: masks, rotary, modules")
    record.wrap(Engine, "step_backward", "hub: Blocks B backward")
    record.wrap(AdapterOptimizer, "step", "hub: optimizer")
    _wrap_layers(record)


def on_edge() -> None:
    """Time an edge."""
    import torch
    from transformers import GenerationMixin

    import edge.connection
    import edge.middle
    import edge.pipeline
    from blocks.remote import RemoteBlocks
    from edge.client import HubClient
    from edge.noise import GaussianNoise
    from edge.snapshots import Snapshots
    from edge.trainer import Trainer
    from messaging.edge_transport import Connection, EdgeTransport

    record = _begin()
    record.wrap(GenerationMixin, "generate", TOKEN)
    record.wrap(Trainer, "_step", STEP)
    record.wrap(torch.Tensor, "backward", "edge: backward of Blocks C and A")
    record.wrap(RemoteBlocks, "forward", "edge: layout, record of what was sent")
    record.wrap(GaussianNoise, "__call__", "edge: noise")
    for name in ("from_wire", "to_wire", "to_rows"):
        record.wrap(edge.middle, name, "edge: bytes to tensors and back")
    record.wrap(HubClient, "ask", WAITING)
    record.wrap(edge.pipeline, "wait", WAITING)
    record.wrap(Snapshots, "wait", "edge: waiting for the last snapshot's fsync")
    record.wrap(HubClient, "_run", "link: requests of the edge")
    record.wrap(EdgeTransport, "poll", WAITING)
    record.wrap(EdgeTransport, "send", "link: send from the edge")
    record.wrap(Connection, "receive", "link: receive at the edge")
    _wrap_edge_model(record, edge.connection)


def _begin() -> Recorder:
    """A recorder that writes its spans when the process ends; the process keeps to its core from now on."""
    record = Recorder()
    os.sched_setaffinity(0, {int(os.environ["PROFILE_CORE"])})
    Finalize(None, record.write, args=(Path(os.environ["PROFILE_SPANS"]),), exitpriority=1)
    return record


def _wrap_layers(record: Recorder) -> None:
    """Time the layers of B beneath their gates."""
    import blocks.middle

    keep = blocks.middle.keep_layers

    def keep_layers(*args: Any) -> Any:
        cut = keep(*args)
        for layer in cut.layers:
            record.wrap(layer, "forward", "hub: Blocks B")
        return cut

    blocks.middle.keep_layers = keep_layers  # type: ignore[assignment]


def _wrap_edge_model(record: Recorder, connection: Any) -> None:
    """Time the model's forward, its layers and its head, once it is attached to the hub."""
    from blocks.remote import RemoteBlocks

    attach = connection.attach

    def attached(cut: Any, *args: Any) -> Any:
        found = attach(cut, *args)
        record.wrap(cut.model, "forward", TOKEN_BEGINS)
        label = "edge: Blocks A"
        for layer in cut.layers:
            if isinstance(layer, RemoteBlocks):
                label = "edge: Blocks C"
            else:
                record.wrap(layer, "forward", label)
        record.wrap(cut.model.get_output_embeddings(), "forward", "edge: head")
        return found

    import edge.join
    import edge.library

    for module in (connection, edge.join, edge.library):
        vars(module)["attach"] = attached
