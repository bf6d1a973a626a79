"""Tiny random models of many architectures, and an edge joined to an engine without a network."""

from __future__ import annotations

import math

import torch
import transformers as T
from transformers import AutoModelForCausalLM, PreTrainedModel

from blocks import adapters
from blocks.layout import Layout
from blocks.optimizer import Schedule
from blocks.partition import Partition
from blocks.remote import build_edge, remote_of
from blocks.surgery import CutModel, load
from blocks.weights import StateDictSource
from hub.engine import Engine, EngineSettings
from hub.jobs import InferItem, Place, StepItem
from blocks.codec import from_wire, to_wire

LAYERS = 6
VOCAB = 120
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


def schedule(lr: float = 1e-3, clip: float = math.inf, warmup: int = 0, decay: float = 0.0) -> Schedule:
    """Optimizer settings for tests: nothing but AdamW itself unless asked for."""
    return Schedule(lr, warmup, clip, decay)


def make_engine(whole: PreTrainedModel, spec: adapters.LoraSpec | None = None, **kwargs: object) -> Engine:
    """An engine over the whole model's middle layers."""
    spec = spec or adapters.make_spec(whole.config, 4, 8)
    settings = EngineSettings(spec, kwargs.pop("schedule", schedule()), torch.float32, CPU, 1 << 28)  # type: ignore[arg-type]
    return Engine(whole.config, source_of(whole), settings)


class LocalMiddle:
    """Blocks B of an engine in this process: what the network does, without the network."""

    def __init__(self, engine: Engine, partition: Partition, session: int = 1) -> None:
        self.engine, self.session = engine, session
        self.place = Place(partition.p, partition.leave(engine.num_layers))
        self.version, self._streams, self._requests = 0, 0, 0
        self.layouts: list[Layout] = []

    def open_stream(self) -> int:
        self._streams += 1
        return self._streams

    def close_stream(self, stream: int) -> None:
        self.engine.close_stream(self.session, stream)

    def infer(self, smashed: torch.Tensor, layout: Layout, stream: int, order: tuple[int, ...]) -> torch.Tensor:
        self.layouts.append(layout)
        self._requests += 1
        item = InferItem(
            self.session, self._requests, stream, self.place, self.version, layout, order, to_wire(smashed.clone())
        )
        (outcome,) = self.engine.infer([item])
        if isinstance(outcome, Exception):
            raise outcome
        return from_wire(outcome, dtype=smashed.dtype, shape=tuple(smashed.shape))

    def step_forward(self, smashed: torch.Tensor, layout: Layout) -> torch.Tensor:
        item = StepItem(self.session, self.place, layout, layout.rows, to_wire(smashed.clone()))
        out = self.engine.step_forward([item])[self.session]
        return from_wire(out, dtype=smashed.dtype, shape=tuple(smashed.shape))

    def step_backward(self, grad_hidden: torch.Tensor) -> torch.Tensor:
        out = self.engine.step_backward({self.session: to_wire(grad_hidden)})[self.session]
        return from_wire(out, dtype=grad_hidden.dtype, shape=tuple(grad_hidden.shape))


def make_edge(whole: PreTrainedModel, partition: Partition, engine: Engine, session: int = 1) -> CutModel:
    """An edge's model over an engine in this process."""
    edge = load(build_edge(whole.config, partition, torch.float32), source_of(whole), torch.float32, CPU)
    remote_of(edge).attach(LocalMiddle(engine, partition, session))
    return edge
