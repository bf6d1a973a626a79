"""Write a Llama with random weights, of any size, in constant memory: for benchmarks and tests of loading.

python -m tools.make_model --out DIR --layers 22 --hidden 2048 --intermediate 5632 --heads 32 --kv-heads 4
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from blocks.manifest import DTYPE_NAMES
from blocks.source import CONFIG, GENERATION_CONFIG, INDEX, small_files
from blocks.surgery import build_whole
from blocks.weights import TensorInfo

_PIECE = 4 << 20
_SCALE = 0.02
_SPECIAL = ("<pad>", "<s>", "</s>")


def make_model(
    out: Path, config: LlamaConfig, dtype: torch.dtype, shard_bytes: int, tokenizer_from: Path | None = None
) -> int:
    """Write the model's folder; the number of its weights' bytes. The same config gives the same weights."""
    out.mkdir(parents=True, exist_ok=True)
    model, _ = build_whole(config, dtype)
    tensors = [TensorInfo(name, dtype, tuple(value.shape)) for name, value in model.state_dict().items()]
    shards = list(_shards(tensors, shard_bytes))
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(out / name, shard, generator)
        weight_map.update(dict.fromkeys([info.name for info in shard], name))
    total = sum(info.nbytes for info in tensors)
    (out / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)
    GenerationConfig.from_model_config(config).save_pretrained(out)
    if tokenizer_from is None:
        _byte_tokenizer(config.vocab_size).save_pretrained(out)
    else:
        for name, path in small_files(tokenizer_from).items():
            if name not in (CONFIG, GENERATION_CONFIG):
                shutil.copyfile(path, out / name)
    return total


def _shards(tensors: Sequence[TensorInfo], most: int) -> Iterator[list[TensorInfo]]:
    """The tensors in order, in groups of at most so many bytes, or of one."""
    shard: list[TensorInfo] = []
    for info in tensors:
        if shard and sum(item.nbytes for item in shard) + info.nbytes > most:
            yield shard
            shard = []
        shard.append(info)
    yield shard


def _write_shard(path: Path, tensors: Sequence[TensorInfo], generator: torch.Generator) -> None:
    header, at = {}, 0
    for info in tensors:
        entry = {"dtype": DTYPE_NAMES[info.dtype], "shape": info.shape, "data_offsets": [at, at + info.nbytes]}
        header[info.name] = entry
        at += info.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for info in tensors:
            for piece in _values(info, generator):
                file.write(piece.view(torch.uint8).numpy().tobytes())


def _values(info: TensorInfo, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """The tensor's values in pieces: norms are ones, all else is normal with a small deviation."""
    total = torch.Size(info.shape).numel()
    for at in range(0, total, _PIECE):
        size = min(_PIECE, total - at)
        if len(info.shape) == 1:
            yield torch.ones(size, dtype=info.dtype)
        else:
            yield torch.randn(size, generator=generator).mul_(_SCALE).to(info.dtype)


def _byte_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A token for each byte: reads any text, and compresses nothing."""
    tokens = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    if len(tokens) > vocab:
        raise SystemExit(f"--vocab must be at least {len(tokens)} for the built-in tokenizer, or give --tokenizer-from")
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = _SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    sizes = {"layers": 22, "hidden": 2048, "intermediate": 5632, "heads": 32, "kv-heads": 4, "vocab": 32000}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--shard-mib", type=int, default=512)
    parser.add_argument("--tokenizer-from", type=Path, help="folder whose tokenizer is copied; default: one of bytes")
    given = parser.parse_args(arguments)
    config = LlamaConfig(
        num_hidden_layers=given.layers,
        hidden_size=given.hidden,
        intermediate_size=given.intermediate,
        num_attention_heads=given.heads,
        num_key_value_heads=given.kv_heads,
        vocab_size=given.vocab,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    total = make_model(given.out, config, getattr(torch, given.dtype), given.shard_mib << 20, given.tokenizer_from)
    print(f"{given.out}: {total} bytes of weights")


if __name__ == "__main__":
    main()
