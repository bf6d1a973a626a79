"""Predicted against measured peak memory of an edge process that trains, on models the planner was not fitted to.

    python -m tools.bench_memory [--json FILE] [--models held-out|calibration] [--runs N]

Each measurement is a fresh process with one thread: it resets the kernel's record of its peak resident size
(VmHWM), builds the edge's half of a random model with the edge's own code, trains some steps and reports by how
much the peak exceeds what the process had after its imports. In the hub's place is an echo in the process. Linux
only. A row's figure is the prediction over the median of its runs: where malloc puts things differs from process
to process, and with it the peak, by up to 7% either way.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig

import messaging.messages as m
from blocks import adapters
from blocks.codec import from_wire, to_wire
from blocks.decoding import speed_up_decoding
from blocks.layout import Layout
from blocks.optimizer import AdapterOptimizer, Schedule
from blocks.partition import Partition
from blocks.quantize import parse_bits
from blocks.remote import build_edge, remote_of
from blocks.surgery import CutModel, build_whole, load
from blocks.weights import TensorInfo
from edge.allocator import keep_large_tensors_apart
from edge.data import Batch
from edge.middle import HubMiddle, Part
from edge.noise import GaussianNoise
from edge.pipeline import Pipeline
from profiles.memory import MemoryPrediction, predict_memory
from profiles.model import shape_from_config
from profiles.workload import Workload

STEPS = 6
LORA_RANK = 8
MIB = 2**20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: A prediction within this much of the measured peak, relatively, meets the target.
TARGET = 0.15


@dataclass(frozen=True)
class Model:
    """A random model, its batch, the partitions that are measured, and how the weights are held."""

    name: str
    config: dict[str, Any]
    batch: int
    seq: int
    partitions: tuple[tuple[int, int], ...] = ((1, 1), (3, 1), (2, 4))
    dtype: str = "float32"
    bits: int | None = None


def _sizes(hidden: int, inner: int, vocab: int, heads: int = 8, **others: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "num_attention_heads": heads,
        **others,
    }


def _opt(hidden: int, vocab: int) -> dict[str, Any]:
    sizes = _sizes(hidden, 0, vocab, word_embed_proj_dim=hidden, ffn_dim=4 * hidden)
    return {key: value for key, value in sizes.items() if key != "intermediate_size"} | {"model_type": "opt"}


def _gpt2(hidden: int, vocab: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_embd": hidden, "n_head": 8, "vocab_size": vocab}


_BILLION = {"model_type": "llama", **_sizes(2048, 5632, 32000, 32, num_key_value_heads=4)}
HELD_OUT = [
    Model("qwen3", {"model_type": "qwen3", **_sizes(640, 1728, 24000, 10, num_key_value_heads=2, head_dim=64)}, 4, 160),
    Model("mistral", {"model_type": "mistral", **_sizes(896, 2432, 12000, 14, num_key_value_heads=2)}, 2, 256),
    Model("starcoder2", {"model_type": "starcoder2", **_sizes(576, 2304, 20000, 9, num_key_value_heads=3)}, 6, 96),
]

#: The models that the constants of profiles/memory.py were fitted to, with the batches of the fit.
CALIBRATION = [
    Model(f"{name} {batch}x{seq}", config, batch, seq, ((1, 1), (3, 2)))
    for name, config in {
        "llama-256": {"model_type": "llama", **_sizes(256, 688, 16000)},
        "llama-512": {"model_type": "llama", **_sizes(512, 1376, 2000)},
        "llama-512-32k": {"model_type": "llama", **_sizes(512, 1376, 32000)},
        "llama-768": {"model_type": "llama", **_sizes(768, 2048, 8000)},
        "gpt2-256": _gpt2(256, 16000),
        "gpt2-512": _gpt2(512, 8000),
        "opt-512": _opt(512, 8000),
        "opt-768": _opt(768, 16000),
        "gpt_neox-512": {"model_type": "gpt_neox", **_sizes(512, 2048, 8000)},
    }.items()
    for batch, seq in ((2, 64), (4, 160))
]

#: 1.1 billion parameters, as a hub would serve them and in fewer bits.
BILLION = [Model(f"billion {bits or 16} bit", _BILLION, 1, 512, ((1, 1),), "bfloat16", bits) for bits in (None, 8, 4)]


class RandomWeights:
    """A checkpoint of random weights that is nowhere in memory: each tensor is made when it is read."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def names(self) -> Iterable[str]:
        """See blocks.weights.WeightSource."""
        return self._shapes

    def info(self, name: str) -> TensorInfo:
        """See blocks.weights.WeightSource."""
        return TensorInfo(name, torch.float32, self._shapes[name])

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """See blocks.weights.WeightSource."""
        return torch.empty(self._shapes[name], dtype=dtype).normal_(0, 0.02)


class Echo:
    """Blocks B that answer with what they get, through the wire's own code; nothing else is on the edge."""

    def send_smashed(self, part: Part, smashed: torch.Tensor, layout: Layout) -> Future[m.AnyMessage]:
        """See edge.middle.HubMiddle."""
        return _answered(m.StepHidden(part.step, _there_and_back(smashed.detach()), part.micro))

    def send_gradient(self, part: Part, gradient: torch.Tensor) -> Future[m.AnyMessage]:
        """See edge.middle.HubMiddle."""
        return _answered(m.StepGrad(part.step, 0, 0, 0, _there_and_back(gradient), part.micro))

    def may_be_under_way(self, smashed: torch.Tensor) -> int:
        """See edge.middle.HubMiddle."""
        return m.MOST_MICRO_BATCHES

    def infer(self, smashed: torch.Tensor, layout: Layout, stream: int, order: tuple[int, ...]) -> torch.Tensor:
        """See blocks.remote.Middle."""
        return self._answer(smashed)

    def open_stream(self) -> int:
        """See blocks.remote.Middle."""
        return 1

    def close_stream(self, stream: int) -> None:
        """See blocks.remote.Middle."""

    def _answer(self, tensor: torch.Tensor) -> torch.Tensor:
        return from_wire(_there_and_back(tensor), dtype=tensor.dtype, shape=tuple(tensor.shape))


def _there_and_back(tensor: torch.Tensor) -> m.Tensor:
    sent = to_wire(tensor)
    return replace(sent, chunks=tuple(memoryview(bytes(chunk)) for chunk in sent.chunks))


def _answered(message: m.AnyMessage) -> Future[m.AnyMessage]:
    future: Future[m.AnyMessage] = Future()
    future.set_result(message)
    return future


def build_edge_half(config: Any, p: int, q: int, dtype: torch.dtype, bits: int | None) -> CutModel:
    """The edge's own half of a random model, adapters included, as `edge join` builds it."""
    cut = build_edge(config, Partition(p, q), dtype)
    names = dict(build_whole(config, dtype)[0].named_parameters())
    load(cut, RandomWeights(names), dtype, torch.device("cpu"), bits)
    speed_up_decoding(cut.layers)
    adapters.inject(cut, adapters.make_spec(config, LORA_RANK, alpha=16))
    remote_of(cut).attach(Echo())
    return cut


def _transformers_config(config: dict[str, Any], layers: int) -> Any:
    settings = AutoConfig.for_model(**config, bos_token_id=1, eos_token_id=2)
    settings.num_hidden_layers = layers
    if getattr(settings, "layer_types", None) is not None:
        settings.layer_types = ["full_attention"] * layers
    return settings


def measure(model: Model, p: int, q: int) -> int:
    """Peak in bytes of one training run, less what the process had after its imports. Run in a fresh process."""
    torch.set_num_threads(1)
    config = _transformers_config(model.config, layers=p + q + 1)
    keep_large_tensors_apart()
    if model.bits:
        parse_bits(f"{model.bits}bit")
    gc.collect()
    before = _status("VmRSS")
    # 5 resets the peak to the present size (proc(5), /proc/pid/clear_refs)
    Path("/proc/self/clear_refs").write_text("5")
    cut = build_edge_half(config, p, q, DTYPES[model.dtype], model.bits)
    optimizer = AdapterOptimizer(adapters.parameters(cut), Schedule(1e-4, 0, 1.0, 0.0))
    pipeline = Pipeline(cut, cast(HubMiddle, remote_of(cut).middle), GaussianNoise(0.0, b""), 1)
    for step in range(STEPS):
        tokens = torch.randint(0, config.vocab_size, (model.batch, model.seq))
        batch = Batch(tokens, tokens, None, None, tokens.numel() - model.batch)
        pipeline.step(step, [batch], lambda: None)
        optimizer.step(batch.tokens)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    """A size from /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def predict(model: Model, p: int, q: int) -> MemoryPrediction:
    """What the planner expects of the same run."""
    shape = shape_from_config(_transformers_config(model.config, layers=p + q + 1).to_dict())
    workload = Workload(model.batch, model.seq, model.dtype, lora_rank=LORA_RANK, bits=model.bits)
    return predict_memory(shape, p, q, workload, "cpu")


def _measure_apart(models: str, index: int, p: int, q: int) -> int:
    command = [sys.executable, "-W", "ignore", "-m", "tools.bench_memory", "--models", models]
    command += ["--worker", str(index), str(p), str(q)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the measuring process failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def bench(models: str, runs: int) -> list[dict[str, Any]]:
    """Measure and print every row of the table; returns the rows for --json."""
    rows = []
    print(f"{'model':20} {'p:q':5} {'predicted':>10} {'measured':>10} {'from':>6} {'to':>6} {'ratio':>6}   (MiB)")
    for index, model in enumerate(MODELS[models]):
        for p, q in model.partitions:
            predicted = predict(model, p, q).total
            peaks = [_measure_apart(models, index, p, q) for _ in range(runs)]
            peak = statistics.median(peaks)
            ratio = predicted / peak
            sizes = f"{predicted / MIB:10.0f} {peak / MIB:10.0f} {min(peaks) / MIB:6.0f} {max(peaks) / MIB:6.0f}"
            print(f"{model.name:20} {p}:{q}   {sizes} {ratio:6.3f}", flush=True)
            rows.append(
                {
                    "row": f"peak memory, predicted / measured, {model.name} {p}:{q}",
                    "figure": round(ratio, 3),
                    "target": f"within {TARGET:.0%}",
                    "met": abs(ratio - 1) <= TARGET,
                }
            )
    return rows


MODELS = {"held-out": HELD_OUT, "calibration": CALIBRATION, "billion": BILLION}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE too")
    parser.add_argument("--models", choices=sorted(MODELS), default="held-out")
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="processes for each row (default 1)")
    parser.add_argument("--worker", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        index, p, q = options.worker
        print(measure(MODELS[options.models][index], p, q))
        return
    rows = bench(options.models, options.runs)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "skipped": []}, indent=1) + "\n")


if __name__ == "__main__":
    main()
