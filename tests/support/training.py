"""Training of LoRA adapters on split and on unsplit models, side by side."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel

from blocks import adapters
from blocks.adapters import Adapter, LoraSpec
from blocks.optimizer import AdapterOptimizer, Schedule
from blocks.partition import Partition
from edge.data import Batch as EdgeBatch
from edge.middle import HubMiddle
from edge.noise import GaussianNoise
from edge.pipeline import Pipeline, split
from hub.aggregate import Contribution
from hub.engine import Engine
from tests.support.models import VOCAB, Hub, make_edge, make_schedule, middle_of

#: Padding of a row: this many columns on the left and on the right.
Padding = tuple[int, int]


@dataclass(frozen=True)
class Batch:
    """ids, mask and labels, each [rows, width]; `labels` are -100 where nothing is to be predicted."""

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor

    @property
    def tokens(self) -> int:
        """Target tokens: labels that are predicted from the position before."""
        return int((self.labels[:, 1:] != -100).sum())


def make_batch(seed: int, width: int, paddings: Sequence[Padding]) -> Batch:
    """Random rows of unequal length; the first two tokens of each are a prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (len(paddings), width), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    for row, (left, right) in enumerate(paddings):
        mask[row, :left], mask[row, width - right :] = 0, 0
        labels[row, : left + 2], labels[row, width - right :] = -100, -100
    return Batch(ids * mask, mask, labels)


def union(batches: Sequence[Batch]) -> Batch:
    """All rows in one batch, the shorter ones padded on the right."""
    width = max(batch.ids.shape[1] for batch in batches)

    def padded(tensors: list[torch.Tensor], value: int) -> torch.Tensor:
        return torch.cat([nn.functional.pad(t, (0, width - t.shape[1]), value=value) for t in tensors])

    return Batch(
        padded([batch.ids for batch in batches], 0),
        padded([batch.mask for batch in batches], 0),
        padded([batch.labels for batch in batches], -100),
    )


def starting_adapter(model: PreTrainedModel, spec: LoraSpec) -> Adapter:
    """An adapter in the middle of training: B is not zero, so that A has a gradient too."""
    adapter = adapters.initial(model.config, spec, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, value in adapter.items():
        if name.endswith("lora_B.weight"):
            value.copy_(0.05 * torch.randn(value.shape, generator=generator))
    return adapter


def use_sgd(optimizer: AdapterOptimizer) -> None:
    """Plain SGD in the place of AdamW: all else of a step stays as it is."""
    optimizer._adam = torch.optim.SGD(list(optimizer._parameters.values()), lr=optimizer._schedule.lr)  # type: ignore[assignment]


def record_gradients(optimizer: AdapterOptimizer) -> Adapter:
    """A dict that holds, after each step, the gradients that the step went by."""
    kept: Adapter = {}

    def keep(*_: object) -> None:
        kept.clear()
        kept.update({name: p.grad.clone() for name, p in optimizer._parameters.items() if p.grad is not None})

    optimizer._adam.register_step_pre_hook(keep)
    return kept


class TrainingEdge:
    """Blocks A and C with their adapter and optimizer, as the edge's trainer has them."""

    def __init__(
        self,
        whole: PreTrainedModel,
        partition: Partition,
        hub: Engine | Hub,
        spec: LoraSpec,
        start: Adapter,
        session: int = 1,
        schedule: Schedule | None = None,
    ) -> None:
        self.cut = make_edge(whole, partition, hub, session)
        adapters.inject(self.cut, spec)
        adapters.write(self.cut, start)
        self.optimizer = AdapterOptimizer(adapters.parameters(self.cut), schedule or make_schedule())
        self._steps = 0

    def step(self, batch: Batch, micros: int = 1, window: int = 16) -> float:
        """One step; returns the mean loss."""
        pipeline = Pipeline(self.cut, cast(HubMiddle, middle_of(self.cut)), GaussianNoise(0.0, b""), window)
        whole = EdgeBatch(batch.ids, batch.labels, batch.mask, None, batch.tokens)
        taken = pipeline.step(self._steps, split(whole, micros), lambda: None)
        self._steps += 1
        self.optimizer.step(batch.tokens)
        return taken.loss / batch.tokens

    def contribution(self, tokens: int) -> Contribution:
        """What it uploads when a round closes."""
        own = adapters.read(self.cut)
        return Contribution(own, dict.fromkeys(own, tokens))


def summed_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Cross-entropy summed over the target tokens."""
    one = torch.tensor(1.0)
    loss: torch.Tensor = model(
        input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels, num_items_in_batch=one, use_cache=False
    ).loss
    return loss


def mean_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Cross-entropy as transformers gives it: the mean over the target tokens."""
    loss: torch.Tensor = model(
        input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels, use_cache=False
    ).loss
    return loss


class Unsplit:
    """peft and a stock torch optimizer on the whole model."""

    def __init__(self, whole: PreTrainedModel, spec: LoraSpec, start: Adapter, optimizer: type, **settings: float):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.model = get_peft_model(copy.deepcopy(whole), spec.config())
        self.model.eval()
        self.parameters = {
            name.replace(".default.", "."): p for name, p in self.model.named_parameters() if p.requires_grad
        }
        assert self.parameters.keys() == start.keys()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(start[name])
        self.optimizer: torch.optim.Optimizer = optimizer(list(self.parameters.values()), **settings)
        self.gradients: Adapter = {}

    def step(self, batch: Batch, by_sum: bool = False) -> float:
        """One step by the mean loss, or by the summed loss with the gradients divided; returns the mean."""
        self.optimizer.zero_grad()
        loss = summed_loss(self.model, batch) if by_sum else mean_loss(self.model, batch)
        loss.backward()
        if by_sum:
            for parameter in self.parameters.values():
                assert parameter.grad is not None
                parameter.grad.div_(batch.tokens)
        self.gradients = {name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None}
        self.optimizer.step()
        return float(loss.detach()) / (batch.tokens if by_sum else 1)

    @property
    def adapter(self) -> Adapter:
        """The parameters as they are now."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
