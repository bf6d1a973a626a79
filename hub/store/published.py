"""Global adapters as the rounds published them: what edges fetch, generation uses and `hub export` writes."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from hub.store.checkpoints import plain
from hub.store.files import StoreError
from hub.store.series import Entry, Series, fault
from messaging.messages import Recipe

# See checkpoints.py: a state is often opened without reading a tensor.
if TYPE_CHECKING:
    import torch

#: The newest so many are kept, and those that sessions hold on to.
KEPT = 5


@dataclass(frozen=True)
class PublishedAdapter:
    """A published adapter: its file, the sha256 and size of that file, and what it is."""

    version: int
    round: int
    recipe: Recipe
    path: Path
    sha256: str
    bytes: int
    published_at: float

    def tensors(self) -> dict[str, torch.Tensor]:
        """The float32 tensors by absolute peft names. StoreError when the file is not what was written."""
        from safetensors.torch import load_file

        reason = fault(self.path, self.sha256, self.bytes)
        if reason is None:
            try:
                loaded: dict[str, torch.Tensor] = load_file(self.path)
                return loaded
            except (SafetensorError, OSError) as error:
                reason = f"cannot be read ({error})"
        raise StoreError(f"the published adapter {self.path} {reason}")


class AdapterStore:
    """The published adapters of a state. One thread at a time may publish."""

    def __init__(self, series: Series) -> None:
        self._series = series

    def publish(
        self,
        version: int,
        round: int,
        tensors: Mapping[str, torch.Tensor],
        recipe: Recipe,
        pinned: Collection[int] = (),
    ) -> PublishedAdapter:
        """Write a version, durable on return, and drop old ones that are not among `pinned`."""
        note = {"round": round, "recipe": asdict(recipe)}
        entry = self._series.add(version, partial(_write, tensors=tensors, note={"version": version, **note}), note)
        old = [entry.number for entry in self._series.entries()][KEPT:]
        self._series.drop([number for number in old if number not in pinned])
        return _published(entry)

    def latest(self) -> PublishedAdapter | None:
        """The newest one; None before the first."""
        entries = self._series.entries()
        return _published(entries[0]) if entries else None

    def kept(self) -> list[PublishedAdapter]:
        """All that are kept, newest first."""
        return [_published(entry) for entry in self._series.entries()]

    def get(self, version: int) -> PublishedAdapter | None:
        """The one of this version, if it is still kept."""
        return next((_published(entry) for entry in self._series.entries() if entry.number == version), None)

    def rewind(self, version: int) -> None:
        """Forget what is newer than `version`: what a hub published and died before its checkpoint said so."""
        self._series.drop([entry.number for entry in self._series.entries() if entry.number > version])


def _published(entry: Entry) -> PublishedAdapter:
    recipe = recipe_from_json(entry.note["recipe"])
    return PublishedAdapter(
        entry.number, entry.note["round"], recipe, entry.path, entry.sha256, entry.bytes, entry.written_at
    )


def _write(path: Path, tensors: Mapping[str, torch.Tensor], note: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    contents = plain({name: value.float() for name, value in tensors.items()})
    save_file(contents, path, metadata={"format": "pt", "fedsea": json.dumps(note)})


def recipe_from_json(fields: Mapping[str, Any]) -> Recipe:
    """A recipe from what `dataclasses.asdict` and JSON made of it."""
    return Recipe(**{**fields, "target_modules": tuple(fields["target_modules"])})
