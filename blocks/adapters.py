"""LoRA adapters through peft, on parts of a model.

An adapter's tensors are named as peft names them on the whole model, with absolute layer numbers
('base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight'), wherever the layer is hosted. They are
float32 whatever the weights are.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from blocks.surgery import CutModel, LayerNames, build_whole
from messaging.errors import InputError

Adapter = dict[str, torch.Tensor]

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraSpec:
    """Rank, alpha and target modules (suffixes of module paths) of an adapter."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    fan_in_fan_out: bool = False

    def config(self) -> LoraConfig:
        """The same in peft's words."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.targets),
            fan_in_fan_out=self.fan_in_fan_out,
            lora_dropout=0.0,
            bias="none",
        )


def default_targets(config: PreTrainedConfig) -> tuple[str, ...]:
    """Every linear of attention and MLP, as paths inside a layer ('self_attn.q_proj'); routers are left alone."""
    model, names = build_whole(config, torch.float32)
    layers = model.get_submodule(names.prefix)
    experts = _expert_counts(config)
    found: dict[str, None] = {}
    for layer in layers:
        for path, module in layer.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)) and _out_features(module) not in experts:
                found[path] = None
    if experts:
        found = {path: None for path in found if _peft_agrees(config, path)}
    if not found:
        raise InputError(f"{type(model).__name__} has no linear modules for LoRA: give --target-modules")
    return tuple(found)


def _expert_counts(config: PreTrainedConfig) -> set[int]:
    """How many experts a mixture has, under any of the names for it; empty where there is no mixture."""
    keys = ("num_local_experts", "num_experts", "n_routed_experts")
    return {getattr(config.get_text_config(), key, None) or 0 for key in keys} - {0}


def _peft_agrees(config: PreTrainedConfig, target: str) -> bool:
    """Whether peft puts this target where its name says.

    In some mixtures of experts it takes gate_proj, up_proj and down_proj, wherever they stand, for the experts.
    """
    spec = LoraSpec(1, 1.0, (target,))
    model, _ = build_whole(config, torch.float32)
    try:
        with _quiet_peft():
            peft = get_peft_model(model, spec.config())
    except ValueError:
        return False
    made = {name.replace(".default.", ".") for name, _ in peft.named_parameters() if ".lora_" in name}
    return made == shapes(config, spec).keys()


def make_spec(config: PreTrainedConfig, rank: int, alpha: float, targets: Iterable[str] = ()) -> LoraSpec:
    """An adapter's shape for this model. Raises InputError when a target names no module of the layers."""
    model, names = build_whole(config, torch.float32)
    modules = {
        path: module
        for path, module in model.get_submodule(names.prefix)[0].named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    for layer in model.get_submodule(names.prefix):
        modules.update({p: m for p, m in layer.named_modules() if isinstance(m, (nn.Linear, Conv1D))})
    chosen = tuple(targets) or default_targets(config)
    for target in chosen:
        if not any(path == target or path.endswith("." + target) for path in modules):
            raise InputError(
                f"--target-modules {target}: no such module; this model's layers have {', '.join(sorted(modules))}"
            )
        if targets and _expert_counts(config) and not _peft_agrees(config, target):
            raise InputError(
                f"--target-modules {target}: peft takes this name for the experts' weights, which FedSEA does not "
                f"train; take some of {', '.join(default_targets(config))}"
            )
    return LoraSpec(rank, alpha, chosen, any(isinstance(module, Conv1D) for module in modules.values()))


def inject(cut: CutModel, spec: LoraSpec, adapter: str = "default") -> PeftModel | None:
    """Wrap the cut model's target modules with LoRA; None when none of its layers has any (q = 0 and the like)."""
    hosted = [path for path, _ in cut.model.named_modules() if path.startswith(cut.names.prefix + ".")]
    if not any(path.endswith("." + target) for path in hosted for target in spec.targets):
        return None
    with _quiet_peft():
        return get_peft_model(cut.model, spec.config(), adapter_name=adapter)


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Without warnings that are not for the user: peft asks the model for an attribute by its old name, and so on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        warnings.filterwarnings("ignore", message="The following .*_pattern keys", category=RuntimeWarning)
        yield


def parameters(cut: CutModel, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The adapter's live parameters in this cut, by absolute name."""
    found = {}
    for name, parameter in cut.model.named_parameters():
        match = re.fullmatch(rf"(.*\.lora_[AB])\.{re.escape(adapter)}(\.weight)", name)
        if match:
            found[_PREFIX + cut.to_absolute(match[1] + match[2])] = parameter
    return found


def read(cut: CutModel, adapter: str = "default") -> Adapter:
    """A copy of the adapter's tensors on the CPU."""
    return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in parameters(cut, adapter).items()}


def write(cut: CutModel, tensors: Mapping[str, torch.Tensor], adapter: str = "default") -> None:
    """Set the adapter's parameters that this cut hosts. Raises InputError when one is missing or has another shape."""
    for name, parameter in parameters(cut, adapter).items():
        value = tensors.get(name)
        if value is None or value.shape != parameter.shape:
            raise InputError(f"the adapter lacks {name} with shape {tuple(parameter.shape)}: another rank or model?")
        with torch.no_grad():
            parameter.copy_(value)


def shapes(config: PreTrainedConfig, spec: LoraSpec) -> dict[str, tuple[int, int]]:
    """Name and shape of every tensor of the whole model's adapter, in the model's order."""
    model, names = build_whole(config, torch.float32)
    found: dict[str, tuple[int, int]] = {}
    for path, module in model.named_modules():
        if not path.startswith(names.prefix + ".") or not isinstance(module, (nn.Linear, Conv1D)):
            continue
        if any(path.endswith("." + target) for target in spec.targets):
            found[f"{_PREFIX}{path}.lora_A.weight"] = (spec.rank, _in_features(module))
            found[f"{_PREFIX}{path}.lora_B.weight"] = (_out_features(module), spec.rank)
    return found


def initial(config: PreTrainedConfig, spec: LoraSpec, seed: int) -> Adapter:
    """Every layer's first adapter: A uniform as peft draws it (He et al. 2015, a = sqrt 5), B zero.

    Each tensor's draw depends on the seed and its name alone, so it is the same wherever it is made.
    """
    out: Adapter = {}
    for name, shape in shapes(config, spec).items():
        if name.endswith("lora_B.weight"):
            out[name] = torch.zeros(shape)
            continue
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        bound = 1 / math.sqrt(shape[1])
        out[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return out


def of_layers(adapter: Mapping[str, torch.Tensor], names: LayerNames, first: int, last: int) -> Adapter:
    """The part of an adapter in absolute layers first .. last (last excluded)."""
    return {name: value for name, value in adapter.items() if first <= layer_of(name, names) < last}


def layer_of(name: str, names: LayerNames) -> int:
    """The absolute layer that an adapter tensor belongs to."""
    match = re.search(rf"\.{re.escape(names.attribute)}\.(\d+)\.", name)
    if match is None:
        raise InputError(f"{name} belongs to no layer")
    return int(match[1])


def _in_features(module: nn.Module) -> int:
    return module.weight.shape[0] if isinstance(module, Conv1D) else module.weight.shape[1]  # type: ignore[index,return-value]


def _out_features(module: nn.Module) -> int:
    return module.weight.shape[1] if isinstance(module, Conv1D) else module.weight.shape[0]  # type: ignore[index,return-value]
