"""Tiny random models of many architectures, and an edge joined to an engine without a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from threading import Condition, Thread
from typing import Any, Protocol

import torch
import transformers as T
from transformers import AutoModelForCausalLM, PreTrainedModel

from blocks import adapters
from blocks.codec import from_wire, to_wire
from blocks.layout import Layout
from blocks.optimizer import Schedule
from blocks.partition import Partition
from blocks.remote import build_edge, remote_of
from blocks.surgery import CutModel, load
from edge.middle import Part
from hub.engine import Engine, EngineSettings
from hub.jobs import InferItem, Outcome, Place, StepItem
from messaging.messages import MOST_MICRO_BATCHES, AnyMessage, StepGrad, StepHidden, Tensor
from tests.support.weights import StateDictSource

LAYERS = 6
VOCAB = 120
KV_BYTES = 1 << 28
CPU = torch.device("cpu")

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_BASE = {
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    **_IDS,
}
_GQA = {**_BASE, "intermediate_size": 96, "num_key_value_heads": 2}

CONFIGS = {
    "llama": lambda: T.LlamaConfig(**_GQA),
    "mistral": lambda: T.MistralConfig(**_GQA, sliding_window=8, head_dim=16),
    "qwen2": lambda: T.Qwen2Config(**_GQA, use_sliding_window=True, sliding_window=8, max_window_layers=2),
    "qwen3": lambda: T.Qwen3Config(**_GQA, head_dim=16),
    "gemma2": lambda: T.Gemma2Config(**_GQA, head_dim=16, sliding_window=8),
    "gemma3": lambda: T.Gemma3TextConfig(**_GQA, head_dim=16, sliding_window=8),
    "phi3": lambda: T.Phi3Config(**_GQA),
    "gpt2": lambda: T.GPT2Config(n_embd=64, n_layer=LAYERS, n_head=4, vocab_size=VOCAB, n_positions=256, **_IDS),
    "opt": lambda: T.OPTConfig(**_BASE, ffn_dim=96, word_embed_proj_dim=64),
    "gpt_neox": lambda: T.GPTNeoXConfig(**_BASE, intermediate_size=96),
}

#: Beyond the ten: the tuple-returning, ALiBi, mixture-of-experts and scaling kinds.
MORE_CONFIGS = {
    "bloom": lambda: T.BloomConfig(hidden_size=64, n_layer=LAYERS, n_head=4, vocab_size=VOCAB, **_IDS),
    "falcon": lambda: T.FalconConfig(
        hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, vocab_size=VOCAB, **_IDS
    ),
    "gptj": lambda: T.GPTJConfig(
        n_embd=64, n_layer=LAYERS, n_head=4, vocab_size=VOCAB, n_positions=256, rotary_dim=8, **_IDS
    ),
    "mixtral": lambda: T.MixtralConfig(**_GQA, num_local_experts=4),
    "qwen3_moe": lambda: T.Qwen3MoeConfig(
        **_GQA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, mlp_only_layers=[1]
    ),
    "smollm3": lambda: T.SmolLM3Config(**_GQA),
    "stablelm": lambda: T.StableLmConfig(**_GQA),
    "granite": lambda: T.GraniteConfig(**_GQA, embedding_multiplier=3.0),
    "glm4": lambda: T.Glm4Config(**_GQA, head_dim=16),
    "starcoder2": lambda: T.Starcoder2Config(**_GQA),
}


def whole_model(config: T.PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The unsplit model with random weights, norms included (so that a skipped norm shows)."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def source_of(model: PreTrainedModel) -> StateDictSource:
    """The model's tensors as a checkpoint."""
    return StateDictSource({name: tensor.clone() for name, tensor in model.state_dict().items()})


def make_schedule(lr: float = 1e-3, clip: float = math.inf, warmup: int = 0, decay: float = 0.0) -> Schedule:
    """Optimizer settings for tests: nothing but AdamW itself unless asked for."""
    return Schedule(lr, warmup, clip, decay)


def make_engine(
    whole: PreTrainedModel,
    spec: adapters.LoraSpec | None = None,
    schedule: Schedule | None = None,
    kv_bytes: int = KV_BYTES,
    dtype: torch.dtype = torch.float32,
    devices: tuple[torch.device, ...] = (CPU,),
) -> Engine:
    """An engine over the whole model's middle layers."""
    spec = spec or adapters.make_spec(whole.config, 4, 8)
    settings = EngineSettings(spec, schedule or make_schedule(), dtype, devices, lambda: kv_bytes)
    return Engine(whole.config, source_of(whole), settings)


class Hub(Protocol):
    """Where a `LocalMiddle` brings its requests."""

    engine: Engine

    def infer(self, item: InferItem) -> Outcome:
        """See Engine."""

    def step_forward(self, item: StepItem) -> Outcome:
        """See Engine."""

    def step_backward(self, session: int, grad: Tensor, micro: int, last: bool) -> Outcome:
        """See Engine; after the last micro-batch the step is applied."""


class Alone:
    """Every request by itself."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def infer(self, item: InferItem) -> Outcome:
        """See Hub."""
        return self.engine.infer([item])[0]

    def step_forward(self, item: StepItem) -> Outcome:
        """See Hub."""
        return self.engine.step_forward([item], item.micro)[item.session]

    def step_backward(self, session: int, grad: Tensor, micro: int, last: bool) -> Outcome:
        """See Hub."""
        answer = self.engine.step_backward({session: grad}, micro)[session]
        if last:
            self.engine.apply_step([] if isinstance(answer, Exception) else [session])
        return answer


class Together:
    """The requests of all sessions at once: each waits in its own thread until the others have asked or ended."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._changed = Condition()
        self._members: set[int] = set()
        self._asked: dict[int, tuple[str, Any]] = {}
        self._answers: dict[int, Outcome] = {}

    def infer(self, item: InferItem) -> Outcome:
        """See Hub."""
        return self._ask(item.session, "infer", item)

    def step_forward(self, item: StepItem) -> Outcome:
        """See Hub."""
        return self._ask(item.session, "forward", item)

    def step_backward(self, session: int, grad: Tensor, micro: int, last: bool) -> Outcome:
        """See Hub."""
        assert (micro, last) == (0, True), "one micro-batch each"
        return self._ask(session, "backward", grad)

    def run(self, jobs: dict[int, Callable[[], Any]]) -> dict[int, Any]:
        """Run each session's job in a thread; their results by session. Raises what a job raised."""
        results: dict[int, Any] = {}
        self._members = set(jobs)
        threads = [Thread(target=self._run_one, args=(session, job, results)) for session, job in jobs.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results.values():
            if isinstance(result, BaseException):
                raise result
        return results

    def _run_one(self, session: int, job: Callable[[], Any], results: dict[int, Any]) -> None:
        try:
            results[session] = job()
        except BaseException as error:
            results[session] = error
        with self._changed:
            self._members.discard(session)
            self._serve()

    def _ask(self, session: int, kind: str, what: Any) -> Outcome:
        with self._changed:
            self._asked[session] = (kind, what)
            self._serve()
            assert self._changed.wait_for(lambda: session in self._answers, timeout=60)
            return self._answers.pop(session)

    def _serve(self) -> None:
        if not self._asked or set(self._asked) != self._members:
            return
        asked, self._asked = dict(sorted(self._asked.items())), {}
        (kind,) = {kind for kind, _ in asked.values()}
        items = [what for _, what in asked.values()]
        if kind == "infer":
            self._answers |= zip(asked, self.engine.infer(items), strict=True)
        elif kind == "forward":
            self._answers |= self.engine.step_forward(items)
        else:
            answers = self.engine.step_backward(dict(zip(asked, items, strict=True)))
            self.engine.apply_step([session for session in asked if not isinstance(answers[session], Exception)])
            self._answers |= answers
        self._changed.notify_all()


class LocalMiddle:
    """Blocks B of an engine in this process: what the network does, without the network."""

    def __init__(self, hub: Hub, partition: Partition, session: int = 1) -> None:
        self.hub, self.session = hub, session
        self.place = Place(partition.p, partition.leave(hub.engine.num_layers))
        self.version, self._streams, self._requests = 0, 0, 0
        #: the dtype on the wire; None: that of the tensors
        self.wire: str | None = None
        #: layouts of all inference so far
        self.layouts: list[Layout] = []

    def open_stream(self) -> int:
        self._streams += 1
        return self._streams

    def close_stream(self, stream: int) -> None:
        self.hub.engine.close_stream(self.session, stream)

    def infer(self, smashed: torch.Tensor, layout: Layout, stream: int, order: tuple[int, ...]) -> torch.Tensor:
        self.layouts.append(layout)
        self._requests += 1
        sent = to_wire(smashed.clone(), self.wire)
        item = InferItem(self.session, self._requests, stream, self.place, self.version, layout, order, sent)
        return _tensor(self.hub.infer(item), smashed)

    def send_smashed(self, part: Part, smashed: torch.Tensor, layout: Layout) -> Future[AnyMessage]:
        states = to_wire(smashed.detach().clone(), self.wire)
        item = StepItem(self.session, self.place, layout, part.tokens, states, part.micro, part.micros)
        return _answered(self.hub.step_forward(item), lambda hidden: StepHidden(part.step, hidden, part.micro))

    def send_gradient(self, part: Part, gradient: torch.Tensor) -> Future[AnyMessage]:
        last = part.micro == part.micros - 1
        outcome = self.hub.step_backward(self.session, to_wire(gradient.clone(), self.wire), part.micro, last)
        return _answered(outcome, lambda grad: StepGrad(part.step, 0, 0, 0, grad, part.micro))

    def may_be_under_way(self, smashed: torch.Tensor) -> int:
        return MOST_MICRO_BATCHES


def _answered(outcome: Outcome, word: Callable[[Tensor], AnyMessage]) -> Future[AnyMessage]:
    future: Future[AnyMessage] = Future()
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(word(outcome))
    return future


def _tensor(outcome: Outcome, like: torch.Tensor) -> torch.Tensor:
    if isinstance(outcome, Exception):
        raise outcome
    return from_wire(outcome, dtype=like.dtype, shape=tuple(like.shape))


def make_edge(whole: PreTrainedModel, partition: Partition, hub: Engine | Hub, session: int = 1) -> CutModel:
    """An edge's model over an engine in this process, in the engine's dtype."""
    dtype = (hub if isinstance(hub, Engine) else hub.engine).settings.dtype
    edge = load(build_edge(whole.config, partition, dtype), source_of(whole), dtype, CPU)
    remote_of(edge).attach(LocalMiddle(Alone(hub) if isinstance(hub, Engine) else hub, partition, session))
    return edge


def middle_of(edge: CutModel) -> LocalMiddle:
    """The stand-in for the network of an edge that `make_edge` made."""
    middle = remote_of(edge).middle
    assert isinstance(middle, LocalMiddle)
    return middle


def difference(given: torch.Tensor, wanted: torch.Tensor) -> float:
    """max |a - b| / max |b|."""
    return float((given - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
