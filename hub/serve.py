"""`hub serve`: put a hub together from a model, a state folder and a recipe, and run it."""

from __future__ import annotations

import gc
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import psutil
import torch
import zmq
from safetensors.torch import save as save_safetensors

from blocks import adapters
from blocks.adapters import LoraSpec
from blocks.device import pick_device
from blocks.optimizer import Schedule
from blocks.source import ModelFiles, open_model
from hub.credits import Credits
from hub.desk import Desk, Served
from hub.engine import Engine, EngineSettings
from hub.library import Library
from hub.loading import load_engine
from hub.membership import answers_from_tensors, notes_from_json
from hub.monitor import VIEW, HubSnapshot
from hub.scheduler.state import State
from hub.server import Server
from hub.store.checkpoints import Checkpoint
from hub.store.files import write_bytes_atomic
from hub.store.state import HubState, ModelInfo
from hub.worker import Worker
from messaging.access import Gate
from messaging.console import Journal, LiveView, plain_lines
from messaging.errors import InputError
from messaging.hub_transport import HubTransport
from messaging.joining import HubAddress, JoinString
from messaging.messages import Recipe
from messaging.transport import Channel
from profiles.cgroup import cgroup_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
            self.state.write_status({**vars(snapshot), "edges": [vars(row) for row in snapshot.edges]})
        return snapshot


@contextmanager
def _assemble(options: Options, files: ModelFiles, state: HubState, journal: Journal) -> Iterator[Hub]:
    device = pick_device(options.device)
    dtype = _dtype(options.dtype, device, files.config)
    spec = adapters.make_spec(files.config, options.lora_rank, options.lora_alpha, options.target_modules)
    recipe = _recipe(options, spec)
    initial = adapters.initial(files.config, spec, options.seed)
    with journal.task("reading a sample of every tensor"):
        library = Library(files, state.adapters.get, save_safetensors(initial))
    _check_state(state, library.hash, recipe)
    point, warnings = state.checkpoints.load_latest()
    for warning in warnings:
        journal.log(warning)
    engine = load_engine(files, library.layers, _settings(recipe, spec, dtype, device, options.recompute), journal)
    published = _restore(engine, state, point, initial, journal)
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
        served, recipe, state.next_epoch(), _credits(), point.applied if point else {},
        point.extra["round_tokens"] if point else {}, initial, f"fedsea {installed_version('fedsea')}",
    )  # fmt: skip
    with _listening(options, state, journal) as (transport, address, gate):
        scheduler = _scheduler_state(recipe, point, options.quorum or 0)
        server = Server(
            transport=transport,
            state=state,
            library=library,
            worker_of=lambda report: Worker(engine, state, recipe, published, report),
            scheduler_state=scheduler,
            desk=desk,
            journal=journal,
            grace_s=options.grace_s,
            checkpoint_s=options.checkpoint_s,
            deadline_s=options.deadline_s or 0.0,
            check_gate=gate.check,
        )
        if point is not None:
            answered = answers_from_tensors(point.blobs, point.extra["answered"])
            server.restore(notes_from_json(point.extra["members"]), answered, point.extra["gathered"])
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


def _restore(
    engine: Engine, state: HubState, point: Checkpoint | None, initial: adapters.Adapter, journal: Journal
) -> adapters.Adapter:
    """Bring the engine to the last checkpoint, or to the initial adapter; returns what is published."""
    if point is None:
        state.adapters.rewind(0)
        engine.set_trained(initial)
        return initial
    engine.set_trained(point.adapter)
    engine.optimizer.load(dict(point.optimizer))
    engine.layer_tokens = list(point.extra["layer_tokens"])
    state.adapters.rewind(point.version)
    published = initial
    if point.version:
        kept = state.adapters.kept()
        if not kept or kept[0].version != point.version:
            raise InputError(f"the published adapter version {point.version} is missing in {state.folder}/adapters")
        published = kept[0].tensors()
        # The older ones too: generations that began with them go on.
        for old in reversed(kept[1:]):
            engine.publish(old.version, old.tensors(), engine.versions)
        engine.publish(point.version, published, engine.versions)
    journal.log(f"going on from the checkpoint at step {point.hub_step}, round {point.round}")
    return published


def _scheduler_state(recipe: Recipe, point: Checkpoint | None, quorum: int) -> State:
    state = State(cohort=recipe.cohort, round_steps=recipe.round_steps, rounds=recipe.rounds, quorum=quorum)
    if point is not None:
        state.hub_step, state.round = point.hub_step, point.round
        state.round_step, state.version = point.round_step, point.version
    return state


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
    recipe: Recipe, spec: LoraSpec, dtype: torch.dtype, device: torch.device, recompute: bool
) -> EngineSettings:
    schedule = Schedule(recipe.lr, recipe.warmup_steps, recipe.clip_norm, recipe.weight_decay)
    return EngineSettings(spec, schedule, dtype, device, _kv_bytes(device), recompute)


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


def _kv_bytes(device: torch.device) -> int:
    """A quarter of the memory that is free before anybody generates."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 4
    return _free_bytes() // 4


def _credits() -> Credits:
    """A quarter of the memory that is free for the bytes in work of all edges."""
    return Credits(_free_bytes() // 4)


def _free_bytes() -> int:
    """Memory that this process may still use: the machine's, or what a container leaves of it."""
    limited, free = cgroup_memory(), psutil.virtual_memory().available
    return free if limited is None else min(free, limited[1])


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
