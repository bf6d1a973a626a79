"""Tiny models as folders on disk."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from blocks.weights import FileSource
from tools.make_model import make_model


def tiny_config() -> LlamaConfig:
    """A Llama of four layers, whose embedding is its largest tensor."""
    return LlamaConfig(
        num_hidden_layers=4,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def sharded_model(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A model in several safetensors files with an index, and with a tokenizer of bytes."""
    make_model(folder, tiny_config(), dtype, shard_bytes=32 << 10)
    return folder


def single_model(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The same weights in one file."""
    sharded_model(folder, dtype)
    tensors = stored(folder)
    for path in [*folder.glob("model-*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    save_file(tensors, folder / "model.safetensors")
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by the safetensors library."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def watch_reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """From now on reads of files take a moment; returns how to ask how many were under way at once at most."""
    lock, counts = threading.Lock(), {"now": 0, "most": 0}
    plain = FileSource.read

    def read(self: FileSource, name: str, dtype: torch.dtype) -> torch.Tensor:
        with lock:
            counts["now"] += 1
            counts["most"] = max(counts["most"], counts["now"])
        time.sleep(0.005)
        try:
            return plain(self, name, dtype)
        finally:
            with lock:
                counts["now"] -= 1

    monkeypatch.setattr(FileSource, "read", read)
    return lambda: counts["most"]


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None takes one out."""
    fields = json.loads(path.read_bytes())
    fields.update(changes)
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
