"""AdamW on an adapter's tensors, by name, with clipping and warm-up: the same on edge and hub."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Schedule:
    """Learning rate, its linear warm-up in steps, the norm to clip to (inf: none) and AdamW's weight decay."""

    lr: float
    warmup_steps: int
    clip_norm: float
    weight_decay: float


class AdapterOptimizer:
    """AdamW (0.9, 0.999, eps 1e-5: the FedSEA paper's settings) over named parameters.

    Parameters without a gradient in a step are left as they are, their moments and weight decay too: a layer
    that no row passed through is not trained.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], schedule: Schedule) -> None:
        self._parameters = dict(parameters)
        self._schedule = schedule
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        self._adam = torch.optim.AdamW(
            list(self._parameters.values()), lr=schedule.lr, eps=1e-5, weight_decay=schedule.weight_decay
        )
        self.steps = 0

    def step(self, tokens: int | Mapping[str, int]) -> float:
        """Divide the gradients of a summed loss by the target tokens behind them, clip, step, clear.

        tokens: one count, or one per name where the rows of a batch pass different layers; a parameter without
        tokens has no gradient. Returns the norm before clipping. A norm that is not finite changes nothing but
        the gradients, which are dropped.
        """
        with_grad, counts = self._with_gradient(tokens)
        norm = 0.0
        if with_grad:
            grads = [p.grad for p in with_grad if p.grad is not None]
            torch._foreach_div_(grads, counts)
            norm = float(nn.utils.get_total_norm(grads))
            if math.isfinite(norm):
                if math.isfinite(self._schedule.clip_norm):
                    nn.utils.clip_grads_with_norm_(with_grad, self._schedule.clip_norm, torch.tensor(norm))
                self._warm_up()
                self._adam.step()
                self.steps += 1
        self._adam.zero_grad(set_to_none=True)
        return norm

    def drop_gradients(self) -> None:
        """Forget what a backward left that broke off."""
        self._adam.zero_grad(set_to_none=True)

    def _with_gradient(self, tokens: int | Mapping[str, int]) -> tuple[list[nn.Parameter], list[float]]:
        """The parameters that this step trains, and the tokens behind each; the others lose their gradient."""
        chosen: list[nn.Parameter] = []
        counts: list[float] = []
        for name, parameter in self._parameters.items():
            count = tokens if isinstance(tokens, int) else tokens.get(name, 0)
            if parameter.grad is None or not count:
                parameter.grad = None
                continue
            chosen.append(parameter)
            counts.append(float(count))
        return chosen, counts

    def _warm_up(self) -> None:
        warmup = self._schedule.warmup_steps
        factor = min(1.0, (self.steps + 1) / warmup) if warmup else 1.0
        for group in self._adam.param_groups:
            group["lr"] = self._schedule.lr * factor

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of the moments and counts, flat by name ('NAME|exp_avg'), and '|steps'."""
        out = {"|steps": torch.tensor(self.steps)}
        for name, parameter in self._parameters.items():
            for key, value in self._adam.state.get(parameter, {}).items():
                out[f"{name}|{key}"] = value.detach().to("cpu", copy=True)
        return out

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state` returned, and forget all that came after it."""
        self.steps = int(state["|steps"])
        for name, parameter in self._parameters.items():
            entries = {key.rpartition("|")[2]: value for key, value in state.items() if key.startswith(name + "|")}
            self._adam.state.pop(parameter, None)
            if entries:
                self._adam.state[parameter] = {
                    key: value.clone() if key == "step" else value.to(parameter.device, copy=True)
                    for key, value in entries.items()
                }
