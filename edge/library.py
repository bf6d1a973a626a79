"""FedSEA as a library: a transformers model whose middle runs at the hub."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import torch

from blocks import adapters
from blocks.codec import wire_dtype
from blocks.device import pick_device
from blocks.partition import Partition
from blocks.quantize import parse_bits
from edge.connection import DEFAULT_NOISE, Connection, attach, build, default_state, lora_spec
from edge.draft import Drafting
from edge.noise import GaussianNoise
from edge.state import EdgeState
from messaging.console import Journal


class Link:
    """What a connected model knows of its hub: `model.hub`."""

    def __init__(
        self, connection: Connection, tokenizer: Any, noise: GaussianNoise, middle: Any, drafting: Drafting
    ) -> None:
        self._connection = connection
        self._middle = middle
        self._drafting = drafting
        self.tokenizer = tokenizer
        self.noise = noise

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received so far, framing and encryption included."""
        return self._connection.client.traffic

    @property
    def round_trips(self) -> int:
        """Requests of this model that went to the hub and back."""
        return int(self._middle.round_trips)

    @property
    def drafted(self) -> int:
        """Tokens that were guessed and sent along to be verified."""
        return self._drafting.drafted

    @property
    def accepted(self) -> int:
        """Those of them that were right: each saved a round trip."""
        return self._drafting.accepted

    @property
    def adapter_version(self) -> int:
        """The published adapter that all blocks use."""
        return int(self._middle.version)

    def close(self) -> None:
        """Leave the hub; its memory of this model's generations is freed."""
        self._connection.leave()
        self._connection.close()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def connect(
    join: str | None = None,
    *,
    model: str | None = None,
    partition: str | None = None,
    noise: float | None = None,
    state: str | Path | None = None,
    name: str | None = None,
    device: str = "cpu",
    load_in: str | None = None,
    seed: int = 0,
    wire: str | None = None,
    journal: Journal | None = None,
) -> Any:
    """A transformers model for generation and evaluation, its middle at the hub.

    join: a join string or '@FILE'; None for a `state` that is enrolled already. partition: 'p:q', by default
    the one this state trains with, else 1:1. noise: the paper's scale (mean absolute value), 0 for none; by
    default what this state trains with, else 0.02. wire: the dtype on the network, fp32, bf16, fp16 or int8; by default
    that of the model. load_in: '8bit' or '4bit' holds the weights of the edge's linear layers in so many bits; by
    default they have the hub's dtype.
    `model.hub` has the tokenizer, the traffic and `close()`. `model.generate(prompt_lookup_num_tokens=15)`, or with an
    `assistant_model`, verifies several guessed tokens in one round trip; up to so many, as many as pay by what is
    measured. Raises a FedseaError that says what to do.
    """
    wire_dtype(wire)
    journal = journal or Journal()
    edge_state = EdgeState(Path(state) if state is not None else default_state())
    bits = parse_bits(load_in)
    connection = Connection(edge_state, journal, join, name or socket.gethostname())
    try:
        return _connected(connection, model, partition, noise, pick_device(device), bits, seed, wire)
    except BaseException:
        connection.close()
        raise


def _connected(
    connection: Connection,
    model: str | None,
    partition: str | None,
    scale: float | None,
    device: torch.device,
    bits: int | None,
    seed: int,
    wire: str | None,
) -> Any:
    served = connection.describe(model)
    cut_at = Partition.parse(partition or connection.membership.partition or "1:1")
    cut_at.check(served.description.num_layers)
    if scale is None:
        scale = DEFAULT_NOISE if connection.membership.noise is None else connection.membership.noise
    noise = connection.noise(scale, seed)
    cut = build(connection, served, cut_at, noise, device, bits)
    welcome = connection.hello(cut_at, False, served.description)
    if welcome.adapter_version:
        adapters.inject(cut, lora_spec(welcome.recipe, served.files.config))
        adapters.write(cut, connection.adapter(welcome.adapter_version))
    middle = attach(cut, connection.client, welcome, wire)
    drafting = Drafting(lambda: connection.client.figures.round_trip_s)
    drafting.install(cut.model)
    cut.model.hub = Link(connection, served.files.tokenizer(), noise, middle, drafting)
    return cut.model
