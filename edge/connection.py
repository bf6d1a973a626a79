"""From a join string to a model whose middle runs at the hub: the steps that every edge command begins with."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass, replace
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors

import messaging.messages as m
from blocks import adapters
from blocks.adapters import LoraSpec
from blocks.manifest import Manifest, check_against
from blocks.partition import Partition
from blocks.remote import RemoteBlocks, build_edge, remote_of
from blocks.source import ModelFiles, open_model
from blocks.surgery import CutModel, load, store_by_columns
from edge.client import HubClient
from edge.fetch import fetch_bytes
from edge.middle import HubMiddle
from edge.noise import GaussianNoise
from edge.remote_model import RemoteModel
from edge.state import EdgeState, Membership
from messaging.console import Journal
from messaging.edge_transport import EdgeTransport
from messaging.enrol import enrol
from messaging.errors import FedseaError, InputError, ProtocolError, Refused
from messaging.joining import JoinString, read_join

SOFTWARE = "fedsea " + installed_version("fedsea")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Mean absolute noise where nobody asks for another.
DEFAULT_NOISE = 0.02
_ENROL_S = 30.0
_LEAVE_S = 2.0


@dataclass(frozen=True)
class HubModel:
    """What the hub serves, as this edge may read it: from its own copy, or over the wire.

    `own` says which; a copy of one's own is held against the manifest.
    """

    description: m.Description
    files: ModelFiles
    manifest: Manifest
    own: bool
    dtype: torch.dtype


class Connection:
    """A client of one hub, enrolled, and what is known of its model."""

    def __init__(self, state: EdgeState, journal: Journal, join: str | None, name: str) -> None:
        self.state = state
        self.journal = journal
        self.membership = _enrolled(state, journal, join, name)
        self.client = HubClient(EdgeTransport(self.membership.hub, state.keys()), journal)

    def leave(self) -> None:
        """Say good-bye, if the hub can be reached: it frees what it holds for this session at once."""
        if self.client.session:
            with contextlib.suppress(FedseaError):
                self.client.ask(m.Leave(0, "done"), m.Bye, deadline_s=_LEAVE_S)

    def close(self) -> None:
        """End the network thread."""
        self.client.close()

    def describe(self, model: str | None) -> HubModel:
        """Ask what the hub serves; read the model from `model` (checked to be the same) or from the hub."""
        asked = m.Describe(m.PROTOCOL_VERSION, m.PROTOCOL_VERSION, SOFTWARE)
        description = self.client.ask(asked, m.Description)
        if description.dtype not in _DTYPES:
            raise ProtocolError(f"the hub works in {description.dtype!r}, which this edge does not know")
        remote = RemoteModel(self.client, self.state.cache, description.model_hash)
        files = open_model(model) if model is not None else remote.open()
        return HubModel(description, files, remote.manifest, model is not None, _DTYPES[description.dtype])

    def hello(self, partition: Partition, train: bool, description: m.Description, steps_done: int = 0) -> m.Welcome:
        """Open a session."""
        return self.client.open(
            m.Hello(
                min_version=m.PROTOCOL_VERSION,
                max_version=m.PROTOCOL_VERSION,
                software=SOFTWARE,
                name=self.membership.name,
                train=int(train),
                model_hash=description.model_hash,
                p=partition.p,
                q=partition.q,
                lora_rank=0,
                resume=0,
                steps_done=steps_done,
            )
        )

    def remember(self, partition: Partition, noise: float) -> None:
        """Keep the partition and the noise for the commands that come after."""
        self.membership = replace(self.membership, partition=str(partition), noise=noise)
        self.state.set_membership(self.membership)

    def adapter(self, version: int) -> adapters.Adapter:
        """The published adapter `version`, whole."""
        return load_safetensors(fetch_bytes(self.client, f"adapter/{version}"))

    def noise(self, scale: float, seed: int) -> GaussianNoise:
        """Noise from this edge's secret key and the run's seed."""
        secret = self.state.keys().secret.encode()
        return GaussianNoise(scale, hashlib.sha256(secret + str(seed).encode()).digest())


def _enrolled(state: EdgeState, journal: Journal, join: str | None, name: str) -> Membership:
    """Where this edge belongs; enrols it first if it is new there."""
    known = state.membership()
    if join is None:
        if known is None:
            raise InputError(f"{state.folder} is enrolled nowhere yet: give the join string that the hub printed")
        return known
    ticket: JoinString = read_join(join)
    if known is not None and known.hub.key == ticket.hub.key:
        # The same hub, perhaps at new ports: its key is what counts.
        membership = replace(known, hub=ticket.hub)
    elif known is not None:
        raise Refused(
            f"{state.folder} belongs to another hub ({known.hub.host}): give another --state for this join string"
        )
    else:
        journal.log(f"enrolling at {ticket.hub.host}")
        membership = Membership(ticket.hub, enrol(ticket, state.keys(), name, _ENROL_S))
    state.set_membership(membership)
    return membership


def build(
    connection: Connection, served: HubModel, partition: Partition, noise: GaussianNoise, device: torch.device
) -> CutModel:
    """The edge's model, its own blocks filled, not yet attached to a hub."""
    cut = build_edge(served.files.config, partition, served.dtype, noise)
    if served.own:
        hosted = [name for name in served.files.source.names() if cut.to_local(name) is not None]
        check_against(served.manifest, served.files, hosted)
    load(cut, served.files.source, served.dtype, device)
    store_by_columns(cut.layers)
    cut.model.generation_config = served.files.generation_config()
    return cut


def attach(cut: CutModel, client: HubClient, welcome: m.Welcome) -> tuple[RemoteBlocks, HubMiddle]:
    """Let the model's stand-in talk to the hub."""
    middle = HubMiddle(client, welcome.adapter_version)
    remote = remote_of(cut)
    remote.attach(middle)
    return remote, middle


def lora_spec(recipe: m.Recipe, config: Any) -> LoraSpec:
    """The adapter's shape that the hub's recipe asks for."""
    return adapters.make_spec(config, recipe.lora_rank, recipe.lora_alpha, recipe.target_modules)


def default_state(name: str | None = None) -> Path:
    """Where an edge keeps its state unless told otherwise."""
    return Path("fedsea-edge" if name is None else f"fedsea-edge-{name}")
