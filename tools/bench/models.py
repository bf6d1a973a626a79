"""The models that are measured, written once per run into a temporary folder."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from transformers import LlamaConfig

from tools.make_model import make_model

HIDDEN = 512


def _config(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocab: int) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocab, max_position_embeddings=4096,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


class Models:
    """Folders of random Llamas, made when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def standard(self) -> Path:
        """16 layers, hidden 512, vocabulary 32,000, float32: 67 million parameters."""
        return self._make("standard", _config(16, HIDDEN, 1376, 8, 8, 32_000), torch.float32)

    @cached_property
    def small(self) -> Path:
        """3 layers, hidden 64: for what does not depend on the size."""
        return self._make("small", _config(3, 64, 128, 4, 4, 300), torch.float32)

    @cached_property
    def billion(self) -> Path:
        """1.1 billion parameters in bfloat16, sharded."""
        return self._make("billion", _config(22, 2048, 5632, 32, 4, 32_000), torch.bfloat16)

    def _make(self, name: str, config: LlamaConfig, dtype: torch.dtype) -> Path:
        path = self.folder / name
        make_model(path, config, dtype, 512 << 20)
        return path
