"""What a restarted hub goes on from: all of it in one file, so that no part is ever newer than another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from hub.store.files import StoreError
from hub.store.series import Entry, Series, fault

# torch takes seconds to import, and most of the hub's commands open a state without reading a tensor.
if TYPE_CHECKING:
    import torch

#: Two, so that there is still one when the disk spoils the newest.
KEPT = 2

_FORMAT = 2
_ADAPTER = "adapter/"
_OPTIMIZER = "optimizer/"
_BLOB = "blob/"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of training after `hub_step` optimizer steps of B, `round_step` of them in round `round`.

    `adapter` holds float32 tensors by absolute peft names, `optimizer` what the optimizer gave; `applied` the
    last step of each edge, by its public key, that is inside these tensors. `version` is that of the adapter
    published last. `extra` is JSON of the caller's own, and `blobs` are tensors of the caller's own.
    """

    hub_step: int
    round: int
    round_step: int
    version: int
    applied: Mapping[str, int]
    adapter: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    extra: Mapping[str, Any] = field(default_factory=dict)
    blobs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    #: the same of the other replicas of B, in the same round; each is whole in itself, and may be of another moment
    others: tuple[Checkpoint, ...] = ()


class CheckpointStore:
    """The newest checkpoints of a state. One thread at a time."""

    def __init__(self, series: Series) -> None:
        self._series = series

    def save(self, checkpoint: Checkpoint) -> Entry:
        """Write one, durable on return, and drop all but the newest two. StoreError if the disk does not take it."""
        entries = self._series.entries()
        number = entries[0].number + 1 if entries else 1
        entry = self._series.add(number, partial(_write, checkpoint=checkpoint), _note(checkpoint))
        self._series.drop([old.number for old in entries[KEPT - 1 :]])
        return entry

    def load_latest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest that is sound, and a warning for each that is not. None if there never was one.

        StoreError when some are there and none is sound: to start anew is for people to decide.
        """
        warnings: list[str] = []
        entries = self._series.entries()
        for entry in entries:
            reason = fault(entry.path, entry.sha256, entry.bytes)
            if reason is None:
                try:
                    return _read(entry.path), warnings
                except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
                    reason = f"cannot be read ({error})"
            warnings.append(f"checkpoint {entry.path} {reason}")
        if any(entry.path.exists() for entry in entries):
            raise StoreError(
                f"no checkpoint can be used: {'; '.join(warnings)}. Restore one, or delete these files to start anew"
            )
        return None, warnings

    def latest(self) -> Entry | None:
        """What is listed as the newest, without opening it; its note has hub_step, round, round_step, version."""
        entries = self._series.entries()
        return entries[0] if entries else None


def _note(checkpoint: Checkpoint) -> dict[str, Any]:
    return {name: getattr(checkpoint, name) for name in ("hub_step", "round", "round_step", "version")}


def _write(path: Path, checkpoint: Checkpoint) -> None:
    from safetensors.torch import save_file

    tensors = _tensors(checkpoint)
    for number, other in enumerate(checkpoint.others, 1):
        tensors.update({f"{number}/{name}": value for name, value in _tensors(other).items()})
    facts: dict[str, Any] = {"format": _FORMAT, **_facts(checkpoint)}
    if checkpoint.others:
        facts["others"] = [_facts(other) for other in checkpoint.others]
    save_file(plain(tensors), path, metadata={"fedsea": json.dumps(facts)})


def _read(path: Path) -> Checkpoint:
    with safe_open(path, framework="pt", device="cpu") as file:
        facts = json.loads(file.metadata()["fedsea"])
        if facts.pop("format") != _FORMAT:
            raise ValueError("it was written by another version of FedSEA")
        others = [_part(file, f"{number}/", part) for number, part in enumerate(facts.pop("others", []), 1)]
        return replace(_part(file, "", facts), others=tuple(others))


def _tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    tensors = {_ADAPTER + name: value.float() for name, value in checkpoint.adapter.items()}
    tensors.update({_OPTIMIZER + name: value for name, value in checkpoint.optimizer.items()})
    tensors.update({_BLOB + name: value for name, value in checkpoint.blobs.items()})
    return tensors


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    return _note(checkpoint) | {"applied": dict(checkpoint.applied), "extra": dict(checkpoint.extra)}


def _part(file: Any, place: str, facts: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint of one replica, whose tensors have names that begin with `place`."""

    def under(kind: str) -> dict[str, torch.Tensor]:
        begin = place + kind
        return {n.removeprefix(begin): file.get_tensor(n) for n in file.keys() if n.startswith(begin)}  # noqa: SIM118

    return Checkpoint(adapter=under(_ADAPTER), optimizer=under(_OPTIMIZER), blobs=under(_BLOB), **facts)


def plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As safetensors takes them: on the CPU, contiguous, no two in one storage and none a part of a larger one."""
    out: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        storage = value.untyped_storage()
        if storage.nbytes() != value.nbytes or storage.data_ptr() in seen:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        out[name] = value
    return out
