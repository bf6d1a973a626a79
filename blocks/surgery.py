"""Cut a transformers causal language model: keep some layers, put something else in the place of the rest.

The whole model is built on the meta device first (no memory), so that every layer is made by the library for
its true place; then layers are dropped and the ones that stay are renumbered, because transformers' caches
and sliding-window masks go by the number that a layer has in the model it runs in.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from blocks.quantize import LoadQuantizer, release_freed_memory
from blocks.weights import WeightSource
from messaging.errors import InputError


@dataclass(frozen=True)
class LayerNames:
    """Where a model's layers stand: `prefix` is the path of the list ('model.layers'), `count` their number."""

    prefix: str
    count: int

    @property
    def attribute(self) -> str:
        """The list's own name: 'layers', 'h', ..."""
        return self.prefix.rpartition(".")[2]


@dataclass
class CutModel:
    """A model with some of its layers; `kept[i]` is the absolute index of local layer i, None for a stand-in."""

    model: PreTrainedModel
    names: LayerNames
    kept: list[int | None]

    @property
    def layers(self) -> nn.ModuleList:
        """The list of layers that the model runs through."""
        found = self.model.get_submodule(self.names.prefix)
        assert isinstance(found, nn.ModuleList)
        return found

    def to_local(self, name: str) -> str | None:
        """A parameter's name in the whole model -> here; None where its layer is not hosted."""
        return self._renumber(name, {absolute: local for local, absolute in enumerate(self.kept)})

    def to_absolute(self, name: str) -> str:
        """A parameter's name here -> in the whole model."""
        renamed = self._renumber(name, dict(enumerate(self.kept)))
        assert renamed is not None
        return renamed

    def _renumber(self, name: str, table: dict[Any, Any]) -> str | None:
        match = re.search(rf"(^|\.){re.escape(self.names.attribute)}\.(\d+)\.", name)
        if match is None:
            return name
        number = table.get(int(match[2]))
        return None if number is None else f"{name[: match.start(2)]}{number}{name[match.end(2) :]}"


def build_whole(config: PreTrainedConfig, dtype: torch.dtype) -> tuple[PreTrainedModel, LayerNames]:
    """The whole model on the meta device, with a config of its own, and where its layers stand."""
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError) as error:
        raise InputError(f"transformers cannot build a causal language model from this config: {error}") from error
    return model, find_layers(model)


def find_layers(model: PreTrainedModel) -> LayerNames:
    """The outermost module list with as many entries as the config says there are layers."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise InputError(f"{type(model).__name__} keeps its {count} layers in no list: it cannot be split")
    return LayerNames(min(lists, key=lambda name: name.count(".")), count)


def keep_layers(
    model: PreTrainedModel, names: LayerNames, kept: Sequence[int | None], stand_in: nn.Module | None = None
) -> CutModel:
    """Reduce the model's layer list to `kept`; None stands for `stand_in`. Changes the model and its config."""
    old = model.get_submodule(names.prefix)
    assert isinstance(old, nn.ModuleList)
    chosen: list[nn.Module] = []
    for local, absolute in enumerate(kept):
        if absolute is None:
            assert stand_in is not None
            chosen.append(stand_in)
            continue
        for module in old[absolute].modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = local  # type: ignore[assignment]
        chosen.append(old[absolute])
    parent, _, attribute = names.prefix.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.ModuleList(chosen))
    _shorten(model.config.get_text_config(), kept)
    return CutModel(model, names, list(kept))


def _shorten(config: PreTrainedConfig, kept: Sequence[int | None]) -> None:
    """Cut every per-layer list of the config to the kept layers; a stand-in gets its predecessor's entry."""
    count = config.num_hidden_layers
    index: list[int] = []
    for absolute in kept:
        index.append(index[-1] if absolute is None and index else absolute or 0)
    for key, value in list(vars(config).items()):
        if "layer" in key and isinstance(value, (list, tuple)) and len(value) == count:
            setattr(config, key, [value[i] for i in index])
    config.num_hidden_layers = len(kept)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar of transformers' inside: the live view owns the terminal."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class _Lazy:
    """A checkpoint tensor that transformers' loader reads when it needs it."""

    def __init__(self, source: WeightSource, name: str, dtype: torch.dtype) -> None:
        self._source, self._name, self._dtype = source, name, dtype

    def __getitem__(self, _: object) -> torch.Tensor:
        return self._source.read(self._name, self._dtype)


def load(
    cut: CutModel,
    source: WeightSource,
    dtype: torch.dtype,
    device: torch.device,
    bits: int | None = None,
    homes: Sequence[torch.device] = (),
) -> CutModel:
    """Fill the cut model from `source`: only tensors that it hosts are read, each once, straight to its device.

    With `bits` (8 or 4) its linear layers are quantized, each as soon as it is read (`blocks.quantize`). homes: the
    device of each of its layers, where these are not all on `device`, which has the rest.

    transformers' own loader does the renaming and fusing that architectures need (mixture-of-experts
    checkpoints, base-model prefixes). Raises InputError when the checkpoint lacks a tensor.
    """
    model = cut.model
    lazy = {}
    for name in source.names():
        local = cut.to_local(name)
        if local is not None:
            lazy[local] = _Lazy(source, name, dtype)
    device_map = {"": device, **{f"{cut.names.prefix}.{local}": home for local, home in enumerate(homes)}}
    settings = LoadStateDictConfig(
        device_map=device_map,
        dtype=dtype,
        weight_mapping=get_model_conversion_mapping(model),
        hf_quantizer=LoadQuantizer(model, bits) if bits else None,
    )
    with _quiet():
        info, _ = convert_and_load_state_dict_in_model(model, lazy, settings)
    tied = set(model.all_tied_weights_keys)
    missing = sorted(info.missing_keys - tied)
    if missing or info.mismatched_keys or info.conversion_errors:
        wrong = missing or info.mismatched_keys or info.conversion_errors
        raise InputError(f"the weights do not fit {type(model).__name__}: {str(wrong)[:300]}")
    model._move_missing_keys_from_meta_to_device(info.missing_and_mismatched(), device_map, None, None)
    model._initialize_missing_keys(False)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model.requires_grad_(False)
    model.eval()
    if bits:
        release_freed_memory()
    return cut
