"""The compute behind the hub: Blocks B, their adapters, the joined training step and batched generation.

One thread owns an engine. It knows nothing of sockets, and nothing of why it is asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedConfig

from blocks import adapters
from blocks.adapters import Adapter, LoraSpec
from blocks.codec import from_wire
from blocks.decoding import speed_up_decoding
from blocks.device import free_on, spread, to_device
from blocks.layout import Layout
from blocks.middle import MiddleBlocks
from blocks.optimizer import AdapterOptimizer, Schedule
from blocks.surgery import LayerNames, load
from blocks.weights import WeightSource
from hub import ragged, streams
from hub.answers import gradient_like, hidden_like
from hub.jobs import InferItem, Outcome, StepItem
from hub.joining import Joined, Part, join
from hub.kv import KvBudget
from hub.streams import Streams, Work
from hub.training import Gradients, Graph, JoinedStep, keep_apart
from messaging.errors import ErrorCode, FedseaError, HubError, ProtocolError

_TRAIN = "training_copy"


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is made of besides the model: adapter shape, optimizer, numbers, devices, KV budget.

    devices: several share the layers, by what they have free; states come and go on the first.
    kv_budget: bytes that all caches may take, of what is free; asked for copies of weights, and once all are there.
    recompute: training keeps the layers' inputs only, and runs each layer once more in the backward.
    """

    spec: LoraSpec
    schedule: Schedule
    dtype: torch.dtype
    devices: tuple[torch.device, ...]
    kv_budget: Callable[[], int]
    recompute: bool = False


@dataclass(frozen=True, eq=False)
class Standing:
    """What training changes: the adapter, the optimizer, and the target tokens that passed each layer in this round."""

    adapter: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    layer_tokens: tuple[int, ...]


class Engine:
    """Layers 1 .. N of a model (all that an edge may leave to the hub), trained and served."""

    def __init__(self, config: PreTrainedConfig, source: WeightSource, settings: EngineSettings) -> None:
        self.settings = settings
        layers = config.get_text_config().num_hidden_layers
        self._plain = MiddleBlocks(config, 1, layers, settings.dtype)
        homes = _layer_homes(self._plain, settings.devices)
        load(self._plain.cut, source, settings.dtype, settings.devices[0], homes=homes)
        self._tuned = MiddleBlocks(config, 1, layers, settings.dtype)
        _share_weights(self._plain, self._tuned)
        for blocks in (self._plain, self._tuned):
            blocks.stand_on(homes)
        # Copies of weights may take as much as caches will, of what is free.
        speed_up_decoding([*self._plain.cut.layers, *self._tuned.cut.layers], room=settings.kv_budget())
        peft = adapters.inject(self._tuned.cut, settings.spec, _TRAIN)
        assert peft is not None
        self._peft = peft
        self._lora = [module for module in peft.modules() if isinstance(module, LoraLayer)]
        self._batches = ragged.supports(self._plain.cut.model)
        if self._batches:
            ragged.install(self._plain.cut.model)
            ragged.install(self._tuned.cut.model)
        self._trained = adapters.parameters(self._tuned.cut, _TRAIN)
        keep_apart(self._lora, _TRAIN, {id(parameter): name for name, parameter in self._trained.items()})
        self.optimizer = AdapterOptimizer(self._trained, settings.schedule)
        self._layer_of = {name: adapters.layer_of(name, self.names) for name in self._trained}
        self.hidden_size = config.get_text_config().hidden_size
        self.num_layers = layers
        self.budget = KvBudget(settings.kv_budget())
        self._streams = Streams(layers, self.budget)
        self._step = JoinedStep(settings.recompute)
        self._versions: set[int] = {0}
        #: target tokens that passed each absolute layer since the round began
        self.layer_tokens = [0] * layers
        #: forwards of the layer stack so far (what joining saves)
        self.forwards = 0

    # -- training ------------------------------------------------------------------------------------

    def step_forward(self, items: Sequence[StepItem], micro: int = 0) -> dict[int, Outcome]:
        """Join the items' rows, run them forward once, keep the graph. An item whose tensor is bad is left out.

        The items are micro-batch `micro` of a joined step; the first one begins the step.
        """
        if not micro:
            self._step = JoinedStep(self.settings.recompute)
        out: dict[int, Outcome] = {}
        good, parts = [], []
        for item in items:
            try:
                states = self._states(item.smashed, item.layout, cached=False)
            except FedseaError as error:
                out[item.session] = error
                continue
            good.append(item)
            parts.append(Part(states.requires_grad_(), item.layout, item.place))
        self._use(_TRAIN)
        hidden: list[torch.Tensor] = []
        if parts:
            with torch.enable_grad():
                hidden = self._run_joined(self._tuned, parts, [item.session for item in good])
        self._step.forward_done(micro, Graph(good, [part.states for part in parts], hidden))
        out |= {item.session: hidden_like(states, item.smashed) for item, states in zip(good, hidden, strict=True)}
        return out

    def step_backward(self, grads: Mapping[int, object], micro: int = 0) -> dict[int, Outcome]:
        """The backward of a micro-batch; what it gives B's adapter is added up by edge until `apply_step`.

        grads: gradient of the summed loss by hidden (a wire tensor) per session. Returns the gradients by smashed
        of those sessions.
        """
        graph = self._step.graphs.pop(micro)
        out: dict[int, Outcome] = {}
        roots, seeds, given = [], [], []
        for item, start, hidden in zip(graph.items, graph.inputs, graph.outputs, strict=True):
            grad = grads.get(item.session)
            if grad is None:
                continue
            try:
                seeds.append(self._states(grad, item.layout, cached=False))
            except FedseaError as error:
                out[item.session] = error
                continue
            roots.append(hidden)
            given.append((item, start, grad))
        if roots:
            # For layers that are run once more: generation may have used another adapter meanwhile.
            self._use(_TRAIN)
            torch.autograd.backward(roots, seeds)
        self._step.backward_done([item for item, _, _ in given])
        for item, start, grad in given:
            assert start.grad is not None
            out[item.session] = gradient_like(start.grad, grad)  # type: ignore[arg-type]
        return out

    def edge_gradients(self) -> Gradients:
        """The gradient of B's adapter that each edge gave in the step under way, of its summed loss, by session."""
        return self._step.gradients

    def apply_step(self, sessions: Sequence[int]) -> None:
        """Step the optimizer on what these sessions gave, and end the step. All that others gave is dropped.

        Each layer's gradient is divided by the tokens of the rows that passed it. At equal partitions that is
        the cohort's count everywhere; at mixed ones it makes the hub's share of a layer weigh, in the mean over
        all who trained the layer, what the edges behind it weigh.
        """
        step, self._step = self._step, JoinedStep(self.settings.recompute)
        if not sessions:
            return
        passed = step.passed(sessions, self.num_layers)
        total = step.total(sessions)
        for name, parameter in self._trained.items():
            parameter.grad = total.get(name)
        norm = self.optimizer.step({name: passed[layer] for name, layer in self._layer_of.items()})
        if math.isfinite(norm):
            self.layer_tokens = [before + new for before, new in zip(self.layer_tokens, passed, strict=True)]

    def _run_joined(
        self, blocks: MiddleBlocks, parts: Sequence[Part], edges: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Run the parts in as few forwards as possible; each part's hidden [rows, width, hidden], in order.

        edges: whose each part is, to train on them.
        """
        out: dict[int, torch.Tensor] = {}
        for batch in join(parts):
            rows = [edges[i] for i, first, last, _ in batch.slices for _ in range(last - first)] if edges else None
            hidden = self._run(blocks, batch, rows)
            for index, first, last, width in batch.slices:
                out[index] = hidden[first:last, :width]
        return [out[i] for i in range(len(parts))]

    def _run(self, blocks: MiddleBlocks, batch: Joined, edges: Sequence[int] | None) -> torch.Tensor:
        self.forwards += 1
        device = self.settings.devices[0]
        mask = None if batch.mask is None else to_device(batch.mask, device)
        positions = to_device(batch.positions, device)
        around = self._step.layer_runner(edges) if edges else None
        return blocks.run(batch.states, batch.enters, batch.leaves, mask, positions, around=around)

    def _states(self, tensor: object, layout: Layout, cached: bool) -> torch.Tensor:
        if layout.past and not cached:
            raise ProtocolError("only a stream of generation builds on cached positions")
        shape = (layout.rows, layout.width, self.hidden_size)
        device = self.settings.devices[0]
        return from_wire(tensor, dtype=self.settings.dtype, shape=shape, device=device)  # type: ignore[arg-type]

    # -- generation ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def infer(self, items: Sequence[InferItem], upto: Mapping[int, int] | None = None) -> list[Outcome | None]:
        """Answer each request; those of one adapter version run as one batch, of streams whatever their widths.

        upto: by index, how many columns of a stream's request are to be computed when this returns, if not all. The
        answer is None until all are; the same item, given again, is gone on with.
        """
        out: dict[int, Outcome | None] = {}
        begun: set[tuple[int, int]] = set()
        once: dict[tuple[int, int], list[tuple[int, Part]]] = {}
        cached: dict[int, list[tuple[int, Work]]] = {}
        for index, item in enumerate(items):
            try:
                if item.version not in self._versions:
                    raise HubError(ErrorCode.BEHIND, f"adapter version {item.version} is no longer served: join again")
                states_of = partial(self._states, item.smashed, item.layout, cached=item.stream != 0)
                if item.stream:
                    work = self._streams.work(item, begun, states_of)
                    cached.setdefault(item.version, []).append((index, work))
                else:
                    part = Part(states_of(), item.layout, item.place)
                    once.setdefault((item.version, item.layout.width), []).append((index, part))
            except FedseaError as error:
                out[index] = error
        for (version, _), parts in once.items():
            out |= self._infer_once(self._use_version(version), items, parts)
        for version, works in cached.items():
            out |= self._infer_cached(self._use_version(version), works, upto or {})
        return [out[index] for index in range(len(items))]

    def _infer_once(
        self, blocks: MiddleBlocks, items: Sequence[InferItem], group: list[tuple[int, Part]]
    ) -> dict[int, Outcome | None]:
        hidden = self._run_joined(blocks, [part for _, part in group])
        return {i: hidden_like(states, items[i].smashed) for (i, _), states in zip(group, hidden, strict=True)}

    def _infer_cached(
        self, blocks: MiddleBlocks, group: list[tuple[int, Work]], upto: Mapping[int, int]
    ) -> dict[int, Outcome | None]:
        out: dict[int, Outcome | None] = {}
        for batch in [group] if self._batches else [[one] for one in group]:
            error = self._advance(blocks, [(work, upto.get(index, work.item.layout.width)) for index, work in batch])
            if error is None:
                out |= {index: self._answer(work) for index, work in batch}
            elif len(batch) > 1:
                # The KV budget ran out part of the way. Those for whom there is room alone are served.
                for one in batch:
                    out |= self._infer_cached(blocks, [one], upto)
            else:
                ((index, work),) = batch
                out[index] = error
                self.close_stream(work.item.session, work.item.stream)
        return out

    def _advance(self, blocks: MiddleBlocks, works: Sequence[tuple[Work, int]]) -> HubError | None:
        """Compute each work up to its column in one forward; all stand where they stood if there is an error."""
        missing = [(work, work.piece(columns)) for work, columns in works if columns > work.have]
        if not missing:
            return None
        self.forwards += 1
        try:
            hidden = streams.run(blocks, [piece for _, piece in missing])
        except HubError as error:
            for work, _ in missing:
                work.cache.undo()
            return error
        for (work, _), states in zip(missing, hidden, strict=True):
            work.add(states)
        return None

    def _answer(self, work: Work) -> Outcome | None:
        if not work.whole:
            return None
        self._streams.done(work)
        return hidden_like(work.answer(), work.item.smashed)

    def close_stream(self, session: int, stream: int) -> None:
        """Free a stream's memory; an unknown one is no error."""
        self._streams.close(session, stream)

    def close_session(self, session: int) -> None:
        """Free all streams of a session."""
        self._streams.close_session(session)

    @property
    def streams(self) -> int:
        """Streams that hold memory."""
        return len(self._streams)

    @property
    def evicted(self) -> int:
        """Streams that lost their memory to others so far."""
        return self._streams.evicted

    # -- adapters ------------------------------------------------------------------------------------

    def trained(self) -> Adapter:
        """A copy of the adapter in training."""
        return adapters.read(self._tuned.cut, _TRAIN)

    def set_trained(self, adapter: Mapping[str, torch.Tensor]) -> None:
        """Go on training from these values; the optimizer's moments stay."""
        adapters.write(self._tuned.cut, adapter, _TRAIN)

    def publish(self, version: int, adapter: Mapping[str, torch.Tensor], keep: Collection[int]) -> None:
        """Serve `adapter` as `version`; of the older versions only those in `keep` stay."""
        keep = set(keep)
        for old in self._versions - keep - {version}:
            if old:
                self._peft.delete_adapter(_version_name(old))
        self._versions = (self._versions & keep) | {version}
        if version:
            self._peft.add_adapter(_version_name(version), self.settings.spec.config())
            adapters.write(self._tuned.cut, adapter, _version_name(version))
            for parameter in adapters.parameters(self._tuned.cut, _version_name(version)).values():
                parameter.requires_grad_(False)
        for parameter in adapters.parameters(self._tuned.cut, _TRAIN).values():
            parameter.requires_grad_(True)

    def standing(self) -> Standing:
        """A copy of all that training changes."""
        return Standing(self.trained(), self.optimizer.state(), tuple(self.layer_tokens))

    def restore(self, standing: Standing) -> None:
        """Stand there, and forget all that came after it."""
        self.set_trained(standing.adapter)
        self.optimizer.load(dict(standing.optimizer))
        self.layer_tokens = list(standing.layer_tokens)
        self._step = JoinedStep(self.settings.recompute)

    def begin_round(self, version: int, adapter: Mapping[str, torch.Tensor], keep: Collection[int]) -> None:
        """Go on training from a round's adapter, and serve it as `version`, as `publish` does."""
        self.set_trained(adapter)
        self.layer_tokens = [0] * self.num_layers
        self.publish(version, adapter, keep)

    @property
    def versions(self) -> set[int]:
        """Adapter versions that are served; replaced as a whole, never changed, so any thread may look."""
        return self._versions

    @property
    def homes(self) -> dict[torch.device, list[int]]:
        """The absolute layers on each device; empty where there is only one."""
        return self._plain.layers_by_device()

    @property
    def names(self) -> LayerNames:
        """Where the model's layers stand."""
        return self._plain.cut.names

    def _use(self, adapter: str) -> None:
        for module in self._lora:
            module._active_adapter = [adapter]

    def _use_version(self, version: int) -> MiddleBlocks:
        # Version 0 is the initial adapter, whose B is zero: the plain blocks give the same without its cost.
        if version == 0:
            return self._plain
        self._use(_version_name(version))
        return self._tuned


def _version_name(version: int) -> str:
    return f"v{version}"


def _layer_homes(blocks: MiddleBlocks, devices: Sequence[torch.device]) -> list[torch.device]:
    """Each layer's device; empty where there is only one. Raises InputError where they do not fit."""
    sizes = [sum(parameter.nbytes for parameter in layer.parameters()) for layer in blocks.cut.layers]
    numbers = spread(sizes, devices, free_on(devices))
    return [devices[number] for number in numbers] if len(devices) > 1 else []


def _share_weights(source: MiddleBlocks, target: MiddleBlocks) -> None:
    """Let both hold the same tensors: one copy of the weights in memory."""
    theirs = dict(source.cut.model.named_modules())
    for path, module in target.cut.model.named_modules():
        for name, parameter in theirs[path].named_parameters(recurse=False):
            setattr(module, name, parameter)
        for name, buffer in theirs[path].named_buffers(recurse=False):
            module._buffers[name] = buffer
