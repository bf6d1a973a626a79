"""From a join string to a model whose middle runs at the hub: the steps that every edge command begins with."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from dataclasses import dataclass, replace
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors

import messaging.messages as m
from blocks import adapters
from blocks.adapters import LoraSpec
from blocks.codec import wire_dtype
from blocks.decoding import speed_up_decoding
from blocks.manifest import Manifest, check_against
from blocks.partition import Partition
from blocks.remote import build_edge, remote_of
from blocks.source import ModelFiles, open_model
from blocks.surgery import CutModel, load
from blocks.weights import Watched
from edge.client import HubClient
from edge.fetch import fetch_adapter
from edge.membership import HubKey, enrolled, settle
from edge.middle import HubMiddle
from edge.noise import GaussianNoise
from edge.pace import Pace
from edge.remote_model import RemoteModel, RemoteSource
from edge.state import EdgeState
from messaging.console import Journal
from messaging.edge_transport import EdgeTransport
from messaging.errors import FedseaError, ProtocolError

SOFTWARE = "fedsea " + installed_version("fedsea")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Mean absolute noise where nobody asks for another.
DEFAULT_NOISE = 0.02
#: How long a hub may be silent before a command gives up, unless it is told otherwise.
GIVE_UP_S = 30.0
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
    """A client of one hub, enrolled, and what is known of its model. `give_up_s`: how long the hub may be silent."""

    def __init__(
        self, state: EdgeState, journal: Journal, join: str | None, name: str, give_up_s: float = GIVE_UP_S
    ) -> None:
        self.state = state
        self.journal = journal
        self.membership = enrolled(state, journal, join, name, give_up_s)
        if settle(state, self.membership, give_up_s):
            journal.log("the hub has taken this edge's new key")
        self._changing = threading.Lock()
        self._pace = Pace()
        self._partition: Partition | None = None
        hub_key = HubKey(self.membership.hub, self.membership.next_key, self._keep_hub_key)
        transport = EdgeTransport(self.membership.hub, state.keys())
        self.client = HubClient(transport, journal, give_up_s, hub_key=hub_key)

    def leave(self) -> None:
        """Say good-bye, if the hub can be reached: it frees what it holds for this session at once."""
        if self.client.session and self.client.figures.connected:
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
        remote = RemoteModel(self.client, self.state.cache, description.model_hash, self.journal, self._pace)
        files = open_model(model) if model is not None else remote.open()
        return HubModel(description, files, remote.manifest, model is not None, _DTYPES[description.dtype])

    def hello(self, partition: Partition, train: bool, description: m.Description) -> m.Welcome:
        """Open a session."""
        self._partition = partition
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
                version=-1,
            )
        )

    def remember(self, partition: Partition, noise: float) -> None:
        """Keep the partition and the noise for the commands that come after."""
        with self._changing:
            self.membership = replace(self.membership, partition=str(partition), noise=noise)
            self.state.set_membership(self.membership)

    def _keep_hub_key(self, key: str, announced: str | None) -> None:
        """Remember the hub's key and its next one; the network thread calls this."""
        with self._changing:
            self.membership = replace(self.membership, hub=replace(self.membership.hub, key=key), next_key=announced)
            self.state.set_membership(self.membership)

    def adapter(self, version: int) -> adapters.Adapter:
        """The part of the published adapter `version` that this edge hosts, by the partition of its session."""
        name, folder = f"adapter/{version}/{self._partition}", self.state.cache / "adapters"
        with self.journal.task(f"fetching adapter version {version}") as task:
            return load_safetensors(fetch_adapter(self.client, name, folder, task, self._pace))

    def noise(self, scale: float, seed: int) -> GaussianNoise:
        """Noise from this edge's secret for it and the run's seed."""
        return GaussianNoise(scale, hashlib.sha256(self.state.noise_secret() + str(seed).encode()).digest())


def build(
    connection: Connection,
    served: HubModel,
    partition: Partition,
    noise: GaussianNoise,
    device: torch.device,
    bits: int | None = None,
) -> CutModel:
    """The edge's model, its own blocks filled, its linear layers in `bits` bits, not yet attached to a hub."""
    cut = build_edge(served.files.config, partition, served.dtype, noise)
    source = served.files.source
    hosted = [name for name in source.names() if cut.to_local(name) is not None]
    if served.own:
        check_against(served.manifest, served.files, hosted)
    elif isinstance(source, RemoteSource):
        source.fetch(hosted)
    size = sum(source.info(name).nbytes for name in hosted)
    with connection.journal.task("loading blocks", size) as task:
        load(cut, Watched(source, task.advance), served.dtype, device, bits)
    speed_up_decoding(cut.layers, cut.model.get_output_embeddings())
    cut.model.generation_config = served.files.generation_config()
    return cut


def attach(cut: CutModel, client: HubClient, welcome: m.Welcome, wire: str | None = None) -> HubMiddle:
    """Let the model's stand-in talk to the hub, in the wire dtype that the user calls `wire` (default: its own)."""
    middle = HubMiddle(client, welcome.adapter_version, wire_dtype(wire))
    remote_of(cut).attach(middle)
    return middle


def lora_spec(recipe: m.Recipe, config: Any) -> LoraSpec:
    """The adapter's shape that the hub's recipe asks for."""
    return adapters.make_spec(config, recipe.lora_rank, recipe.lora_alpha, recipe.target_modules)


def default_state(name: str | None = None) -> Path:
    """Where an edge keeps its state unless told otherwise."""
    return Path("fedsea-edge" if name is None else f"fedsea-edge-{name}")
