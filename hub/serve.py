"""`hub serve`: put a hub together from a model, a state folder and a recipe, and run it."""

from __future__ import annotations

import gc
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import torch
import zmq
from safetensors.torch import save as save_safetensors

from blocks import adapters
from blocks.adapters import LoraSpec
from blocks.optimizer import Schedule
from blocks.source import ModelFiles, open_model
from blocks.surgery import LayerNames
from hub.credits import Credits
from hub.desk import Desk, Served
from hub.engine import Engine, EngineSettings
from hub.keeper import Keeper, all_applied, all_tokens, fresh
from hub.library import Library
from hub.loading import DTYPES, free_bytes, kv_bytes, load_engine
from hub.monitor import VIEW, HubSnapshot
from hub.recovery import state_at
from hub.replicas.actor import Plan
from hub.replicas.assembly import compute_place, start_replicas
from hub.replicas.cluster import Cluster
from hub.replicas.remote import RemoteEngine
from hub.scheduler.state import State
from hub.server import Server
from hub.store.checkpoints import Checkpoint
from hub.store.files import write_bytes_atomic
from hub.store.state import HubState, ModelInfo
from hub.worker import stand
from messaging.access import Gate
from messaging.console import Journal, LiveView, plain_lines
from messaging.errors import InputError
from messaging.hub_transport import HubTransport
from messaging.joining import HubAddress, JoinString
from messaging.messages import Recipe
from messaging.transport import Channel

POCKET = Path(__file__).parent / "pocket"
_TOKEN_S = 600.0


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    model: str | None
    listen: str
    advertise: str | None
    state: Path
    device: str
    dtype: str
    cohort: int
    rounds: int
    round_steps: int
    lr: float
    lora_rank: int
    lora_alpha: float
    target_modules: tuple[str, ...]
    grace_s: float
    checkpoint_s: float
    quorum: int | None
    deadline_s: float | None
    recompute: bool
    join_file: Path | None
    headless: bool
    seed: int
    replicas: int | None = None
    ray: str | None = None


def serve(options: Options) -> str:
    """Run a hub until SIGTERM or Ctrl-C. Returns what stopped it: 'SIGTERM' or 'SIGINT'."""
    with ExitStack() as owned:
        state = owned.enter_context(HubState.open(options.state, exclusive=True))
        journal = Journal()
        with plain_lines(journal, sys.stdout):
            journal.log("loading the model")
            files = open_model(options.model or str(POCKET))
            hub = owned.enter_context(_assemble(options, files, state, journal))
        stopped: list[str] = []

        def stop(number: int, frame: object) -> None:
            stopped.append(signal.Signals(number).name)
            hub.server.stop()

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        owned.callback(lambda: [signal.signal(number, handler) for number, handler in previous.items()])
        _announce(options, hub, journal)
        with LiveView(hub.take_snapshot, VIEW, journal, headless=options.headless):
            # What is there now stays: without this, every full collection looks through all of it, for 0.2 s.
            gc.collect()
            gc.freeze()
            hub.server.run()
        return stopped[0] if stopped else "stopped"


@dataclass
class Hub:
    """A hub put together, ready to run."""

    server: Server
    state: HubState
    address: HubAddress
    recipe: Recipe
    #: the snapshot that `status.json` was written of
    _written: HubSnapshot | None = None

    def take_snapshot(self) -> Any:
        """For the live view; also what `hub status` shows."""
        found = self.server.snapshot
        snapshot = replace(found, endpoints=(f"{self.address.host}:{self.address.ctl}",))
        if found is not self._written:
            self._written = found
            # As `asdict`, which copies every value of every edge and takes thirty times as long.
            rows = {"edges": [vars(row) for row in snapshot.edges], "replicas": [vars(r) for r in snapshot.replicas]}
            self.state.write_status({**vars(snapshot), **rows})
        return snapshot


@contextmanager
def _assemble(options: Options, files: ModelFiles, state: HubState, journal: Journal) -> Iterator[Hub]:
    with compute_place(options.device, options.replicas, options.ray) as (cluster, devices):
        yield from _assemble_there(options, files, state, journal, cluster, devices)


def _assemble_there(
    options: Options,
    files: ModelFiles,
    state: HubState,
    journal: Journal,
    cluster: Cluster | None,
    devices: tuple[torch.device, ...],
) -> Iterator[Hub]:
    dtype = _dtype(options.dtype, devices[0], files.config)
    spec = adapters.make_spec(files.config, options.lora_rank, options.lora_alpha, options.target_modules)
    recipe = _recipe(options, spec)
    initial = adapters.initial(files.config, spec, options.seed)
    with journal.task("reading a sample of every tensor"):
        library = Library(files, state.adapters.get, save_safetensors(initial))
    _check_state(state, library.hash, recipe)
    point, warnings = state.checkpoints.load_latest()
    for warning in warnings:
        journal.log(warning)
    replicas = options.replicas or 1
    parts, versions = _parts(state, point, initial, library.layers, replicas)
    settings = _settings(recipe, spec, dtype, devices, options.recompute)
    engines = _engines(cluster, files, library, settings, parts[:replicas], versions, journal)
    if point is not None:
        step = sum(part.hub_step for part in parts)
        journal.log(f"going on from the checkpoint at step {step}, round {point.round}")
    text_config = files.config.get_text_config()
    served = Served(
        name=files.name,
        hash=library.hash,
        dtype=str(dtype).removeprefix("torch."),
        num_layers=text_config.num_hidden_layers,
        hidden_size=text_config.hidden_size,
        max_positions=getattr(text_config, "max_position_embeddings", None) or 1 << 20,
    )
    state.set_training(
        ModelInfo(files.name, library.hash, served.dtype, served.num_layers, spec.fan_in_fan_out), recipe
    )
    desk = Desk(
        served, recipe, state.next_epoch(), _credits(), all_applied(parts), all_tokens(parts), initial,
        f"fedsea {installed_version('fedsea')}", _homes(parts, replicas),
    )  # fmt: skip
    published = versions.get(parts[0].version, initial)
    keeper = Keeper(state, recipe, library.layers, parts, replicas, published)
    with _listening(options, state, journal) as (transport, address, gate):
        server = Server(
            transport=transport,
            state=state,
            library=library,
            engines=engines,
            keeper=keeper,
            states=_states(recipe, parts, replicas, options.quorum or 0),
            desk=desk,
            journal=journal,
            grace_s=options.grace_s,
            checkpoint_s=options.checkpoint_s,
            deadline_s=options.deadline_s or 0.0,
            check_gate=gate.check,
        )
        if point is not None:
            server.restore(parts)
        yield Hub(server, state, address, recipe)


@contextmanager
def _listening(options: Options, state: HubState, journal: Journal) -> Iterator[tuple[HubTransport, HubAddress, Gate]]:
    _raise_descriptor_limit()
    if state.adopt_next_keys():
        journal.log("the hub has the key now that `hub rotate-key` made")
    keys = state.keys()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    gate = Gate(context, state.access, state.refused_at_the_handshake)
    try:
        transport = HubTransport(context, keys, options.listen, approvals=gate.approvals)
        try:
            ports = transport.ports
            host = options.advertise or _reachable_host(options.listen)
            address = HubAddress(host, ports[Channel.CTL], ports[Channel.BULK], ports[Channel.ENROL], keys.public)
            state.set_address(address)
            state.audit.write("hub started", key=keys.public, reason=f"at {host}, port {address.ctl}")
            yield transport, address, gate
            state.audit.write("hub stopped", key=keys.public)
        finally:
            transport.close()
    finally:
        gate.stop()
        context.term()


def _announce(options: Options, hub: Hub, journal: Journal) -> None:
    """Print the join string; write the join file. The sockets are bound: edges that come now are served."""
    uses = max(options.cohort, 8)
    text = JoinString(hub.address, hub.state.access.invite(uses, _TOKEN_S)).encode()
    # Printed whole, ahead of the live view, and kept out of the log: it lets edges in.
    print(f"edges join within 10 minutes with:\nedge join {text} --data FILE", flush=True)
    if options.join_file is not None:
        write_bytes_atomic(options.join_file, text.encode() + b"\n")
        journal.log(f"the join string is in {options.join_file}")
    journal.log(f"ready at {hub.address.host}, ports {hub.address.ctl}, {hub.address.bulk}, {hub.address.enrol}")


def _parts(
    state: HubState, point: Checkpoint | None, initial: adapters.Adapter, layers: LayerNames, replicas: int
) -> tuple[list[Checkpoint], dict[int, adapters.Adapter]]:
    """Where each replica goes on, behind them those that are no more; and the adapters that are served."""
    saved = [] if point is None else [point, *point.others]
    state.adapters.rewind(saved[0].version if saved else 0)
    # The older ones too: generations that began with them go on.
    served = {kept.version: kept.tensors() for kept in state.adapters.kept()}
    version = saved[0].version if saved else 0
    if version and version not in served:
        raise InputError(f"the published adapter version {version} is missing in {state.folder}/adapters")
    hosted = adapters.of_layers(served.get(version, initial), layers, 1, layers.count)
    new = [fresh(hosted, layers.count, point) for _ in range(replicas - len(saved))]
    return [*saved, *new], served


def _states(recipe: Recipe, parts: Sequence[Checkpoint], replicas: int, quorum: int) -> list[State]:
    like = State(recipe.cohort, recipe.round_steps, recipe.rounds, quorum, joint=replicas > 1)
    return [state_at(part, like) for part in parts[:replicas]]


def _homes(parts: Sequence[Checkpoint], replicas: int) -> dict[str, int]:
    """The group of each edge; those of replicas that are no more are booked in the first until they come."""
    return {key: number if number < replicas else 0 for number, part in enumerate(parts) for key in part.applied}


def _engines(
    cluster: Cluster | None,
    files: ModelFiles,
    library: Library,
    settings: EngineSettings,
    parts: Sequence[Checkpoint],
    versions: dict[int, adapters.Adapter],
    journal: Journal,
) -> list[Engine] | list[RemoteEngine]:
    """The engine in this process, or one in each replica's; they stand where their parts say."""
    if cluster is None:
        engine = load_engine(files, library.layers, settings, journal)
        stand(engine, parts[0], versions)
        return [engine]
    plan = Plan(
        files.name, library.hash, settings.spec, settings.schedule, str(settings.dtype).removeprefix("torch."),
        tuple(str(device) for device in settings.devices), share=1, threads=0, recompute=settings.recompute,
    )  # fmt: skip
    return list(start_replicas(cluster, plan, parts, versions, journal))


def _recipe(options: Options, spec: LoraSpec) -> Recipe:
    return Recipe(
        lr=options.lr,
        lora_rank=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=spec.targets,
        round_steps=options.round_steps,
        rounds=options.rounds,
        cohort=options.cohort,
        clip_norm=1.0,
        warmup_steps=10,
        weight_decay=0.01,
        seed=options.seed,
    )


def _settings(
    recipe: Recipe, spec: LoraSpec, dtype: torch.dtype, devices: tuple[torch.device, ...], recompute: bool
) -> EngineSettings:
    schedule = Schedule(recipe.lr, recipe.warmup_steps, recipe.clip_norm, recipe.weight_decay)
    return EngineSettings(spec, schedule, dtype, devices, partial(kv_bytes, devices), recompute)


def _check_state(state: HubState, model_hash: str, recipe: Recipe) -> None:
    """A state folder belongs to one model and one adapter shape."""
    known, before = state.model(), state.recipe()
    if known is not None and known.hash != model_hash:
        raise InputError(
            f"{state.folder} holds the training of another model ({known.name}): give another --state, or that --model"
        )
    if before is None:
        return
    for name in ("lora_rank", "target_modules", "seed", "lora_alpha"):
        if getattr(before, name) != getattr(recipe, name):
            raise InputError(
                f"{state.folder} was begun with {name} {getattr(before, name)}: give the same, or another --state"
            )


def _dtype(name: str, device: torch.device, config: Any) -> torch.dtype:
    """`auto`: what the checkpoint has on a GPU, float32 on a CPU (where half precision is slower)."""
    if name == "auto":
        own = getattr(config, "dtype", None)
        return own if device.type != "cpu" and isinstance(own, torch.dtype) else torch.float32
    if name not in DTYPES:
        raise InputError(f"--dtype {name}: choose auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _credits() -> Credits:
    """A quarter of the memory that is free for the bytes in work of all edges."""
    return Credits(free_bytes() // 4)


def _raise_descriptor_limit() -> None:
    """Two descriptors an edge: as many as the system lets this process have, not what is usual."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _reachable_host(listen: str) -> str:
    """The host that edges dial: the one listened on, or this machine's name for a wildcard."""
    host = listen.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    if host in ("*", "0.0.0.0", "::"):
        import socket

        return socket.getfqdn()
    return host
